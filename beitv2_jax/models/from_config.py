"""The Flax module that a config describes, and its variables: the one way from config.json to a model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beitv2_jax import compiler
from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.initializers import drawn_together
from beitv2_jax.models.layers import Execution
from beitv2_jax.models.mim import MIM
from beitv2_jax.models.pixels import PixelDecoder
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.models.vqkd import VQKD


def _tokenizer(model: Any, **common: Any) -> VQKD:
  sizes = {f'{side}_{k}': model[side][k] for side in ('encoder', 'decoder') for k in ('width', 'depth', 'heads')}
  names = ('patch_size', 'codes', 'code_dim', 'teacher_width', 'mlp_ratio', 'init_scheme')
  chosen = dict(
    quantizer_kind=model.get('quantizer', 'ema'), gradient=model.get('gradient', 'straight_through'), levels=tuple(model.get('levels', ()))
  )
  return VQKD(**{k: model[k] for k in names}, **chosen, **sizes, **common)


def _segmenter(model: Any, **common: Any) -> Segmenter:
  fields = model.to_dict()
  fields |= {k: tuple(fields[k]) for k in ('out_indices', 'pool_scales') if k in fields}  # JSON made them lists
  return Segmenter(**fields, **common)


BUILDERS = {
  'tokenizer': _tokenizer,
  'pretrain': lambda model, **common: MIM(**model.to_dict(), **common),
  'classifier': lambda model, **common: Classifier(**model.to_dict(), **common),
  'segmenter': _segmenter,
  'pixels': lambda model, **common: PixelDecoder(**model.to_dict(), **common),
}


def build(config: Any) -> Any:
  """The module of a stage's config. Raises UserError for stages that leave no such model."""
  if config.task not in BUILDERS:
    raise UserError(f'a {config.task} stage has no model to load here; use the workdir of one of {", ".join(BUILDERS)}.')
  execution = Execution(**config_lib.layers(config))
  return BUILDERS[config.task](config.model, grid=config_lib.patch_grid(config), dtype=jnp.dtype(config.dtype), execution=execution)


def init(module: Any, config: Any, key: jax.Array) -> Any:
  """Fresh variables, in Flax's boxes with logical axis names: {'params': ..., other collections}. To be jitted."""
  rows, cols = config_lib.patch_grid(config)
  codes_in = config.task == 'pixels'
  example = jnp.zeros((1, rows * cols), jnp.int32) if codes_in else jnp.zeros((1, *config_lib.image_shape(config)))
  return drawn_together(lambda key: module.init(key, example), key)


def fresh_variables(config: Any, seed: int = 0) -> Any:
  """Fresh variables of a config's model on the default device, without boxes."""
  module = build(config)
  fresh = jax.jit(lambda key: nn.unbox(init(module, config, key)), compiler_options=compiler.options(config, runs_once=True))
  return fresh(jax.random.key(seed))


def abstract_variables(config: Any) -> Any:
  """Shapes and types of a config's variables, without boxes."""
  module = build(config)
  return jax.eval_shape(lambda: nn.unbox(init(module, config, jax.random.key(0))))
