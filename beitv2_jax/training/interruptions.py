"""Signals that ask a run to stop, noted so that it can save first."""

import signal
from typing import Any

import jax


class Interrupted(SystemExit):
  """A signal asked the run to stop; its state is saved."""


class Signals:
  """Notes SIGTERM and SIGINT while it is entered; a second one acts at once.

  With several processes JAX's own preemption service tells all of them at the same step, and nothing is done here.
  """

  def __init__(self):
    self.received = 0
    self.former_handlers: dict[int, Any] = {}

  def __enter__(self):
    if jax.process_count() == 1:
      try:
        self.former_handlers = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
      except ValueError:  # not the main thread, as in some notebooks
        pass
    return self

  def _note(self, number, frame):
    self.received = number
    signal.signal(number, self.former_handlers[number])

  def __exit__(self, *_):
    for number, handler in self.former_handlers.items():
      signal.signal(number, handler)
