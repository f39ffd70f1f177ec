"""What a network sees of an image: uint8 pixels become floats, on the device, in the way each model was made for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unit_images(images: jax.Array) -> jax.Array:
  """uint8 → float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def vqkd_images(images: jax.Array) -> jax.Array:
  """uint8 pixels → [-1, 1], in the order of operations of the official tokenizer."""
  return (unit_images(images) * 255) / 127.5 - 1


def normalize(images: jax.Array, mean, std) -> jax.Array:
  """[..., C] in [0, 1], or patches [..., p*p*C], → zero mean and unit variance under the given statistics of C channels."""
  if images.shape[-1] % len(mean):
    raise ValueError(f'statistics of {len(mean)} channels for images of {images.shape[-1]}.')
  mean, std = (np.tile(np.asarray(v, images.dtype), images.shape[-1] // len(v)) for v in (mean, std))
  return (images - mean) / std


def statistics(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation that every model but the tokenizer normalises by: ImageNet's, unless its config says others."""
  return tuple(config.data.get('mean', IMAGENET_MEAN)), tuple(config.data.get('std', IMAGENET_STD))


def network_images(images: jax.Array, config: Any) -> jax.Array:
  """uint8 [B, h, w, C], or patches of it, → normalised: what every model but the tokenizer takes."""
  return normalize(unit_images(images), *statistics(config))
