"""Controls for stage 2: the same student, masks, recipe and number of steps, but something else than codes to predict at masked patches.

| `target`   | what is predicted                                                           | loss                                      |
|------------|-----------------------------------------------------------------------------|-------------------------------------------|
| `features` | the teacher's features, as MVP (arXiv 2203.05175) and others do             | 1 - cosine, VQ-KD's own                   |
| `pixels`   | each patch less its mean, over its standard deviation, as MAE (arXiv 2111.06377) does | squared error                   |

So what codes gain is the codebook's, not the recipe's. Where the student has patch aggregation, both branches predict.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from beitv2_jax.data import augment
from beitv2_jax.models import from_config, quantizer, teacher
from beitv2_jax.models.images import network_images, unit_images
from beitv2_jax.models.layers import patches
from beitv2_jax.models.mim import MIM
from beitv2_jax.tasks import teachers
from beitv2_jax.tasks.base import Task
from beitv2_jax.tasks.pretrain import check, host_transforms


def make(config: Any, abstract: bool = False) -> tuple[Task, Any]:
  check(config)
  if config.target == 'pixels':
    config.model.vocab = 3 * config.model.patch_size**2
    return RegressTask(config, from_config.build(config), None), {}
  opened, frozen = teachers.opened(config, config.tokenizer_dtype, abstract)
  config.model.vocab = opened.width
  return RegressTask(config, from_config.build(config), opened), frozen


@dataclasses.dataclass(frozen=True)
class RegressTask(Task):
  config: Any
  model: MIM
  teacher: teacher.Teacher | None  # None: pixels

  title = 'masked image modelling (regression)'

  def init(self, key):
    return from_config.init(self.model, self.config, key)

  transforms = staticmethod(host_transforms)

  def _target(self, frozen, images):
    """What every patch is, [B, N, V]."""
    if self.teacher is not None:
      return quantizer.l2norm(self.teacher.apply(frozen, unit_images(images)).astype(jnp.float32))
    return normalized_patches(unit_images(images), self.config.model.patch_size)

  def _forward(self, params, frozen, batch, **kwargs):
    """Per branch: the loss [B, M] at masked patches."""
    images = augment.color_jitter(batch['image'], batch['jitter'], batch['jitter_order']) if 'jitter' in batch else batch['image']
    target = jnp.take_along_axis(self._target(frozen, images), batch['mask_index'][..., None], 1)
    predicted = self.model.apply({'params': params}, network_images(images, self.config), index=batch['mask_index'], **kwargs)
    if self.teacher is not None:
      losses = [1 - (quantizer.l2norm(x.astype(jnp.float32)) * target).sum(-1) for x in predicted]
    else:
      losses = [((x.astype(jnp.float32) - target) ** 2).mean(-1) for x in predicted]
    return {f'loss_{i + 1}': loss for i, loss in enumerate(losses)}

  def loss(self, params, model_state, frozen, batch, key):
    losses = jax.tree.map(jnp.mean, self._forward(params, frozen, batch, train=True, rngs={'drop_path': key}))
    return sum(losses.values()), ({}, losses)

  def evaluate(self, params, model_state, frozen, batch):
    return {k: v.mean(-1) for k, v in self._forward(params, frozen, batch).items()}


def normalized_patches(images: jax.Array, size: int) -> jax.Array:
  """[B, h, w, 3] → [B, N, size*size*3], each patch less its mean, over its standard deviation (plus 1e-6 under the root, as MAE)."""
  x = patches(images, size)
  n = x.shape[-1]
  return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) * (n / (n - 1)) + 1e-6)
