"""Floating-point operations a model needs for one image, by formula: two for every multiply-add of a matrix product.

What the published models multiply: no recomputation, no norms, activations or softmax. A trained part counts three times its forward
(once forward, twice backward), a frozen one once. Ours come to the same numbers with fewer where they can (docs/estimates.md), so a
share of peak by these compares with others', and is above what the chip's matrix units do.
"""

import math
from typing import Any

from beitv2_jax import config as config_lib

# Peak bf16 TFLOP/s of a device, from the makers' data sheets, by what JAX calls it (device_kind), in small letters.
PEAKS = {
  'tpu v4': 275,
  'tpu v5 lite': 197,
  'tpu v5e': 197,
  'tpu v5p': 459,
  'tpu v5': 459,
  'tpu v6 lite': 918,
  'tpu v6e': 918,
  'tpu7x': 1153.5,  # half of a chip: it comes as two devices
  'a100': 312,
  'h100': 989,
  'h200': 989,
}


def peak(device_kind: str) -> float | None:
  """Peak bf16 TFLOP/s of a device by JAX's name for it; None if it is not known."""
  kind = device_kind.lower()
  return PEAKS.get(kind) or next((PEAKS[name] for name in ('a100', 'h100', 'h200') if name in kind), None)


def vit(width: int, depth: int, tokens: int, mlp_ratio: float = 4.0) -> float:
  """Blocks of a transformer on `tokens` tokens: 2T(4D² + 2rD²) for the matrices and 4T²D for attention, each."""
  return depth * (2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width)


def linear(tokens: float, features_in: int, features_out: int) -> float:
  return 2.0 * tokens * features_in * features_out


def tokenizer_codes(model: Any, patches: int) -> float:
  """Images to codes: encoder, its head, distances to the codebook."""
  encoder = model.encoder
  head = linear(patches, encoder.width, encoder.width) + linear(patches, encoder.width, model.code_dim)
  embed = linear(patches, 3 * model.patch_size**2, encoder.width)
  return embed + vit(encoder.width, encoder.depth, patches + 1, model.mlp_ratio) + head + linear(patches, model.code_dim, model.codes)


def tokenizer_decoder(model: Any, patches: int) -> float:
  decoder = model.decoder
  head = linear(patches, decoder.width, decoder.width) + linear(patches, decoder.width, model.teacher_width)
  return linear(patches, model.code_dim, decoder.width) + vit(decoder.width, decoder.depth, patches + 1, model.mlp_ratio) + head


def pretraining_model(model: Any, patches: int, masked: int) -> float:
  """The student: backbone, aggregation blocks, and the code head on masked patches, once a branch."""
  embed = linear(patches, 3 * model.patch_size**2, model.width)
  branches = 2 if model.head_layers else 1
  return (
    embed
    + vit(model.width, model.depth + model.head_layers, patches + 1, model.mlp_ratio)
    + branches * linear(masked, model.width, model.vocab)
  )


def classifier(model: Any, patches: int) -> float:
  embed = linear(patches, 3 * model.patch_size**2, model.width)
  return embed + vit(model.width, model.depth, patches + 1, model.mlp_ratio) + linear(1, model.width, model.classes)


def segmenter(model: Any, patches: int) -> float:
  """Backbone, pyramid and both heads. Resizing and pooling do not count."""
  backbone = linear(patches, 3 * model.patch_size**2, model.width) + vit(model.width, model.depth, patches + 1, model.mlp_ratio)
  width, channels, cells = model.width, model.channels, [16.0 * patches, 4.0 * patches, 1.0 * patches, patches / 4]
  pyramid = linear(patches, width, 4 * width) + linear(4 * patches, width, 4 * width) + linear(patches, width, 4 * width)
  pooled = sum(linear(scale * scale, width, channels) for scale in model.pool_scales) + linear(
    cells[3], 9 * (width + len(model.pool_scales) * channels), channels
  )
  maps = sum(linear(positions, width, channels) + linear(positions, 9 * channels, channels) for positions in cells[:3])
  head = linear(cells[0], 9 * 4 * channels, channels) + linear(cells[0], channels, model.classes)
  aux = linear(patches, 9 * width, model.aux_channels) + linear(patches, model.aux_channels, model.classes)
  return backbone + pyramid + pooled + maps + head + aux


def per_image(config: Any, tokenizer: Any = None) -> dict[str, float]:
  """{part: operations of one training step for one image} of a config.

  `tokenizer` is the model section of the frozen tokenizer's config (the released one's if not given). The teacher of a tokenizer
  is taken to be as large as its encoder, as CLIP ViT-B/16 is.
  """
  patches = math.prod(config_lib.patch_grid(config))
  model = config.model
  if config.task == 'tokenizer':
    teacher = vit(model.encoder.width, model.encoder.depth, patches + 1, model.mlp_ratio)
    return {'student': 3 * (tokenizer_codes(model, patches) + tokenizer_decoder(model, patches)), 'teacher': teacher}
  if config.task == 'pretrain':
    frozen, target = tokenizer or config_lib.tokenizer_model(), config.get('target', 'codes')
    model = model.copy_and_resolve_references()
    if not model.vocab:
      model = model.unlock()
      model.vocab = dict(codes=frozen.codes, pixels=3 * model.patch_size**2, features=model.width)[target]
    student = {'student': 3 * pretraining_model(model, patches, config.mask.count)}
    if target == 'codes':
      return student | {'tokenizer': tokenizer_codes(frozen, patches)}
    return student | ({'teacher': vit(model.width, model.depth, patches + 1, model.mlp_ratio)} if target == 'features' else {})
  if config.task in ('classifier', 'segmenter'):
    model = model.copy_and_resolve_references().unlock()
    model.classes = model.classes or 1000
    return {'student': 3 * {'classifier': classifier, 'segmenter': segmenter}[config.task](model, patches)}
  raise ValueError(f'no formula for the task {config.task!r}')
