"""The teacher that a recipe names: one of models/teacher.py, or a stage that was trained here."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.kernels.functions import normalize_layer
from beitv2_jax.models import from_config, teacher
from beitv2_jax.models.images import normalize, statistics
from beitv2_jax.weights import adapt, stages


def opened(config: Any, dtype: str, abstract: bool = False) -> tuple[teacher.Teacher, Any]:
  """(teacher, its weights) of `config.teacher`, on the patch grid of `config`. With `abstract` the weights are shapes."""
  kind, name, layers = config.teacher.kind, config.teacher.name, tuple(config.teacher.get('layers', ()))
  if kind == 'stage' and not abstract:
    return of_stage(name, config_lib.patch_grid(config), dtype, layers)
  if kind == 'python':
    return of_file(name, config, dtype)
  find = teacher.abstract if abstract else teacher.load
  return find('clip' if kind == 'stage' else kind, name, config_lib.patch_grid(config), jnp.dtype(dtype), layers)


def of_file(path: str, config: Any, dtype: str) -> tuple[teacher.Teacher, Any]:
  """The teacher of a Python file of the user's: its function `load(grid, dtype)` gives (width, params, apply), as
  examples/teacher_of_your_own.py shows. Raises UserError if it does not."""
  grid, file = config_lib.patch_grid(config), Path(path).expanduser()
  if not file.is_file():
    raise UserError(f'teacher.name={path}: no such file; teacher.kind=python takes a Python file with a function load(grid, dtype).')
  try:
    spec: Any = importlib.util.spec_from_file_location('teacher_of_the_user', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    width, params, apply = module.load(grid, jnp.dtype(dtype))
    image = jax.ShapeDtypeStruct((2, *config_lib.image_shape(config)), jnp.float32)
    shape = jax.eval_shape(apply, params, image).shape
  except Exception as e:  # whatever the user's file does
    raise UserError(f'the teacher in {file} does not work ({type(e).__name__}: {(str(e).splitlines() or [""])[0][:200]}).') from e
  if shape != (2, grid[0] * grid[1], width):
    raise UserError(f'the teacher in {file} gives features of shape {shape} for 2 images; expected {(2, grid[0] * grid[1], width)}.')
  return teacher.Teacher(width, apply), jax.tree.map(np.asarray, params)


def of_stage(workdir: str, grid: tuple[int, int], dtype: str, layers: tuple[int, ...] = ()) -> tuple[teacher.Teacher, Any]:
  """The encoder of a tokenizer, or the backbone of a pretrained or fine-tuned model: its patch tokens after the last norm.

  With `layers` the mean of these blocks, each through that norm. Raises UserError for a workdir that holds no such model.
  """
  config, variables, _ = stages.load_variables(workdir, 'the workdir of a tokenizer, or of a pretrained or fine-tuned model')
  if config.task not in ('tokenizer', 'pretrain', 'classifier'):
    raise UserError(f'teacher.name={workdir} holds a {config.task} stage; a tokenizer, a pretrained or a fine-tuned model can teach.')
  tokenizer = config.task == 'tokenizer'
  sizes = config.model.encoder if tokenizer else config.model
  if layers and not (1 <= min(layers) and max(layers) <= sizes.depth):
    raise UserError(f'teacher.layers={layers}: the model in {workdir} has blocks 1 to {sizes.depth}.')
  here, patch = config_lib.patch_grid(config), config.model.patch_size
  params = variables['params'] if here == grid else adapt.fit_grid(variables['params'], here, grid)
  config = config.copy_and_resolve_references().unlock()
  config.dtype, config.layers.attention = dtype, 'auto'
  with config.data.ignore_type():  # a side, or a pair
    config.data.image_size = (grid[0] * patch, grid[1] * patch)
  module, taps = from_config.build(config), layers or (sizes.depth,)
  frozen = {k: v for k, v in variables.items() if k not in ('params', 'ema')} | {'params': jax.tree.map(np.asarray, params)}
  mean, std = statistics(config)

  def apply(frozen, images):
    x = teacher.resized(images, (grid[0] * patch, grid[1] * patch))
    if tokenizer:
      _, states, _ = module.apply(frozen, 2 * x - 1, taps, method='encoder_states')
      norm = frozen['params']['encoder']['norm']
    else:
      _, states, _ = module.apply(frozen, normalize(x, mean, std), taps=taps, method='tokens')
      norm = frozen['params'].get('norm') or frozen['params']['fc_norm']
    return jnp.stack(
      [normalize_layer(states[i][:, 1:].astype(jnp.float32), norm['scale'], norm['bias'], jnp.float32)[1] for i in taps]
    ).mean(0)

  return teacher.Teacher(sizes.width, apply), frozen
