"""What a run is made of, opened and planned before anything is written."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from beitv2_jax import config as config_lib
from beitv2_jax import tasks
from beitv2_jax.data import sources
from beitv2_jax.training import optim, sharding, trackers
from beitv2_jax.training.train_state import StateLayout, state_layout


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run is made of and does not change."""

  config: Any
  workdir: Any
  task: tasks.Task
  frozen: Any  # weights that are used and not trained, as numpy arrays
  sources: dict[str, Any]  # of 'train' and 'eval'
  transforms: dict[str, Any]
  steps: int
  mesh: Any
  optimizer: Any
  schedule: Callable
  layout: StateLayout
  understood: list[str]  # what the data are taken to be
  began: float  # time.monotonic() when it was prepared
  init_key: jax.Array
  warm_start_key: jax.Array
  step_key: jax.Array


def planned_steps(config: Any, images: int) -> tuple[int, int]:
  """(total, warmup) steps of a config for a data set of `images`."""
  per_epoch = max(images // config.batch_size, 1)
  steps = config.steps if config.steps >= 0 else round(config.epochs * per_epoch)
  optim_config = config.optim
  return steps, optim_config.warmup_steps if optim_config.warmup_steps >= 0 else round(optim_config.warmup_epochs * per_epoch)


def prepare(config: Any, workdir: Any) -> Setup:
  """Opens data, task and mesh, and plans where the state will lie. Writes nothing. Raises UserError for bad input."""
  began = time.monotonic()
  config_lib.check(config)
  trackers.check(config.get('track', ''))
  opened = {split: sources.make(config.data.source, split, config.data.dir, config.data.holdout) for split in ('train', 'eval')}
  opened = tasks.sources_of(config, opened)
  if 0 < config.data.get('limit', 0) < len(opened['train']):
    opened['train'] = sources.limited(opened['train'], config.data.limit)
  task, frozen = tasks.make(config, source=opened['train'])
  understood = task.look_at(opened)
  transforms = {split: task.transforms(task.config, split == 'train', opened[split]) for split in opened}
  steps, warmup = planned_steps(config, len(opened['train']))
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
  optimizer, schedule = optim.make(config.optim, steps, warmup)
  # Made on the mesh: a key on one device would have to move to the others in every step.
  make_keys = jax.jit(lambda: tuple(jax.random.split(jax.random.key(config.seed), 3)), out_shardings=sharding.replicated(mesh))
  layout = state_layout(task, optimizer, mesh, config)
  return Setup(config, workdir, task, frozen, opened, transforms, steps, mesh, optimizer, schedule, layout, understood, began, *make_keys())
