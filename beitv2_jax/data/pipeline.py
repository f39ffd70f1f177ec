"""Batches through Grain. The position in the data is the global step, and nothing else.

Batch k of a run holds records [kB, (k+1)B) of one seeded, shuffled, repeated data set; process p of P makes its part
number kP + p. A record's augmentation is drawn from a generator keyed by (seed, its place in that stream). So a run goes
on exactly where it was, on any number of hosts and workers.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags, logging

from beitv2_jax.data import sources, transforms
from beitv2_jax.errors import UserError

MAX_NEIGHBOURS = 16


class Decoded:
  """A source whose images are RGB. One that won't decode is named in the log and replaced by the next that does."""

  def __init__(self, source: Sequence):
    self.source, self.bad = source, 0

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    for j in range(i, i + MAX_NEIGHBOURS):
      record = self.source[j % len(self.source)]
      try:
        return record | dict(image=transforms.decode(record['image']))
      except (OSError, ValueError, SyntaxError) as e:
        self.bad += 1
        name = getattr(self.source, 'name', str)(j % len(self.source))
        logging.warning('image %s does not decode (%s); using the next one. %d so far.', name, e, self.bad)
    raise UserError(f'{MAX_NEIGHBOURS} images in a row do not decode; the last was {name}. Is the data set intact?')


def _apply(steps: Sequence, record: dict, rng: np.random.Generator) -> dict:
  return functools.reduce(lambda r, f: f(r, rng), steps, record)


def _batches(dataset, steps, seed, batch, process, processes, start, workers):
  dataset = dataset.random_map(functools.partial(_apply, steps), seed=seed).batch(batch // processes)
  dataset = dataset.slice(slice(process, None, processes)).slice(slice(start, None))
  threads = 0 if workers < 0 else 8
  iterator = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
  if workers > 0:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which tests and notebooks never parse
    iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(iterator)


def train_batches(
  source: Sequence, steps: Sequence, *, seed: int, batch: int, start: int = 0, workers: int = 0, process: int = 0, processes: int = 1
) -> Iterator[dict]:
  """This process's part [batch / processes, ...] of batches start, start+1, ... as dicts of numpy arrays.

  `workers` > 0 decodes in that many processes, 0 in threads, -1 in the caller (for debugging).
  """
  dataset = grain.MapDataset.source(Decoded(source)).seed(seed).shuffle().repeat()
  return _batches(dataset, steps, seed, batch, process, processes, start, workers)


def eval_batches(
  source: Sequence, steps: Sequence, *, seed: int, batch: int, workers: int = 0, process: int = 0, processes: int = 1
) -> Iterator[dict]:
  """Every record once, in order; the last batch is filled up with records whose `valid` is False."""
  count = math.ceil(len(source) / batch) * batch
  dataset = grain.MapDataset.source(sources.Padded(Decoded(source), count))
  return _batches(dataset, steps, seed, batch, process, processes, 0, workers)
