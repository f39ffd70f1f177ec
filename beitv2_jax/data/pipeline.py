"""Batches through Grain. The position in the data is the global step, and nothing else.

Batch k of a run holds records [kB, (k+1)B) of one seeded, shuffled, repeated data set; process p of P makes its part
number kP + p. A record's augmentation is drawn from a generator keyed by (seed, its place in that stream). So a run goes
on exactly where it was, on any number of hosts and workers.
"""

import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from beitv2_jax.data import scenes, sources, transforms
from beitv2_jax.errors import UserError

MAX_NEIGHBOURS = 16


class Decoded:
  """A source whose images are RGB arrays. One that won't decode is named in the log and replaced by the next that does.

  `bad` in a record says how many were stepped over for it.
  """

  def __init__(self, source: Sequence):
    self.source, self.said = source, 0

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    for bad in range(MAX_NEIGHBOURS):
      j = (i + bad) % len(self.source)
      try:
        record = self.source[j]
        mask = {'mask': scenes.decode_mask(record['mask'])} if 'mask' in record else {}
        return record | mask | dict(image=transforms.decode(record['image']), bad=np.int32(bad))
      except transforms.UNDECODABLE as e:
        name = getattr(self.source, 'name', str)(j)
        self.said += 1
        if self.said <= 20:
          logging.warning('%s does not decode (%s); using the next image.%s', name, e, ' No more of these.' * (self.said == 20))
    raise UserError(f'{MAX_NEIGHBOURS} images in a row do not decode; the last was {name}. Is the data set intact?')


class Counted:
  """Batches without their `bad` counts; too many end the run. `bad` and `seen` are this process's counts so far."""

  def __init__(self, batches: Iterator[dict], max_bad: float):
    self.batches, self.max_bad, self.bad, self.seen = batches, max_bad, 0, 0

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    batch = dict(next(self.batches))
    counts = batch.pop('bad')
    self.bad, self.seen = self.bad + int(counts.sum()), self.seen + len(counts)
    if self.bad > self.max_bad * max(self.seen, 1000):
      raise UserError(
        f'{self.bad} of the first {self.seen} images do not decode, more than data.max_bad={self.max_bad} allows; the log names the first ones. '
        'Mend the data set, or raise --config.data.max_bad.'
      )
    return batch

  def close(self) -> None:
    getattr(self.batches, 'close', lambda: None)()


def _apply(steps: Sequence, record: dict, rng: np.random.Generator) -> dict:
  return functools.reduce(lambda r, f: f(r, rng), steps, record)


class _Part(grain.MapDataset):
  """The records of one process, from a batch on: its batch k is the whole stream's batches kP + p, of `size` records each."""

  def __init__(self, parent: grain.MapDataset, size: int, process: int, processes: int, start: int):
    super().__init__(parent)
    self.size, self.process, self.processes, self.start = size, process, processes, start

  def __len__(self) -> int:
    return max(len(self._parent) // self.processes - self.start * self.size, 0)

  def __getitem__(self, index: Any) -> Any:
    batch, place = divmod(index, self.size)
    return self._parent[((self.start + batch) * self.processes + self.process) * self.size + place]


def _batches(dataset, steps, seed, batch, process, processes, start, workers, max_bad):
  size = batch // processes
  dataset = dataset.random_map(functools.partial(_apply, steps), seed=seed)
  dataset = _Part(dataset, size, process, processes, start)
  if workers > 0:  # every worker makes whole batches
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which tests and notebooks never parse
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    iterator = dataset.batch(size).to_iter_dataset(one).mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  else:  # threads share a batch, so the first one is soon there
    threads = 0 if workers < 0 else min(16, 2 * (os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * size if threads else 0)
    iterator = dataset.to_iter_dataset(options).batch(size)
  return Counted(iter(iterator), max_bad)


def train_batches(
  source: Sequence,
  steps: Sequence,
  *,
  seed: int,
  batch: int,
  start: int = 0,
  workers: int = 0,
  process: int = 0,
  processes: int = 1,
  max_bad: float = 0.01,
) -> Counted:
  """This process's part [batch / processes, ...] of batches start, start+1, ... as dicts of numpy arrays.

  `workers` > 0 decodes in that many processes, 0 in threads, -1 in the caller (for debugging). Raises UserError once more than
  a share `max_bad` of the images (of 1,000 at least) does not decode.
  """
  dataset = grain.MapDataset.source(Decoded(source)).seed(seed).shuffle().repeat()
  return _batches(dataset, steps, seed, batch, process, processes, start, workers, max_bad)


def eval_batches(
  source: Sequence, steps: Sequence, *, seed: int, batch: int, workers: int = 0, process: int = 0, processes: int = 1, max_bad: float = 0.01
) -> Counted:
  """Every record once, in order; the last batch is filled up with records whose `valid` is False."""
  count = math.ceil(len(source) / batch) * batch
  dataset = grain.MapDataset.source(sources.Padded(Decoded(source), count))
  return _batches(dataset, steps, seed, batch, process, processes, 0, workers, max_bad)
