"""The official PyTorch checkpoints: every key, where it goes here, and how its array is laid out. Both directions.

Kinds: tokenizer, pretrain, classifier, segmenter. A key without a home is an error unless the official code itself drops it.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.weights import trees

Array = np.ndarray


def _linear(heads: int) -> tuple[Callable, Callable]:
  return np.transpose, np.transpose


def _same(heads):
  return (lambda w: w), (lambda w: w)


def _conv(heads):
  return (lambda w: w.transpose(2, 3, 1, 0)), (lambda w: w.transpose(3, 2, 0, 1))


def _deconv(heads):
  """torch keeps transposed convolutions as [in, out, kh, kw]."""
  return (lambda w: w.transpose(2, 3, 0, 1)), (lambda w: w.transpose(2, 3, 0, 1))


def _qkv(heads):
  """[3D, D] → [D, 3, H, D/H]."""
  return (
    lambda w: w.reshape(3, heads, -1, w.shape[1]).transpose(3, 0, 1, 2),
    lambda w: w.transpose(1, 2, 3, 0).reshape(-1, w.shape[0]),
  )


def _proj(heads):
  """[D, D] → [H, D/H, D]."""
  return (lambda w: w.T.reshape(heads, -1, w.shape[0])), (lambda w: w.reshape(-1, w.shape[-1]).T)


def _heads(heads):
  return (lambda w: w.reshape(heads, -1)), (lambda w: w.reshape(-1))


_NORM = [('weight', 'scale', _same), ('bias', 'bias', _same)]
_LINEAR = [('weight', 'kernel', _linear), ('bias', 'bias', _same)]
_CONV = [('weight', 'kernel', _conv), ('bias', 'bias', _same)]


def _under(theirs: str, ours: str, rows: list) -> list:
  return [(f'{theirs}.{a}', f'{ours}/{b}', layout) for a, b, layout in rows]


_BLOCK = [
  *_under('norm1', 'norm1', _NORM),
  *_under('norm2', 'norm2', _NORM),
  ('attn.qkv.weight', 'attn/qkv', _qkv),
  ('attn.q_bias', 'attn/q_bias', _heads),
  ('attn.v_bias', 'attn/v_bias', _heads),
  ('attn.proj.weight', 'attn/proj', _proj),
  ('attn.proj.bias', 'attn/proj_bias', _same),
  ('attn.relative_position_bias_table', 'attn/rel_pos_bias/table', _same),
  *_under('mlp.fc1', 'fc1', _LINEAR),
  *_under('mlp.fc2', 'fc2', _LINEAR),
  ('gamma_1', 'gamma1', _same),
  ('gamma_2', 'gamma2', _same),
]
_VIT = [
  ('cls_token', 'cls_token', _same),
  ('mask_token', 'mask_token', _same),
  ('pos_embed', 'pos_embed', _same),
  ('rel_pos_bias.relative_position_bias_table', 'rel_pos_bias/table', _same),
  *_under('patch_embed.proj', 'patch_embed', _CONV),
  *_under('blocks.#', 'block_#', _BLOCK),
]
_DECONV = [('weight', 'kernel', _deconv), ('bias', 'bias', _same)]
_PATCH_ENCODER = [*((a, f'vit/{b}', layout) for a, b, layout in _VIT), *_under('fc_norm', 'norm', _NORM)]


def _batch_norm(theirs: str, ours: str) -> list:
  stats = [('running_mean', 'mean', _same), ('running_var', 'var', _same)]
  return [*_under(theirs, f'params/{ours}', _NORM), *_under(theirs, f'batch_stats/{ours}', stats)]


def _conv_module(theirs: str, ours: str) -> list:
  return [(f'{theirs}.conv.weight', f'params/{ours}/conv/kernel', _conv), *_batch_norm(f'{theirs}.bn', f'{ours}/bn')]


# (official key, our path under the variables, layout); # stands for a block's number.
TABLES = {
  'tokenizer': [
    *_under('encoder', 'params/encoder', _PATCH_ENCODER),
    *_under('decoder', 'params/decoder', _PATCH_ENCODER),
    *_under('encode_task_layer.0', 'params/encode_head/fc1', _LINEAR),
    *_under('encode_task_layer.2', 'params/encode_head/fc2', _LINEAR),
    *_under('decode_task_layer.0', 'params/decode_head/fc1', _LINEAR),
    *_under('decode_task_layer.2', 'params/decode_head/fc2', _LINEAR),
    ('quantize.embedding.weight', 'codebook/quantizer/embedding', _same),
    ('quantize.embedding.cluster_size', 'codebook/quantizer/cluster_size', _same),
    ('quantize.cluster_size', 'codebook/quantizer/usage', _same),
  ],
  'pretrain': [
    *((a, f'params/backbone/{b}', layout) for a, b, layout in _VIT),
    *_under('norm', 'params/norm', _NORM),
    *_under('lm_head', 'params/lm_head', _LINEAR),
    *_under('cls_pt_layers.#', 'params/aggregation_#', _BLOCK),
    *_under('cls_pt_norm', 'params/aggregation_norm', _NORM),
    *_under('cls_pt_lm_head', 'params/aggregation_lm_head', _LINEAR),
  ],
  'classifier': [
    *((a, f'params/backbone/{b}', layout) for a, b, layout in _VIT),
    *_under('norm', 'params/norm', _NORM),
    *_under('fc_norm', 'params/fc_norm', _NORM),
    *_under('head', 'params/head', _LINEAR),
  ],
  'segmenter': [
    *((f'backbone.{a}', f'params/backbone/{b}', layout) for a, b, layout in _VIT),
    *_under('backbone.fpn1.0', 'params/fpn1_up1', _DECONV),
    *_batch_norm('backbone.fpn1.1', 'fpn1_norm'),
    *_under('backbone.fpn1.3', 'params/fpn1_up2', _DECONV),
    *_under('backbone.fpn2.0', 'params/fpn2_up', _DECONV),
    *_conv_module('decode_head.psp_modules.#.1', 'psp_#'),
    *_conv_module('decode_head.bottleneck', 'psp_bottleneck'),
    *_conv_module('decode_head.lateral_convs.#', 'lateral_#'),
    *_conv_module('decode_head.fpn_convs.#', 'fpn_conv_#'),
    *_conv_module('decode_head.fpn_bottleneck', 'fpn_bottleneck'),
    *_under('decode_head.conv_seg', 'params/classifier', _CONV),
    *_conv_module('auxiliary_head.convs.0', 'aux_conv'),
    *_under('auxiliary_head.conv_seg', 'params/aux_classifier', _CONV),
  ],
}
# What the official loaders drop: buffers that are computed, the teacher, dead fields of the quantizer.
DROPPED = {
  'tokenizer': r'loss.*|teacher.*|scaling.*|quantize\.embedding\.(embed_avg|initted)|.*relative_position_index',
  'pretrain': r'.*relative_position_index',
  'classifier': r'.*relative_position_index',
  'segmenter': r'.*relative_position_index|.*num_batches_tracked',
}


def rule(source: str, target: str) -> Callable[[str], str | None]:
  """Renames what matches `source` to `target`, None otherwise; # stands for the same number in both."""
  pattern = re.compile(re.escape(source).replace(r'\#', '#').replace('#', r'(\d+)'))

  def rename(name: str) -> str | None:
    found = pattern.fullmatch(name)
    return found and (target.replace('#', found[1]) if found.groups() else target)

  return rename


