"""What happened to a run, a line of events.jsonl each: started, first step, saved, stopped, finished; and its goodput.

Goodput is the share of the time since the run first started that went into steps that counted: not into waiting for machines, starting,
compiling, evaluating, waiting for input, or steps that were lost with a machine and done again.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import jax

from beitv2_jax.training import terminal

NAME = 'events.jsonl'
OTHER = ('evaluating', 'waiting', 'compiling')  # what takes time after a first step, and is not a step


class Events:
  """Notes events in `folder`, by process 0. `spent` is what went into other things than steps since this start, in seconds.
  A `finished` run is not changed any more."""

  def __init__(self, folder: Path, step: int, finished: bool, **about: Any):
    self.path, self.active = folder / NAME, jax.process_index() == 0 and not finished
    self.spent = dict.fromkeys(OTHER, 0.0)
    self.first = True
    self.note('started', step, **about)

  def note(self, event: str, step: int, **about: Any) -> None:
    """Raises OSError if it cannot be written."""
    if self.active:
      with self.path.open('a') as file:
        spent = {k: round(v, 3) for k, v in self.spent.items()}
        file.write(json.dumps(dict(time=round(time.time(), 3), event=event, step=step) | spent | about) + '\n')

  def warn(self, step: int, text: str) -> None:
    self.note('warning', step, text=text.removeprefix('warning: '))

  def stepped(self, step: int, waited: float) -> None:
    """A step is done, for whose batch the run waited so many seconds. The first one, which was compiled for, is an event."""
    self.spent['waiting'] += waited
    if self.first:
      self.first = False
      self.spent = dict.fromkeys(OTHER, 0.0)
      self.note('first step', step)

  @contextlib.contextmanager
  def spending(self, on: str):
    """What is done inside takes time that does not go into steps: one of OTHER."""
    began = time.monotonic()
    yield
    self.spent[on] += time.monotonic() - began


def read(workdir: Any) -> list[dict]:
  """The events of a workdir, oldest first; lines that a dying machine cut are left out."""
  path, events = workdir / NAME, []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict) and {'time', 'event', 'step'} <= row.keys():
        events.append(row)
  return events


def summary(workdir: Any) -> str:
  return in_words(goodput(read(workdir)))


def in_words(figures: dict[str, float]) -> str:
  return (
    f'{terminal.duration(figures["seconds"])} since the first of {figures["starts"]:.0f} start{"s" * (figures["starts"] > 1)}; goodput {figures["goodput"]:.0f} % '
    '(steps that counted; the rest: starting, compiling, evaluating, waiting)'
  )


def goodput(events: list[dict]) -> dict[str, float]:
  """seconds since the first start, how many of them went into steps that counted, starts, and the share in percent."""
  starts = [i for i, e in enumerate(events) if e['event'] == 'started']
  if not starts:
    return dict(seconds=0.0, counted=0.0, starts=0, goodput=0.0)
  counted = 0.0
  for begin, end in zip(starts, [*starts[1:], len(events)]):
    attempt = events[begin:end]
    first = next((e for e in attempt if e['event'] == 'first step'), None)
    kept = events[end]['step'] if end < len(events) else attempt[-1]['step']  # where the next start went on from
    last = next((e for e in reversed(attempt) if e['step'] <= kept and e['event'] in ('saved', 'stopped', 'finished')), None)
    if first and last and last['time'] > first['time']:
      counted += max(0.0, last['time'] - first['time'] - sum(last.get(other, 0.0) for other in OTHER))
  seconds = events[-1]['time'] - events[0]['time']
  return dict(seconds=seconds, counted=counted, starts=len(starts), goodput=100 * counted / max(seconds, 1e-9))
