"""How many images/s this host prepares: stage by stage on one core, then through the pipeline as training would run it; and whether
the input or the training step will be the bottleneck on the accelerators it knows.
"""

import functools
import math
import os
import time

import jax
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax import tasks
from beitv2_jax.data import decode, pipeline, sources
from beitv2_jax.models import flops

# Chips on a usual host, and with what they reach at best (TFLOP/s).
HOSTS = {'TPU v4': 4, 'TPU v5e': 8, 'TPU v5p': 4, 'TPU v6e': 8, 'A100': 8, 'H100': 8}
CHIPS = {name: (flops.PEAKS[name.lower()], chips) for name, chips in HOSTS.items()}
UTILIZATION = 0.5  # assumed share of peak


def stages(source, steps: list, count: int, reading: dict) -> dict[str, float]:
  """CPU seconds an image of every stage, one after the other on one core."""
  rng, spent = np.random.default_rng(0), {}
  order = rng.permutation(len(source))

  def timed(name, function, *args):
    start = time.thread_time()
    out = function(*args)
    spent[name] = spent.get(name, 0.0) + (time.thread_time() - start) / count
    return out

  done = []
  for i in range(count):
    try:
      record = timed('read', source.__getitem__, int(order[i % len(order)]))
      record = record | dict(image=timed('decode', functools.partial(decode.image, **reading), record['image']))
      if 'mask' in record:
        record['mask'] = timed('decode', decode.mask, record['mask'])
    except decode.UNDECODABLE:  # training would step over it
      continue
    for step in steps:
      record = timed(type(step).__name__, step, record, rng)
    done.append(record['image'])
    if len(done) == 64:
      timed('batch', np.stack, done)
      done = []
  return spent


def through_pipeline(source, steps: list, config, count: int) -> tuple[float, float, float]:
  """(images/s, seconds to the first batch, CPU seconds an image in this process) of the pipeline as training runs it."""
  batch = min(64, config.batch_size)
  start = time.monotonic()
  batches = pipeline.train_batches(
    source, steps, seed=0, batch=batch, workers=config.data.workers, max_bad=1.0, reading=config_lib.reading(config)
  )
  next(batches)
  first = time.monotonic() - start
  for _ in range(3):
    next(batches)
  start, cpu = time.monotonic(), time.process_time()
  rounds = max(count // batch, 1)
  for _ in range(rounds):
    next(batches)
  elapsed, cpu = time.monotonic() - start, time.process_time() - cpu
  batches.close()
  return rounds * batch / elapsed, first, cpu / (rounds * batch)


def report(config, count: int) -> str:
  """All of it in words. `count` images are timed."""
  source = sources.make(config.data.source, 'train', config.data.dir, config.data.holdout)
  steps, workers = list(tasks.host_transforms(config, source)), config.data.workers
  spent = stages(source, steps, count, config_lib.reading(config))
  total = sum(spent.values())
  lines = [f'{config.data.source}: {len(source):,} images, {os.cpu_count()} cores', '', 'stage               ms an image   share']
  lines += [f'{name:20s}{seconds * 1e3:11.3f}{100 * seconds / total:7.0f} %' for name, seconds in spent.items()]
  lines += [f'{"together":20s}{total * 1e3:11.3f}   = {1 / total:,.0f} images/s a core', '']
  rate, first, cpu = through_pipeline(source, steps, config, count)
  decoders = f'{workers} processes' if workers > 0 else 'threads' if workers == 0 else 'the calling thread'
  here = f', {1e3 * cpu:.2f} ms of CPU an image here' if workers <= 0 else ''
  lines += [f'pipeline with {decoders} (data.workers={workers}): {rate:,.0f} images/s; first batch after {first:.1f} s{here}']
  return '\n'.join([*lines, *accelerators(config, rate, total), '', advice(config, rate, spent)])


def advice(config, rate: float, spent: dict[str, float]) -> str:
  """A closing sentence: is it enough for the devices of this machine (without any: for a host of TPU v5e), and what helps most."""
  total, cores, workers = sum(spent.values()), os.cpu_count() or 1, config.data.workers
  share = {name: seconds / total for name, seconds in spent.items()}
  helps = []
  if rate < 0.7 * cores / total:
    helps.append(f'--config.data.workers={cores}, processes instead of threads' if workers <= 0 else f'--config.data.workers={cores}')
  if share.get('decode', 0) + share.get('RandomResizedCrop', 0) > 0.5 and not config.data.source.startswith('fake'):
    helps.append('python -m beitv2_jax prepare SOURCE --short-side 256, smaller images to decode')
  if share.get('read', 0) > 0.25:
    helps.append('python -m beitv2_jax prepare SOURCE, array_record shards')
  if share.get('ColorJitter', 0) > 0.1:
    helps.append('--config.color_jitter_on=device')
  helps.append('more cores a chip')
  chip, need = _this_machine(config)
  if not need:
    return f'What would make the input faster, most first: {"; ".join(helps)}.'
  if rate >= need:
    return f'Enough for {chip}: {rate:,.0f} images/s, and its steps take {need:,.0f}.'
  return f'Not enough for {chip}: {rate:,.0f} images/s of the {need:,.0f} that its steps take. What helps, most first: {"; ".join(helps)}.'


def _this_machine(config) -> tuple[str, float]:
  """(chips of this machine, or of a host of TPU v5e, images/s their steps take at UTILIZATION); 0 images/s for toys."""
  try:
    need = sum(flops.per_image(config).values())
  except ValueError:
    need = 0
  kind, count = jax.devices()[0].device_kind.replace(' lite', 'e'), jax.local_device_count()  # JAX's 'TPU v5 lite' is a v5e
  known = next((name for name in CHIPS if name.removeprefix('TPU ').lower() in kind.lower()), None)
  name = known or 'TPU v5e'
  peak, usual = CHIPS[name]
  chips = count if known else usual
  return f'{chips} x {name}{"" if known else " (no accelerator here)"}', chips * peak * 1e12 * UTILIZATION / need if need >= 1e9 else 0.0


def accelerators(config, rate: float, seconds: float) -> list[str]:
  """Lines that say which hosts `rate` images/s would feed. `seconds`: of one core, for an image."""
  try:
    need = sum(flops.per_image(config).values())
  except ValueError:  # no formula for this task
    return []
  if need < 1e9:
    return ['', 'The model of this config is a toy; without :smoke this would say whether the input keeps up with its training.']
  lines = [
    '',
    f'A training step takes {need / 1e9:,.0f} GFLOP an image. At {100 * UTILIZATION:.0f} % of peak (an assumption, not a measurement):',
    '',
    'host            step, images/s   input   cores needed at the one-core rate',
  ]
  for name, (peak, chips) in CHIPS.items():
    step = chips * peak * 1e12 * UTILIZATION / need
    verdict = 'keeps up' if rate >= step else 'is the bottleneck'
    lines.append(f'{chips} x {name:10s}{step:14,.0f}   {verdict:17s} {math.ceil(step * seconds):4d}')
  return lines
