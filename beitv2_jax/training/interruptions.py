"""Signals that ask a run to stop, noted so that it can save first."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
  """A signal asked the run to stop; its state is saved."""


class Signals:
  """Notes SIGTERM and SIGINT while it is entered; a second one acts at once.

  With several processes JAX's preemption service carries a SIGTERM to all of them, and they all learn of it at the same question.
  """

  def __init__(self):
    self.received = 0
    self.asked = 0
    self.former_handlers: dict[int, Any] = {}

  def __enter__(self):
    if jax.process_count() == 1:
      try:
        self.former_handlers = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
      except ValueError:  # not the main thread, as in some notebooks
        pass
    return self

  def stop(self) -> bool:
    """Is the run asked to stop? All processes must ask equally often, and get the same answer."""
    self.asked += 1
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.asked):
      self.received = signal.SIGTERM
    return bool(self.received)

  def _note(self, number, frame):
    self.received = number
    signal.signal(number, self.former_handlers[number])

  def __exit__(self, *_):
    for number, handler in self.former_handlers.items():
      signal.signal(number, handler)
