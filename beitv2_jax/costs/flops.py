"""Floating-point operations a model needs for one image, by formula: two for every multiply-add of a matrix product.

Only what the method needs: no recomputation, no norms, activations or softmax. A trained part counts three times its forward
(once forward, twice backward), a frozen one once.
"""

import math
from typing import Any

from beitv2_jax import config as config_lib


def vit(width: int, depth: int, tokens: int, mlp_ratio: float = 4.0) -> float:
  """Blocks of a transformer on `tokens` tokens: 2T(4D² + 2rD²) for the matrices and 4T²D for attention, each."""
  return depth * (2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width)


def linear(tokens: float, features_in: int, features_out: int) -> float:
  return 2.0 * tokens * features_in * features_out


def tokenizer_codes(m: Any, patches: int) -> float:
  """Images to codes: encoder, its head, distances to the codebook."""
  e = m.encoder
  head = linear(patches, e.width, e.width) + linear(patches, e.width, m.code_dim)
  embed = linear(patches, 3 * m.patch_size**2, e.width)
  return embed + vit(e.width, e.depth, patches + 1, m.mlp_ratio) + head + linear(patches, m.code_dim, m.codes)


def tokenizer_decoder(m: Any, patches: int) -> float:
  d = m.decoder
  head = linear(patches, d.width, d.width) + linear(patches, d.width, m.teacher_width)
  return linear(patches, m.code_dim, d.width) + vit(d.width, d.depth, patches + 1, m.mlp_ratio) + head


def pretraining_model(m: Any, patches: int, masked: int) -> float:
  """The student: backbone, aggregation blocks, and the code head on masked patches, once a branch."""
  embed = linear(patches, 3 * m.patch_size**2, m.width)
  branches = 2 if m.head_layers else 1
  return embed + vit(m.width, m.depth + m.head_layers, patches + 1, m.mlp_ratio) + branches * linear(masked, m.width, m.vocab)


def classifier(m: Any, patches: int) -> float:
  embed = linear(patches, 3 * m.patch_size**2, m.width)
  return embed + vit(m.width, m.depth, patches + 1, m.mlp_ratio) + linear(1, m.width, m.classes)


def segmenter(m: Any, patches: int) -> float:
  """Backbone, pyramid and both heads. Resizing and pooling do not count."""
  backbone = linear(patches, 3 * m.patch_size**2, m.width) + vit(m.width, m.depth, patches + 1, m.mlp_ratio)
  d, c, cells = m.width, m.channels, [16.0 * patches, 4.0 * patches, 1.0 * patches, patches / 4]
  pyramid = linear(patches, d, 4 * d) + linear(4 * patches, d, 4 * d) + linear(patches, d, 4 * d)
  pooled = sum(linear(s * s, d, c) for s in m.pool_scales) + linear(cells[3], 9 * (d + len(m.pool_scales) * c), c)
  maps = sum(linear(n, d, c) + linear(n, 9 * c, c) for n in cells[:3])
  head = linear(cells[0], 9 * 4 * c, c) + linear(cells[0], c, m.classes)
  aux = linear(patches, 9 * d, m.aux_channels) + linear(patches, m.aux_channels, m.classes)
  return backbone + pyramid + pooled + maps + head + aux


def per_image(config: Any, tokenizer: Any = None) -> dict[str, float]:
  """{part: operations of one training step for one image} of a config.

  `tokenizer` is the model section of the frozen tokenizer's config (the released one's if not given). The teacher of a tokenizer
  is taken to be as large as its encoder, as CLIP ViT-B/16 is.
  """
  patches = math.prod(config_lib.patch_grid(config))
  m = config.model
  if config.task == 'tokenizer':
    teacher = vit(m.encoder.width, m.encoder.depth, patches + 1, m.mlp_ratio)
    return {'student': 3 * (tokenizer_codes(m, patches) + tokenizer_decoder(m, patches)), 'teacher': teacher}
  if config.task == 'pretrain':
    frozen = tokenizer or config_lib.tokenizer_model()
    m = m.copy_and_resolve_references()
    if not m.vocab:
      m = m.unlock()
      m.vocab = frozen.codes
    return {'student': 3 * pretraining_model(m, patches, config.mask.count), 'tokenizer': tokenizer_codes(frozen, patches)}
  if config.task in ('classifier', 'segmenter'):
    m = m.copy_and_resolve_references().unlock()
    m.classes = m.classes or 1000
    return {'student': 3 * {'classifier': classifier, 'segmenter': segmenter}[config.task](m, patches)}
  raise ValueError(f'no formula for the task {config.task!r}')
