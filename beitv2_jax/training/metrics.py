"""Where the numbers go: the terminal, a JSONL file, TensorBoard and a tracker, written by process 0 alone."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore
from tensorboardX.summary import image as image_summary
from tensorboardX.summary import scalar
from tqdm import tqdm

from beitv2_jax import storage
from beitv2_jax.training import terminal, trackers


class Metrics:
  """`write` keeps scalars; `progress` moves the bar. What cannot be written raises OSError, but for what is for TensorBoard and trackers, which are
  dropped. `headline` names the figures that the bar shows and full lines begin with.

  `workdir/metrics.jsonl` has one object a line: step, kind ('train' or 'eval') and the values; one line for each step and kind. On
  opening, lines after `start` are dropped, as are cut ones: a run that goes on writes them again. `evaluated` has the evaluations so far.
  """

  def __init__(self, workdir: Path, start: int, steps: int, name: str, headline: Sequence[str] = (), track: str = '', config: Any = None):
    self.active = jax.process_index() == 0
    self.evaluated: dict[int, dict[str, float]] = {}
    if not self.active:
      return
    self.path = workdir / 'metrics.jsonl'
    rows = {(row['step'], row['kind']): row for row in _rows(self.path) if row['step'] <= start}
    self.evaluated = {step: _values(row) for (step, kind), row in rows.items() if kind == 'eval'}
    temporary = self.path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows.values()))
    temporary.replace(self.path)
    self.file = self.path.open('ab', buffering=0)  # a line is in the file, or an error is raised, when `write` returns
    self.steps, self.headline = steps, ('loss', *headline)
    layout = '{desc} {percentage:3.0f} %|{bar:20}| {n_fmt}/{total_fmt}  {remaining} left{postfix}'
    self.bar = tqdm(
      initial=start, total=steps, desc=name, dynamic_ncols=True, mininterval=0.5, disable=None, file=sys.stderr, bar_format=layout
    )
    self.board = Board(workdir / 'tensorboard', start, self.say)
    self.tracker = trackers.Tracker(track, name, workdir, json.loads(config.to_json_best_effort()) if config else {}, self.say)
    self.clock = (start, time.monotonic())

  def progress(self, step: int, values: Mapping[str, float], batch: int) -> None:
    """Moves the live line to `step`, of `batch` images each."""
    if self.active and not self.bar.disable:
      rate = self.bar.format_dict['rate'] or 0.0
      shown = [f'{batch * rate:,.0f} images/s', *(terminal.figure(k, values[k]) for k in self.headline if k in values)]
      self.bar.set_postfix_str('  '.join(shown), refresh=False)
      self.bar.update(step - self.bar.n)

  def restart_clock(self, step: int) -> None:
    """What came before `step` does not count for the next rate."""
    if self.active:
      self.clock = (step, time.monotonic())

  def rate(self, step: int) -> float:
    """Steps per second since the last call."""
    if not self.active:
      return 0.0
    (last, since), self.clock = self.clock, (step, time.monotonic())
    return (step - last) / max(self.clock[1] - since, 1e-9)

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    if not self.active:
      return
    values = {k: float(v) for k, v in values.items()}
    row = {'step': step, 'kind': kind} | {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    line = (json.dumps(row) + '\n').encode()
    while line:  # a disk that is nearly full takes a part, and fails at the next
      line = line[self.file.write(line) :]
    if kind == 'eval':
      self.evaluated[step] = values
    named = {f'{kind}/{k}': v for k, v in values.items()}
    self.board.write(step, named)
    self.tracker.write(step, named)
    rate = values.get('steps_per_second', 0.0)
    self.say(terminal.line(kind, step, self.steps, values, self.headline, (self.steps - step) / rate if rate > 0 else None))

  def picture(self, step: int, name: str, image: Any) -> None:
    """A PIL image for TensorBoard and the tracker."""
    if self.active:
      self.board.picture(step, name, image)
      self.tracker.picture(step, name, image)

  def keep(self) -> None:
    """Until the lines so far would survive a power cut: to be called before a checkpoint that relies on them."""
    if self.active:
      os.fsync(self.file.fileno())

  def say(self, text: str) -> None:
    if self.active:
      self.bar.write(text, file=sys.stderr)

  def close(self) -> None:
    if self.active:
      self.bar.close()
      self.board.close()
      self.tracker.close()
      self.file.close()


class Board:
  """Scalars and pictures for TensorBoard. A run does not end for want of a picture: after the first failure it says so and writes no more."""

  def __init__(self, folder: Path, start: int, say):
    self.say, self.events = say, None
    with self._dropped_if_it_fails():
      folder.mkdir(exist_ok=True)
      self.events = EventsWriter(str(folder / 'events'))
      # What an earlier run wrote after `start` is not shown.
      self.events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START)))

  @contextlib.contextmanager
  def _dropped_if_it_fails(self):
    try:
      yield
    except Exception as e:  # whatever the disk and tensorboardX make of it
      self.events = None
      self.say(f'warning: no more TensorBoard files from this run ({e}); metrics.jsonl has everything.')

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self.events is None:
      return
    with self._dropped_if_it_fails():
      for name, value in values.items():
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
      self.events.flush()

  def picture(self, step: int, name: str, image: Any) -> None:
    if self.events is None:
      return
    with self._dropped_if_it_fails():
      summary = image_summary(name, np.asarray(image.convert('RGB')), dataformats='HWC')
      self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))

  def close(self) -> None:
    if self.events is not None:
      with self._dropped_if_it_fails():
        self.events.close()


def _rows(path: Any) -> list[dict]:
  """The lines of a metrics file that are whole."""
  rows = []
  for line in path.read_bytes().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):  # the last line of a killed run can be cut, and a disk can lose a block
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get('step'), int) and row.get('kind') in ('train', 'eval'):
        rows.append(row)
  return rows


def _values(row: dict) -> dict[str, float]:
  return {k: float(v) for k, v in row.items() if k not in ('step', 'kind')}


def read(workdir: str | Path, kind: str = 'train') -> list[dict]:
  """The lines of one kind in a workdir's metrics.jsonl."""
  return [row for row in _rows(storage.place(workdir) / 'metrics.jsonl') if row['kind'] == kind]
