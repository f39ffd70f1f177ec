"""A decoder of a frozen tokenizer's codes to pixels, for looking only.

The loss is the mean absolute error: squared error draws blurrier pictures, and a perceptual loss would need one more network to fetch.
With `shuffled` the decoder gets the codes of another image of the batch: the control, which can learn no more than what images look like on
average.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from beitv2_jax import config as config_lib
from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.images import unit_images, vqkd_images
from beitv2_jax.models.pixels import PixelDecoder
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import tokenizer
from beitv2_jax.tasks.base import Task
from beitv2_jax.tasks.scores import psnr, ssim


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  vqkd, frozen, theirs = tokenizer.of_stage(config, abstract)
  config.model.update({k: theirs.model[k] for k in ('patch_size', 'codes', 'code_dim')})
  side = config_lib.image_shape(config)[:2]
  if any(length % theirs.model.patch_size for length in side):
    raise UserError(
      f'data.image_size={config.data.image_size} is not a multiple of the patch size of the tokenizer, {theirs.model.patch_size}.'
    )
  if config.shuffled and config.batch_size < 2:
    raise UserError('shuffled takes the codes of another image of the batch: give batch_size of at least 2.')
  return PixelsTask(config, from_config.build(config), vqkd), frozen


@dataclasses.dataclass(frozen=True)
class PixelsTask(Task):
  config: Any
  model: PixelDecoder
  tokenizer: VQKD
  title = 'a decoder of codes to pixels'
  headline = ('psnr',)

  def init(self, key):
    return from_config.init(self.model, self.config, key)

  @staticmethod
  def transforms(config, train, source):
    return image_transforms(config.data, train)

  def warm_start(self, params, model_state, frozen, batch, key):
    return {'codebook': {'embedding': frozen['codebook']['quantizer']['embedding']}}

  def _forward(self, variables, frozen, batch):
    codes = self.tokenizer.apply(frozen, vqkd_images(batch['image']), method='tokens')
    codes = jnp.roll(codes, 1, 0) if self.config.shuffled else codes
    return self.model.apply(variables, codes), unit_images(batch['image'])

  def loss(self, params, model_state, frozen, batch, key):
    drawn, images = self._forward({'params': params, **model_state}, frozen, batch)
    return jnp.abs(drawn - images).mean(), ((), dict(psnr=psnr(drawn, images).mean()))

  def evaluate(self, params, model_state, frozen, batch):
    drawn, images = self._forward({'params': params, **model_state}, frozen, batch)
    return dict(l1=jnp.abs(drawn - images).mean((1, 2, 3)), psnr=psnr(drawn, images), ssim=ssim(drawn, images))

  def samples(self, params, model_state, frozen, batch):
    return dict(image=batch['image'], drawn=self._forward({'params': params, **model_state}, frozen, batch)[0])

  def adopt(self, theirs, variables, fresh):
    if theirs.task == 'pixels' and theirs.tokenizer_from != self.config.tokenizer_from:  # its codebook comes along
      raise UserError(
        f'init_from draws the codes of {theirs.tokenizer_from}, not of {self.config.tokenizer_from}: give the same tokenizer_from.'
      )
    return super().adopt(theirs, variables, fresh)
