"""transformers' Beit models: key names in both directions, config.json and preprocessor_config.json."""

import re
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.models.images import statistics
from beitv2_jax.weights import descriptions
from beitv2_jax.weights.official import rule

State = dict[str, np.ndarray]


def _both(theirs: str, hf: str) -> list[tuple[str, str]]:
  return [(f'{theirs}.{x}', f'{hf}.{x}') for x in ('weight', 'bias')]


_BLOCK = [
  *_both('norm1', 'layernorm_before'),
  *_both('norm2', 'layernorm_after'),
  ('attn.q_bias', 'attention.attention.query.bias'),
  ('attn.v_bias', 'attention.attention.value.bias'),
  ('attn.relative_position_bias_table', 'attention.attention.relative_position_bias.relative_position_bias_table'),
  *_both('attn.proj', 'attention.output.dense'),
  *_both('mlp.fc1', 'intermediate.dense'),
  *_both('mlp.fc2', 'output.dense'),
  ('gamma_1', 'lambda_1'),
  ('gamma_2', 'lambda_2'),
]
_VIT = [
  ('cls_token', 'beit.embeddings.cls_token'),
  ('mask_token', 'beit.embeddings.mask_token'),
  ('pos_embed', 'beit.embeddings.position_embeddings'),
  *_both('patch_embed.proj', 'beit.embeddings.patch_embeddings.projection'),
  ('rel_pos_bias.relative_position_bias_table', 'beit.encoder.relative_position_bias.relative_position_bias_table'),
  *((f'blocks.#.{a}', f'beit.encoder.layer.#.{b}') for a, b in _BLOCK),
]
# (official key, theirs); # stands for a number. A block's qkv matrix, three there, is split and joined in the code below.
NAMES = {
  'pretrain': [*_VIT, *_both('norm', 'layernorm'), *_both('lm_head', 'lm_head')],
  'classifier': [*_VIT, *_both('norm', 'beit.layernorm'), *_both('fc_norm', 'beit.pooler.layernorm'), *_both('head', 'classifier')],
  'segmenter': [
    *((f'backbone.{a}', b) for a, b in _VIT),
    *_both('decode_head.conv_seg', 'decode_head.classifier'),
    *_both('auxiliary_head.conv_seg', 'auxiliary_head.classifier'),
  ],
}
ARCHITECTURES = dict(
  pretrain='BeitForMaskedImageModeling', classifier='BeitForImageClassification', segmenter='BeitForSemanticSegmentation'
)
_PARTS = ('query', 'key', 'value')


def is_theirs(state: State) -> bool:
  return any(k.startswith('beit.') for k in state)


def to_official(kind: str, state: State) -> State:
  """Their state dict under official names. Keys without a counterpart keep theirs, so that the importer names them."""
  if kind not in NAMES:
    raise UserError(f'transformers has no {kind}; this file holds {", ".join(sorted(state)[:3])} ...')
  rules, prefix, out = [rule(b, a) for a, b in NAMES[kind]], 'backbone.' if kind == 'segmenter' else '', {}
  for key, value in state.items():
    found = re.fullmatch(r'beit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight', key)
    if found and found[2] == 'query':
      names = [key.replace('.query.', f'.{p}.') for p in _PARTS]
      if any(n not in state for n in names):
        raise UserError(f'{key} comes without its key and value.')
      out[f'{prefix}blocks.{found[1]}.attn.qkv.weight'] = np.concatenate([state[n] for n in names])
    elif not found:
      name = next((new for rename in rules if (new := rename(key))), key)
      out[f'backbone.{name}' if re.match(r'fpn[12]\.', name) else name] = value
  return _without_spare(out) if kind == 'segmenter' else out


def _without_spare(state: State) -> State:
  """Without the last block of zeros that `convert` adds to a segmenter."""
  last = max((int(m[1]) for k in state if (m := re.match(r'backbone\.blocks\.(\d+)\.', k))), default=0)
  block = [k for k in state if k.startswith(f'backbone.blocks.{last}.')]
  return state if any(np.any(state[k]) for k in block) else {k: v for k, v in state.items() if k not in block}


def from_official(kind: str, state: State) -> State:
  rules, out = [rule(a, b) for a, b in NAMES[kind]], {}
  for key, value in state.items():
    if key.startswith('cls_pt'):  # patch aggregation has no home there
      continue
    qkv = re.fullmatch(r'(?:backbone\.)?blocks\.(\d+)\.attn\.qkv\.weight', key)
    if qkv:
      for name, part in zip(_PARTS, np.split(value, 3)):
        out[f'beit.encoder.layer.{qkv[1]}.attention.attention.{name}.weight'] = np.ascontiguousarray(part)
      continue
    name = next((new for rename in rules if (new := rename(key))), None)
    if name is None and kind == 'segmenter':  # pyramid and heads are called the same
      name = key.removeprefix('backbone.')
    if name is None:
      raise UserError(f'{key} has no name in transformers.')
    out[name] = value
  return out


