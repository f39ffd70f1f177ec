"""Our weights as transformers' Beit models: config.json, preprocessor_config.json and the key names."""

import re
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.models.teacher import IMAGENET_MEAN, IMAGENET_STD

_NAMES = [
  (r'cls_token', r'beit.embeddings.cls_token'),
  (r'mask_token', r'beit.embeddings.mask_token'),
  (r'pos_embed', r'beit.embeddings.position_embeddings'),
  (r'patch_embed\.proj\.(weight|bias)', r'beit.embeddings.patch_embeddings.projection.\1'),
  (r'rel_pos_bias\.(relative_position_bias_table)', r'beit.encoder.relative_position_bias.\1'),
  (r'blocks\.(\d+)\.norm1\.(\w+)', r'beit.encoder.layer.\1.layernorm_before.\2'),
  (r'blocks\.(\d+)\.norm2\.(\w+)', r'beit.encoder.layer.\1.layernorm_after.\2'),
  (r'blocks\.(\d+)\.attn\.q_bias', r'beit.encoder.layer.\1.attention.attention.query.bias'),
  (r'blocks\.(\d+)\.attn\.v_bias', r'beit.encoder.layer.\1.attention.attention.value.bias'),
  (r'blocks\.(\d+)\.attn\.proj\.(\w+)', r'beit.encoder.layer.\1.attention.output.dense.\2'),
  (r'blocks\.(\d+)\.attn\.(relative_position_bias_table)', r'beit.encoder.layer.\1.attention.attention.relative_position_bias.\2'),
  (r'blocks\.(\d+)\.mlp\.fc1\.(\w+)', r'beit.encoder.layer.\1.intermediate.dense.\2'),
  (r'blocks\.(\d+)\.mlp\.fc2\.(\w+)', r'beit.encoder.layer.\1.output.dense.\2'),
  (r'blocks\.(\d+)\.gamma_([12])', r'beit.encoder.layer.\1.lambda_\2'),
  (r'fc_norm\.(\w+)', r'beit.pooler.layernorm.\1'),
  (r'head\.(\w+)', r'classifier.\1'),
  (r'norm\.(\w+)', r'layernorm.\1'),
  (r'lm_head\.(\w+)', r'lm_head.\1'),
]


def convert(kind: str, c: Any, state: dict[str, np.ndarray], grid: tuple[int, int]) -> tuple[dict, dict, dict]:
  """(state dict, config, preprocessor config) from official keys. Patch aggregation has no home there and is left out.

  Raises UserError for kinds that transformers has no class for.
  """
  if kind not in ('pretrain', 'classifier'):
    raise UserError(f'transformers has no class for a {kind}; export it with --to-format official.')
  if grid[0] != grid[1]:
    raise UserError(f"transformers' Beit needs a square grid; this one is {grid[0]}x{grid[1]}.")
  m, out = c.model, {}
  for key, value in state.items():
    if key.startswith('cls_pt'):
      continue
    qkv = re.fullmatch(r'blocks\.(\d+)\.attn\.qkv\.weight', key)
    if qkv:
      for name, part in zip(('query', 'key', 'value'), np.split(value, 3)):
        out[f'beit.encoder.layer.{qkv[1]}.attention.attention.{name}.weight'] = np.ascontiguousarray(part)
      continue
    found = [re.sub(a, b, key) for a, b in _NAMES if re.fullmatch(a, key)]
    if not found:
      raise UserError(f'{key} has no name in transformers.')
    out[found[0]] = value
  classes = m.classes if kind == 'classifier' else 2
  config = dict(
    architectures=['BeitForImageClassification' if kind == 'classifier' else 'BeitForMaskedImageModeling'],
    model_type='beit',
    vocab_size=m.get('vocab', 0) or 8192,
    hidden_size=m.width,
    num_hidden_layers=m.depth,
    num_attention_heads=m.heads,
    intermediate_size=int(m.width * m.mlp_ratio),
    hidden_act='gelu',
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-6,  # theirs defaults to 1e-12
    image_size=grid[0] * m.patch_size,
    patch_size=m.patch_size,
    use_mask_token=kind == 'pretrain',
    use_absolute_position_embeddings=m.abs_pos,
    use_relative_position_bias=m.rel_pos == 'per_block',
    use_shared_relative_position_bias=m.rel_pos == 'shared',
    layer_scale_init_value=m.layer_scale,
    drop_path_rate=0.0,
    use_mean_pooling=True if kind == 'pretrain' else m.mean_pooling,
    id2label={str(i): f'LABEL_{i}' for i in range(classes)},
    label2id={f'LABEL_{i}': i for i in range(classes)},
  )
  size = dict(height=config['image_size'], width=config['image_size'])
  preprocessor = dict(
    image_processor_type='BeitImageProcessor', do_resize=True, size=size, resample=3, do_center_crop=False, do_rescale=True,
    rescale_factor=1 / 255, do_normalize=True, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), do_reduce_labels=False,
  )  # fmt: skip
  return out, config, preprocessor
