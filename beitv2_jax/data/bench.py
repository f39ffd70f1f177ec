"""python -m beitv2_jax.data.bench --config=configs/beitv2_b16.py [--config.data.source=folder:PATH ...]

How many images/s this host prepares: stage by stage on one core, then through the pipeline as training would run it; and
whether the input or the training step will be the bottleneck on the accelerators it knows.
"""

import math
import os
import time

import numpy as np
from absl import flags

from beitv2_jax import flops
from beitv2_jax.data import pipeline, sources, transforms
from beitv2_jax.errors import UserError
from beitv2_jax.main import entry, given_config

_IMAGES = flags.DEFINE_integer('images', 512, 'Images to time.')

# Peak bf16 TFLOP/s of a chip and chips on a usual host, from the makers' data sheets.
CHIPS = {'TPU v4': (275, 4), 'TPU v5e': (197, 8), 'TPU v5p': (459, 4), 'TPU v6e': (918, 8), 'A100': (312, 8), 'H100': (989, 8)}
UTILIZATION = 0.5  # assumed share of peak


def host_transforms(c) -> list:
  """What the config's task does to a record on the host, without opening its teacher or tokenizer."""
  steps = transforms.image_transforms(c.data, True, c.get('color_jitter', 0.0), c.get('color_jitter_on', '') == 'device')
  if 'mask' in c:
    from beitv2_jax import config as config_lib
    from beitv2_jax.data.masking import BlockMask

    m = c.mask
    steps.append(BlockMask(config_lib.patch_grid(c), m.count, m.min_block, m.max_block, m.min_aspect))
  return steps


def stages(source, steps: list, count: int) -> dict[str, float]:
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
      record = record | dict(image=timed('decode', transforms.decode, record['image']))
    except transforms.UNDECODABLE:  # training would step over it
      continue
    for step in steps:
      record = timed(type(step).__name__, step, record, rng)
    done.append(record['image'])
    if len(done) == 64:
      timed('batch', np.stack, done)
      done = []
  return spent


def through_pipeline(source, steps: list, c, count: int) -> tuple[float, float, float]:
  """(images/s, seconds to the first batch, CPU seconds an image in this process) of the pipeline as training runs it."""
  batch = min(64, c.batch_size)
  start = time.monotonic()
  batches = pipeline.train_batches(source, steps, seed=0, batch=batch, workers=c.data.workers, max_bad=1.0)
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


def main(_) -> None:
  c, count = given_config(), _IMAGES.value
  if count < 64:
    raise UserError(f'--images={count}: at least 64.')
  source = sources.make(c.data.source, 'train', c.data.dir, c.data.holdout)
  steps = host_transforms(c)
  spent = stages(source, steps, count)
  total = sum(spent.values())
  print(f'{c.data.source}: {len(source):,} images, {os.cpu_count()} cores\n\nstage               ms an image   share')
  for name, seconds in spent.items():
    print(f'{name:20s}{seconds * 1e3:11.3f}{100 * seconds / total:7.0f} %')
  print(f'{"together":20s}{total * 1e3:11.3f}   = {1 / total:,.0f} images/s a core\n')
  rate, first, cpu = through_pipeline(source, steps, c, count)
  how = f'{c.data.workers} processes' if c.data.workers > 0 else 'threads' if c.data.workers == 0 else 'the calling thread'
  here = f', {1e3 * cpu:.2f} ms of CPU an image here' if c.data.workers <= 0 else ''
  print(f'pipeline with {how} (data.workers={c.data.workers}): {rate:,.0f} images/s; first batch after {first:.1f} s{here}\n')
  try:
    need = sum(flops.per_image(c).values())
  except ValueError:
    return
  if need < 1e9:
    return print('The model of this config is a toy; without :smoke this would say whether the input keeps up with its training.')
  print(
    f'A training step takes {need / 1e9:,.0f} GFLOP an image. At {100 * UTILIZATION:.0f} % of peak (an assumption, not a measurement):\n'
  )
  print('host            step, images/s   input   cores needed at the one-core rate')
  for name, (peak, chips) in CHIPS.items():
    step = chips * peak * 1e12 * UTILIZATION / need
    verdict = 'keeps up' if rate >= step else 'is the bottleneck'
    print(f'{chips} x {name:10s}{step:14,.0f}   {verdict:17s} {math.ceil(step * total):4d}')


if __name__ == '__main__':
  entry(main)