def convert(kind: str, config: Any, state: State, grid: tuple[int, int]) -> tuple[State, dict, dict]:
  """(state dict, config, preprocessor config) from official keys. Patch aggregation has no home there and is left out.

  Raises UserError for what transformers has no class for.
  """
  if kind not in NAMES:
    raise UserError(f'transformers has no class for a {kind}; export it with --to-format official.')
  if grid[0] != grid[1]:
    raise UserError(f"transformers' Beit needs a square grid; this one is {grid[0]}x{grid[1]}.")
  model, out = config.model, from_official(kind, state)
  abs_pos = model.get('abs_pos', False)
  rel_pos = model.get('rel_pos', 'shared' if kind == 'pretrain' else 'per_block')  # a recipe leaves out what its model has by default
  classes = model.get('classes', 2)
  names = list(config.get('class_names') or ()) or [f'LABEL_{i}' for i in range(classes)]
  beit_config = dict(
    architectures=[ARCHITECTURES[kind]],
    model_type='beit',
    vocab_size=model.get('vocab', 0) or 8192,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=model.heads,
    intermediate_size=int(model.width * model.mlp_ratio),
    hidden_act='gelu',
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-6,  # theirs defaults to 1e-12
    image_size=grid[0] * model.patch_size,
    patch_size=model.patch_size,
    use_mask_token=kind == 'pretrain',
    use_absolute_position_embeddings=abs_pos,
    use_relative_position_bias=rel_pos == 'per_block',
    use_shared_relative_position_bias=rel_pos == 'shared',
    layer_scale_init_value=model.layer_scale,
    drop_path_rate=0.0,
    use_mean_pooling=model.get('mean_pooling', True),
    id2label={str(i): name for i, name in enumerate(names)},
    label2id={name: i for i, name in enumerate(names)},
  )
  preprocessor = _preprocessor(kind, config, grid[0] * model.patch_size)
  if kind == 'segmenter':
    if model.channels != model.width:
      raise UserError(f"transformers' heads are as wide as the backbone; here they have {model.channels} channels of {model.width}.")
    # Theirs takes hidden state k where k + 1 is in out_indices, and state 0 is the embedding: block i (from 0) is number i + 2.
    # Its config allows no number past the last block plus one, so a last block of zeros, which changes nothing, makes room.
    beit_config['out_indices'] = [i + 2 for i in model.out_indices]
    if max(beit_config['out_indices']) > model.depth:
      last = f'beit.encoder.layer.{model.depth - 1}.'
      spare = {k.replace(last, f'beit.encoder.layer.{model.depth}.'): np.zeros_like(v) for k, v in out.items() if k.startswith(last)}
      beit_config['num_hidden_layers'], out = model.depth + 1, out | spare
    beit_config |= dict(
      pool_scales=list(model.pool_scales), use_auxiliary_head=model.aux_channels > 0, auxiliary_channels=model.aux_channels or 256
    )
    beit_config[descriptions.OUT_INDICES] = list(model.out_indices)
    # ADE20K's masks count from 1, with 0 for none.
    preprocessor['do_reduce_labels'] = bool(config.labels.reduce_zero) if 'labels' in config else classes == 150
  return out, beit_config, preprocessor


def _preprocessor(kind: str, config: Any, side: int) -> dict[str, Any]:
  """preprocessor_config.json: how an image becomes what the network takes."""
  mean, std = statistics(config)
  size = dict(height=side, width=side)
  preprocessor: dict[str, Any] = dict(
    image_processor_type='BeitImageProcessor', do_resize=True, size=size, resample=3, do_center_crop=False, do_rescale=True,
    rescale_factor=1 / 255, do_normalize=True, image_mean=list(mean), image_std=list(std), do_reduce_labels=False,
  )  # fmt: skip
  if kind != 'segmenter':  # as we evaluate: the shorter side resized, then the centre; their Beit processor would squash to a square
    del preprocessor['do_reduce_labels']
    preprocessor |= dict(
      image_processor_type='CLIPImageProcessor', size=dict(shortest_edge=int(side / config.data.get('crop_pct', 0.875))), do_center_crop=True,
      crop_size=size, do_convert_rgb=True,
    )  # fmt: skip
  return preprocessor
