"""What a run says of itself when it starts, and leaves in its workdir: sizes, data, devices, kernels, versions, and what has changed since it
was started last."""

import importlib.metadata
import math
import platform
from typing import Any

import jax
from clu import parameter_overview

from beitv2_jax import __version__, storage
from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention, chip, functions
from beitv2_jax.training import terminal
from beitv2_jax.training.metrics import Metrics
from beitv2_jax.training.setup import Setup
from beitv2_jax.training.train_state import StateLayout


def describe(setup: Setup, metrics: Metrics, start: int, notes: list[str]) -> None:
  """Leaves config.json and parameters.txt in the workdir, and says in the terminal what is about to happen."""
  config, workdir, params = setup.config, setup.workdir, setup.layout.abstract.params
  finished = 0 < setup.steps <= start and (workdir / 'config.json').exists()  # such a run is not changed any more
  if jax.process_index() == 0 and not finished:
    config_lib.save(config, workdir)
    storage.write(workdir / 'data.txt', '\n'.join(setup.understood) + '\n')
    storage.write(workdir / 'parameters.txt', parameter_overview.get_parameter_overview(params, include_stats=False) + '\n')
  images = len(setup.sources['train'])
  metrics.say(
    f'{workdir.name}: {setup.task.title}, {int(parameter_overview.count_parameters(params)):,} parameters; {setup.steps:,} steps of '
    f'{config.batch_size} images, {setup.steps * config.batch_size / images:,.1f} times over {images:,}; on {devices_in_words(setup.mesh)}, which each keep '
    f'{terminal.size(bytes_a_device(setup.layout))} of parameters and moments between steps'
  )
  if start:
    metrics.say(f'going on from step {start}')
  elif config.init_from:
    metrics.say(f'starting from the weights in {config.init_from}')
  for note in [*setup.understood, *notes]:
    metrics.say(note)


def versions() -> dict[str, str]:
  """What a run depends on for its numbers."""
  return dict(beitv2_jax=__version__, python=platform.python_version()) | {
    p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')
  }


def check_kernels(config: Any, metrics: Metrics) -> list[str]:
  """Holds our kernels for this chip to plain XLA, and says which are left alone."""
  attention.check(config_lib.head_dims(config) | ({64} if 'teacher' in config else set()))  # which nearly all teachers have
  functions.check()
  chip.agree()
  notes = [
    f'warning: our {kernel} does not work on this chip ({why}); taking plain XLA, which is slower, unless the config insists.'
    for kernel, why in chip.refused.items()
  ]
  for note in notes:
    metrics.say(note)
  return notes


def devices_in_words(mesh: Any) -> str:
  kind = jax.devices()[0].device_kind
  return f'{mesh.size} {"CPU" if kind == "cpu" else kind} device{"s" * (mesh.size > 1)}'


def device_memory() -> str:
  """'; at most 11.2 GiB of 15.7 GiB were in use on a device', where the device tells."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if not {'peak_bytes_in_use', 'bytes_limit'} <= stats.keys():
    return ''
  return f'; at most {terminal.size(stats["peak_bytes_in_use"])} of {terminal.size(stats["bytes_limit"])} were in use on a device'


def bytes_a_device(layout: StateLayout) -> int:
  """Of the state between steps, on the device that keeps most of it."""
  sizes = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, layout.abstract, layout.shardings)
  return sum(jax.tree.leaves(sizes))


def tokenizer_changes(log: list[dict], now: dict[str, int], config: Any) -> list[str]:
  """What to tell the user if the tokenizer is not the one that this run had when it was started last."""
  before = [e['tokenizer'] for e in log if e['event'] == 'started' and 'tokenizer' in e][-1:]
  if not now or not before or before[0] == now['tokenizer']:
    return []
  return [
    f'warning: the tokenizer in {config.tokenizer_from} has other weights than when this run was last started (was it trained on?), so codes mean '
    'something else from here on. tokenizer_from=WORKDIR@STEP keeps to one checkpoint.'
  ]


def config_changes(workdir: Any, config: Any) -> list[str]:
  """What to tell the user about settings that are not those the run began with."""
  try:
    former = config_lib.load(workdir)
  except UserError as e:
    return [f'warning: {e} It is written again.']
  before, now = tuple(former.get('class_names') or ()), tuple(config.get('class_names') or ())
  if before and now and before != now:
    place = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    names = ['/'.join(x[place : place + 1]) or 'nothing' for x in (before, now)]
    raise UserError(
      f'the run in {workdir} knows other classes, or the same in another order: class {place} was {names[0]}, in {config.data.source} it is {names[1]}. Give '
      'it the data it began with, or start in another workdir.'
    )
  changes = config_lib.changes(former, config)
  return [f'warning: the run began with another config; {change}' for change in changes]
