"""A run in a process of its own, which does not outlive us."""

import signal
import subprocess
from typing import Any


def run(command: list[str], timeout: float | None = None, **streams: Any) -> int | None:
  """The exit code of a command; None where it was stopped after `timeout` seconds.

  Told to stop meanwhile, by Ctrl-C or SIGTERM, we tell the child, wait until it has saved, and raise KeyboardInterrupt.
  """

  def stop(*_: Any) -> None:
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, stop)
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
    signal.signal(signal.SIGTERM, before)
