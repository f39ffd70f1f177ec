"""How many images/s this host prepares: stage by stage on one core, then through the pipeline as training would run it; and whether
the input or the training step will be the bottleneck on the accelerators it knows.
"""

import functools
import math
import os
import time

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.costs import flops
from beitv2_jax.data import decode, pipeline, sources, transforms
from beitv2_jax.data.masking import BlockMask

# Peak bf16 TFLOP/s of a chip and chips on a usual host, from the makers' data sheets.
CHIPS = {'TPU v4': (275, 4), 'TPU v5e': (197, 8), 'TPU v5p': (459, 4), 'TPU v6e': (918, 8), 'A100': (312, 8), 'H100': (989, 8)}
UTILIZATION = 0.5  # assumed share of peak


def host_transforms(config) -> list:
  """What the config's task does to a record on the host, without opening its teacher or tokenizer."""
  steps = transforms.image_transforms(config.data, True, config.get('color_jitter', 0.0), config.get('color_jitter_on', '') == 'device')
  if 'mask' in config:
    m = config.mask
    steps.append(BlockMask(config_lib.patch_grid(config), m.count, m.min_block, m.max_block, m.min_aspect))
  return steps


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
  steps, workers = host_transforms(config), config.data.workers
  spent = stages(source, steps, count, config_lib.reading(config))
  total = sum(spent.values())
  lines = [f'{config.data.source}: {len(source):,} images, {os.cpu_count()} cores', '', 'stage               ms an image   share']
  lines += [f'{name:20s}{seconds * 1e3:11.3f}{100 * seconds / total:7.0f} %' for name, seconds in spent.items()]
  lines += [f'{"together":20s}{total * 1e3:11.3f}   = {1 / total:,.0f} images/s a core', '']
  rate, first, cpu = through_pipeline(source, steps, config, count)
  decoders = f'{workers} processes' if workers > 0 else 'threads' if workers == 0 else 'the calling thread'
  here = f', {1e3 * cpu:.2f} ms of CPU an image here' if workers <= 0 else ''
  lines += [f'pipeline with {decoders} (data.workers={workers}): {rate:,.0f} images/s; first batch after {first:.1f} s{here}']
  return '\n'.join(lines + accelerators(config, rate, total))


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
