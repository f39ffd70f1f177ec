"""A run in a process of its own, which does not outlive us."""

import signal
import subprocess
from typing import Any


def interrupt(*_: Any) -> None:
  """A handler: what it is given for ends us as Ctrl-C does."""
  raise KeyboardInterrupt


def run(command: list[str], timeout: float | None = None, **streams: Any) -> int | None:
  """The exit code of a command; None where it was stopped after `timeout` seconds.

  Told to stop meanwhile, by Ctrl-C or SIGTERM, we tell the child, wait until it has saved, and raise KeyboardInterrupt.
  """
  before = {which: signal.signal(which, interrupt) for which in (signal.SIGTERM, signal.SIGINT)}
  process = subprocess.Popen(command, **streams)
  try:
    return process.wait(timeout)
  except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
    process.send_signal(signal.SIGTERM)
    process.wait()
    if isinstance(e, KeyboardInterrupt):
      raise
    return None
  finally:
    for which, handler in before.items():
      signal.signal(which, handler or signal.SIG_DFL)  # None: it was not Python's
