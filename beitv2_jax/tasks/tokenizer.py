"""Stage 1, VQ-KD: learn a visual tokenizer from a frozen teacher (paper section 2.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import taught
from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config, quantizer, teacher
from beitv2_jax.models.images import unit_images, vqkd_images
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import teachers
from beitv2_jax.tasks.base import Task
from beitv2_jax.tasks.scores import code_statistics
from beitv2_jax.weights import stages


def released(dtype: str) -> tuple[VQKD, Any, Any]:
  """(module, abstract variables, config) of the released tokenizer's size, for programs that are compiled without being run."""
  config = config_lib.base('tokenizer').unlock()
  config.update(model=config_lib.tokenizer_model(teacher_width=512), dtype=dtype)
  return from_config.build(config), from_config.abstract_variables(config), config


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  if config.codebook.revive > 0 and config.model.quantizer != 'ema':
    raise UserError(
      f'codebook.revive moves codes of an ema codebook; those of model.quantizer={config.model.quantizer} are not moved one by one.'
    )
  if config.teacher.kind == 'disk':
    about = taught.describe(config.teacher.name)
    if tuple(about['grid']) != config_lib.patch_grid(config):
      raise UserError(
        f'the features in {config.teacher.name} are on a grid of {about["grid"]}, this tokenizer has {config_lib.patch_grid(config)}: teach with its image '
        'size and patches.'
      )
    theirs = about.get('crop_pct', config.data.crop_pct)  # files of other programs need not say
    if theirs != config.data.crop_pct:
      raise UserError(
        f'the features in {config.teacher.name} are of a centre crop with data.crop_pct={theirs}, this tokenizer sees {config.data.crop_pct}: make them equal.'
      )
    config.model.teacher_width = about['width']
    return TokenizerTask(config, from_config.build(config), None), {}
  teacher_model, frozen = teachers.opened(config, config.dtype, abstract)
  config.model.teacher_width = teacher_model.width  # so that config.json describes the whole model
  return TokenizerTask(config, from_config.build(config), teacher_model), frozen


def load(workdir: str, dtype: str) -> tuple[VQKD, Any, Any]:
  """(module, variables, config) of a trained tokenizer, its size from that workdir's own config."""
  if not workdir:
    raise UserError('tokenizer_from is empty: give the workdir of a trained tokenizer, --config.tokenizer_from=WORKDIR.')
  if workdir == 'untrained':  # tiny and random, for smoke tests
    config = config_lib.base('tokenizer').unlock()
    config.update(model=config_lib.tiny_tokenizer(), dtype=dtype, quick_compile=True)
    config.model.teacher_width, config.data.image_size = 8, 32
    return from_config.build(config), jax.tree.map(np.asarray, from_config.fresh_variables(config)), config
  config, variables, _ = stages.load_variables(workdir, 'the workdir of a trained tokenizer')
  if config.task != 'tokenizer':
    raise UserError(f'{workdir} holds a {config.task} stage, not a tokenizer; give the workdir of configs/vqkd_*.py.')
  config.dtype, config.layers.attention = dtype, 'auto'
  return from_config.build(config), variables, config


def of_stage(config: Any, abstract: bool) -> tuple[VQKD, Any, Any]:
  """What `load` gives for the tokenizer that a later stage's config names; with `abstract` the released one's shapes."""
  return released(config.tokenizer_dtype) if abstract else load(config.tokenizer_from, config.tokenizer_dtype)


@dataclasses.dataclass(frozen=True)
class TokenizerTask(Task):
  config: Any
  model: VQKD
  teacher: teacher.Teacher | None  # None: its features come with the batch
  title = 'a visual tokenizer (VQ-KD)'
  headline = ('perplexity', 'dead_codes')

  def init(self, key):
    return from_config.init(self.model, self.config, key)

  @staticmethod
  def transforms(config, train, source):
    # Features that were made beforehand are of the centre crop.
    return image_transforms(config.data, train and config.teacher.kind != 'disk')

  def warm_start(self, params, model_state, frozen, batch, key):
    if not self.config.codebook.kmeans or self.config.model.quantizer == 'fsq':  # whose codes are fixed
      return model_state
    z = self.model.apply({'params': params, **model_state}, vqkd_images(batch['image']), method='encode')
    means, counts = quantizer.kmeans_start(key, z.reshape(-1, z.shape[-1]), self.config.model.codes, self.config.codebook.kmeans_samples)
    book = model_state['codebook']['quantizer'] | dict(embedding=means, cluster_size=counts)
    return {'codebook': {'quantizer': book | (dict(base=means) if 'base' in book else {})}}

  def _forward(self, variables, frozen, batch):
    if self.teacher is None:
      target = jax.lax.bitcast_convert_type(batch['teacher'], jnp.bfloat16).astype(jnp.float32)
    else:
      target = self.teacher.apply(frozen, unit_images(batch['image'])).astype(jnp.float32)
    out = self.model.apply(variables, vqkd_images(batch['image']))
    cosine = (quantizer.l2norm(out['features']) * quantizer.l2norm(target)).sum(-1)
    return out, 1 - cosine

  def loss(self, params, model_state, frozen, batch, key):
    out, distance = self._forward({'params': params, **model_state}, frozen, batch)
    rec_loss, quant_loss = distance.mean(), self.config.codebook.beta * out['commitment']
    stats = {k: jax.lax.stop_gradient(out[k]) for k in ('counts', 'sums', 'z')}
    return rec_loss + quant_loss, (stats, dict(rec_loss=rec_loss, quant_loss=quant_loss))

  def update(self, model_state, stats, key, params):
    counts, revival = stats['counts'].sum(0), self.config.codebook.revive
    book = quantizer.update(
      model_state['codebook']['quantizer'],
      counts,
      stats['sums'].sum(0),
      self.config.model.decay,
      params.get('quantizer', {}).get('projection'),
    )
    metrics = code_statistics(counts) | dict(dead_codes=100 * quantizer.dead(book['usage']).mean())
    if revival > 0:
      embedding, usage = quantizer.revive(key, book['embedding'], book['usage'], stats['z'], revival)
      book = book | dict(embedding=embedding, usage=usage)
    return {'codebook': {'quantizer': book}}, metrics

  def warning(self, step, values):
    if step < 500 or values['dead_codes'] < 30:
      return None
    return (
      f'{values["dead_codes"]:.0f} % of the codes are dead: the codebook is collapsing. Fewer codes (model.codes), more images or a larger batch '
      'help; codebook.revive=0.01 moves dead codes onto tokens of the batch (configs/vqkd_b16.py:small_data).'
    )

  def evaluate(self, params, model_state, frozen, batch):
    out, distance = self._forward({'params': params, **model_state}, frozen, batch)
    histogram = jax.nn.one_hot(out['codes'], self.config.model.codes).sum(1)
    return dict(rec_loss=distance.mean(-1), histogram=histogram)

  def samples(self, params, model_state, frozen, batch):
    out, distance = self._forward({'params': params, **model_state}, frozen, batch)
    grid = config_lib.patch_grid(self.config)
    return dict(image=batch['image'], codes=out['codes'].reshape(-1, *grid), distance=distance.reshape(-1, *grid))

  def summarize(self, means):
    return dict(rec_loss=float(means['rec_loss']), **{k: float(v) for k, v in code_statistics(means['histogram']).items()})
