"""Stage 2, masked image modelling on a tokenizer's codes with patch aggregation (paper sections 2.2 and 2.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from beitv2_jax import config as config_lib
from beitv2_jax.data import augment
from beitv2_jax.data.masking import BlockMask, RandomMask
from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.images import network_images, vqkd_images
from beitv2_jax.models.layers import cut_pixels
from beitv2_jax.models.mim import MIM, mask_from_index
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import tokenizer
from beitv2_jax.tasks.base import Task


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  vqkd, frozen, theirs = tokenizer.of_stage(config, abstract)
  if theirs.model.patch_size != config.model.patch_size:
    raise UserError(
      f'the tokenizer in {config.tokenizer_from} has patches of {theirs.model.patch_size} px, this model of {config.model.patch_size}; make '
      f'model.patch_size {theirs.model.patch_size}.'
    )
  check(config)
  config.model.vocab = theirs.model.codes
  return PretrainTask(config, from_config.build(config), vqkd), frozen


def check(config: Any) -> None:
  """What a student needs whatever it predicts. Raises UserError."""
  grid = config_lib.patch_grid(config)
  if config.mask.count >= grid[0] * grid[1] or config.mask.count < 1:
    raise UserError(f'mask.count={config.mask.count} of {grid[0] * grid[1]} patches: it must leave some to see and some to predict.')
  if config.color_jitter_on not in ('host', 'device'):
    raise UserError(
      f"color_jitter_on={config.color_jitter_on!r}; use 'host' (before the crop, as the official code) or 'device' (after it)."
    )
  if config.model.head_layers and not 0 < config.model.early_layer < config.model.depth:
    raise UserError(f'model.early_layer={config.model.early_layer} must be a block before the last of {config.model.depth}.')


def host_transforms(config: Any, train: bool, source: Any) -> list:
  """Crop, flip, jitter, and a mask."""
  m, grid = config.mask, config_lib.patch_grid(config)
  block = BlockMask(grid, m.count, m.min_block, m.max_block, m.min_aspect)
  mask = RandomMask(grid, m.count) if m.get('kind', 'block') == 'random' else block
  return [*image_transforms(config.data, train, config.color_jitter, config.color_jitter_on == 'device'), mask]


@dataclasses.dataclass(frozen=True)
class PretrainTask(Task):
  config: Any
  model: MIM
  tokenizer: VQKD
  title = 'masked image modelling (BEiT v2)'
  headline = ('mim_acc_1', 'mim_acc_2')

  def init(self, key):
    return from_config.init(self.model, self.config, key)

  transforms = staticmethod(host_transforms)

  def _forward(self, params, frozen, batch, **kwargs):
    """Per branch: cross-entropy [B, M] and whether the code was right [B, M]."""
    images = augment.color_jitter(batch['image'], batch['jitter'], batch['jitter_order']) if 'jitter' in batch else batch['image']
    images, index = cut_pixels(images, self.config.model.patch_size), batch['mask_index']
    if 'codes' in batch:  # made beforehand or, in costs/estimate.py, to look at the student alone
      labels = jnp.take_along_axis(batch['codes'], index, 1)
    else:
      labels = self.tokenizer.apply(frozen, vqkd_images(images), index, method='tokens')
    images = network_images(images, self.config)
    losses, hits = self.model.apply({'params': params}, images, index=index, labels=labels, **kwargs)
    names = [str(i + 1) for i in range(len(losses))]
    return {f'loss_{n}': x for n, x in zip(names, losses)}, {f'mim_acc_{n}': 100 * x for n, x in zip(names, hits)}

  def loss(self, params, model_state, frozen, batch, key):
    losses, hits = self._forward(params, frozen, batch, train=True, rngs={'drop_path': key})
    losses, hits = jax.tree.map(jnp.mean, (losses, hits))
    return sum(losses.values()), ({}, losses | hits)

  def samples(self, params, model_state, frozen, batch):
    images, grid = batch['image'], config_lib.patch_grid(self.config)
    mask = mask_from_index(batch['mask_index'], grid[0] * grid[1])
    codes = self.tokenizer.apply(frozen, vqkd_images(images), method='tokens')
    predicted = self.model.apply({'params': params}, network_images(images, self.config), mask)[-1].argmax(-1)
    shaped = {k: v.reshape(-1, *grid) for k, v in dict(mask=mask, codes=codes, predicted=predicted).items()}
    return shaped | dict(image=images)

  def evaluate(self, params, model_state, frozen, batch):
    losses, hits = self._forward(params, frozen, batch)
    return {k: v.mean(-1) for k, v in (losses | hits).items()}