def _rules(kind: str, reverse: bool) -> list[tuple[Callable, Callable]]:
  """(rename, layout) of every row of the table."""
  return [(rule(ours, theirs) if reverse else rule(theirs, ours), layout) for theirs, ours, layout in TABLES[kind]]


def _find(rules: list, name: str) -> tuple[str, Callable] | None:
  return next(((new, layout) for rename, layout in rules if (new := rename(name))), None)


def home(kind: str, key: str) -> str | None:
  """Where an official key goes: a path of ours, '' if it is dropped, None if it has no home."""
  if re.fullmatch(DROPPED[kind], key):
    return ''
  found = _find(_rules(kind, reverse=False), key)
  return found and found[0]


def _head_count(name: str, heads: dict[str, int]) -> int:
  return heads['decoder' if name.startswith(('decoder', 'params/decoder')) else 'encoder']


def to_ours(kind: str, state: dict[str, Array], heads: dict[str, int]) -> dict[str, Any]:
  """Official state dict → our variables, a nested dict. `heads`: {'encoder': H, 'decoder': H of the tokenizer's decoder}.

  Raises UserError for keys without a home, all of them named.
  """
  flat, homeless, rules = {}, [], _rules(kind, reverse=False)
  for key, value in state.items():
    if re.fullmatch(DROPPED[kind], key):
      continue
    if found := _find(rules, key):
      path, layout = found
      try:
        with np.errstate(over='ignore'):  # what is too large for float32 is found below
          flat[path] = np.ascontiguousarray(layout(_head_count(key, heads))[0](np.asarray(value, np.float32)))
      except (ValueError, IndexError, TypeError) as e:
        raise UserError(f'{key} has the shape {value.shape}, which it has in no {kind} of these sizes.') from e
      if not np.isfinite(flat[path]).all():
        raise UserError(f'{key} has values that are not finite in float32: its training had diverged, or the file is damaged.')
    else:
      homeless.append(key)
  if homeless:
    raise UserError(
      f'{len(homeless)} keys have no place in a {kind} model: {", ".join(sorted(homeless)[:6])}. Is it another kind, or another model?'
    )
  return trees.unflatten(flat)


def with_zero_biases(state: dict[str, Array]) -> dict[str, Array]:
  """`state` with zeros for q_bias and v_bias where it has neither: trained with qkv_bias=False, which computes the same."""
  added = {}
  for key, value in state.items():
    stem = key.removesuffix('qkv.weight')
    if stem != key and value.ndim == 2 and not any(f'{stem}{bias}' in state for bias in ('q_bias', 'v_bias', 'qkv.bias')):
      added |= {f'{stem}{bias}': np.zeros(len(value) // 3, np.float32) for bias in ('q_bias', 'v_bias')}
  return state | added


def from_ours(kind: str, variables: dict[str, Any]) -> dict[str, Array]:
  """Our variables → official keys and layouts; the inverse of `to_ours`."""
  rules, out = _rules(kind, reverse=True), {}
  for path, value in trees.flatten(variables).items():
    found = _find(rules, path)
    if not found:
      raise UserError(f'{path} has no official name; is this a {kind} model?')
    key, layout = found
    out[key] = np.ascontiguousarray(layout(0)[1](np.asarray(value)))
  return out
