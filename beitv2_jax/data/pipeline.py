"""Batches through Grain. The position in the data is the global step, and nothing else.

Batch k of a run holds records [kB, (k+1)B) of one seeded, shuffled, repeated data set; process p of P makes its part
number kP + p. A record's augmentation is drawn from a generator keyed by (seed, its place in that stream). So a run goes
on exactly where it was, on any number of hosts and workers.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from beitv2_jax.data import sources
from beitv2_jax.data.decode import Counted, Decoded

RECORDS_A_THREAD = 8


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


def _batches(dataset, steps, seed, batch, process, processes, start, workers, max_bad, decoded):
  size = batch // processes
  dataset = dataset.random_map(functools.partial(_apply, steps), seed=seed)
  dataset = _Part(dataset, size, process, processes, start)
  if workers > 0:  # every worker makes whole batches
    os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker')  # it would warn of the shared memory that it cleans up
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which tests and notebooks never parse
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    iterator = dataset.batch(size).to_iter_dataset(one).mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  else:  # threads share a batch, so the first one is soon there; a few records at a time, for each hand-over costs as much as a small image
    some = math.gcd(size, RECORDS_A_THREAD)
    threads = 0 if workers < 0 else 1 if decoded else min(16, 2 * (os.cpu_count() or 1))  # Python's own work is not shared out
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * size // some if threads else 0)
    if some > 1:
      iterator = dataset.batch(some).to_iter_dataset(options).batch(size // some).map(_one_batch)
    else:
      iterator = dataset.to_iter_dataset(options).batch(size)
  return Counted(iter(iterator), max_bad)


def _one_batch(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """[parts, records of a part, ...] → [records, ...]."""
  return {k: v.reshape(-1, *v.shape[2:]) for k, v in parts.items()}


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
  reading: dict[str, Any] | None = None,
) -> Counted:
  """This process's part [batch / processes, ...] of batches start, start+1, ... as dicts of numpy arrays.

  `workers` > 0 decodes in that many processes, 0 in threads, -1 in the caller (for debugging). Raises UserError once more than
  a share `max_bad` of the images (of 1,000 at least) does not decode. `reading` are arguments of decode.image.
  """
  dataset = grain.MapDataset.source(Decoded(source, **reading or {})).seed(seed).shuffle().repeat()
  return _batches(dataset, steps, seed, batch, process, processes, start, workers, max_bad, getattr(source, 'decoded', False))


def eval_batches(
  source: Sequence,
  steps: Sequence,
  *,
  seed: int,
  batch: int,
  workers: int = 0,
  process: int = 0,
  processes: int = 1,
  max_bad: float = 0.01,
  reading: dict[str, Any] | None = None,
) -> Counted:
  """Every record once, in order; the last batch is filled up with records whose `valid` is False."""
  count = math.ceil(len(source) / batch) * batch
  dataset = grain.MapDataset.source(sources.Padded(Decoded(source, **reading or {}), count))
  return _batches(dataset, steps, seed, batch, process, processes, 0, workers, max_bad, getattr(source, 'decoded', False))
