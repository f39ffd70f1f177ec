"""Where the numbers go: the terminal, a JSONL file and TensorBoard, written by process 0 alone."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Metrics:
  """`train(step, values)` and `evaluation(step, values)` write scalars; `progress` moves the bar.

  `workdir/metrics.jsonl` has one object a line: step, kind ('train' or 'eval') and the values. Lines at or after
  `start` are dropped on opening: a run that goes on writes them again.
  """

  def __init__(self, workdir: Path, start: int, steps: int, name: str):
    self.active = jax.process_index() == 0
    if not self.active:
      return
    path = workdir / 'metrics.jsonl'
    if path.exists():
      steps_of = [(_step(line), line) for line in path.read_text().splitlines()]
      kept = [line for step, line in steps_of if step is not None and step <= start]
      path.write_text(''.join(f'{line}\n' for line in kept))
    self.file = path.open('a')
    self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1)
    self.bar = tqdm(initial=start, total=steps, desc=name, dynamic_ncols=True, mininterval=0.5, disable=None, file=sys.stderr)
    self.clock = (start, time.monotonic())

  def progress(self, step: int, loss: float) -> None:
    if self.active:
      self.bar.update(step - self.bar.n)
      self.bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)

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
    self.file.write(json.dumps({'step': step, 'kind': kind} | {k: v if math.isfinite(v) else str(v) for k, v in values.items()}) + '\n')
    self.file.flush()
    for k, v in values.items():
      self.board.add_scalar(f'{kind}/{k}', v, step)
    if kind == 'eval' or not sys.stderr.isatty():
      self.say(f'{kind} {step}: ' + '  '.join(f'{k} {v:.5g}' for k, v in values.items()))

  def say(self, text: str) -> None:
    if self.active:
      self.bar.write(text, file=sys.stderr)

  def close(self) -> None:
    if self.active:
      self.bar.close()
      self.board.close()
      self.file.close()


def _step(line: str) -> int | None:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):
    return None  # the last line of a killed run can be cut


def read(workdir: str | Path, kind: str = 'train') -> list[dict]:
  """The lines of one kind in a workdir's metrics.jsonl."""
  path = Path(workdir) / 'metrics.jsonl'
  rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
  return [r for r in rows if r['kind'] == kind]
