"""The other processes of a run: found at the start, watched until the end.

A process that dies leaves the others waiting for it in a sum over all devices. JAX ends them after a minute or two, with SIGABRT and pages
of C++. Here each process counts on in JAX's key-value store, which process 0 holds, and looks whether the others do: one that is silent
for SILENCE seconds is lost. Then a line says which, and the process ends with the code LOST, on which a launcher can start all of
them again. One that fails says so, and ends; the others end SILENCE seconds later, unless they fail as well, and with the same code if it
was bad input, for to try that again would not help. When process 0 itself dies JAX is faster: it ends the others at once with SIGABRT
(code 134).
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed  # its client has no public name

from beitv2_jax.errors import RunFailed, UserError

BEAT = 2.0  # seconds from one count to the next
SILENCE = 20.0
FIND_SECONDS = 240.0  # for all processes to connect: hosts do not start at the same moment
LOST, BAD_INPUT = 75, 2  # EX_TEMPFAIL: try again; and what main.py ends with, which no launcher tries again
FOLDER = 'beitv2_jax/alive'

_watch: 'Watch | None' = None


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """jax.distributed.initialize, with a watch over the processes."""
  global _watch
  jax.config.update('jax_enable_preemption_service', True)  # without it a SIGTERM to one process stops nothing
  given_up = threading.Timer(FIND_SECONDS, _not_found)  # a little later JAX gives up too, with SIGABRT and C++
  given_up.daemon = True
  given_up.start()
  try:
    # A process that dies while all connect is noticed by the timer, later ones by the watch: both before JAX's own heartbeat.
    jax.distributed.initialize(
      coordinator, processes, process, initialization_timeout=int(FIND_SECONDS) + 60, heartbeat_timeout_seconds=int(FIND_SECONDS) + 120
    )
  finally:
    given_up.cancel()
  faulthandler.disable()  # where JAX ends a process because process 0 is gone, its Python frames tell nothing
  _watch = Watch(distributed.global_state.client, jax.process_index(), expected=distributed.global_state.num_processes or 1)
  _watch.thread.start()


def _not_found() -> None:
  end(f'the processes of this run did not find each other within {FIND_SECONDS:.0f} s: is the same command running on every host?')


def finished() -> None:
  """This process has no more to do with the others."""
  if _watch is not None:
    _watch.finished()


def leave(code: int, unforeseen: Exception | None = None) -> None:
  """Ends this process, which failed, so that the others need not wait for it to the end of JAX's patience. Nothing if there are no others."""
  if _watch is not None:
    if unforeseen:
      traceback.print_exception(unforeseen)
    _watch.failed(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_verdict(error: Exception) -> None:
  """What failed may have failed because another process is gone: the watch will say so, and end this process.

  Not so bad input, a full disk or a loss that is not finite, which are said at once.
  """
  if _watch is not None and not isinstance(error, (UserError, RunFailed, FloatingPointError)):
    time.sleep(SILENCE + 3 * BEAT)


def end(what: str, code: int = LOST) -> None:
  """Says what was lost, and ends the process at once: its other threads wait for what will not come."""
  again = '. Mend that first.' if code == BAD_INPUT else '; run the same command on all hosts to go on.'
  text = f'error: {what}. Nothing is lost but the steps since the last checkpoint{again}\n'
  os.write(2, text.encode())
  os._exit(code)


class Watch:
  """Counts for this process, and watches the others count. `client` is that of JAX's distributed runtime."""

  def __init__(self, client: Any, process: int, beat: float = BEAT, silence: float = SILENCE, expected: int = 0):
    self.client, self.process, self.beat, self.silence = client, process, beat, silence
    # key → (its value, since when). One may die before it has said a word: all that are `expected` are waited for.
    self.seen: dict[str, tuple[str, float]] = {f'{FOLDER}/{i}': ('', time.monotonic()) for i in range(expected)}
    self.stop, self.lock = threading.Event(), threading.Lock()
    self.thread = threading.Thread(target=self._run, daemon=True)

  def _run(self) -> None:
    count = 0
    while not self.stop.wait(self.beat):
      count += 1
      try:
        with self.lock:  # the last word stays the last
          if self.stop.is_set():
            return
          self._say(f'{count} {socket.gethostname()}')
        values = self.client.key_value_dir_get(FOLDER)
      except Exception as e:  # the store went with process 0, whose end JAX also notices
        if not self.stop.is_set() and self.process != 0:
          end(f'process 0, which holds the run together, does not answer ({str(e).splitlines()[0][:100]})')
        return
      if lost := self.lost(values, time.monotonic()):
        if self.process == 0:  # whose end ends the others: they have seen the same
          time.sleep(2 * self.beat)
        end(*lost)

  def _say(self, value: str) -> None:
    self.client.key_value_set(f'{FOLDER}/{self.process}', value, allow_overwrite=True)

  def lost(self, values: list[tuple[str, str]], now: float) -> tuple[str, int] | None:
    """(which process has been silent for too long, in words; the code to end with); None if none has."""
    said = dict(values)
    for key, value in values + [(key, '') for key in self.seen if key not in said]:
      if key not in self.seen or self.seen[key][0] != value:
        self.seen[key] = value, now
      silent = now - self.seen[key][1]
      number, host = key.rpartition('/')[2], value.rpartition(' ')[2] or 'an unknown host'
      if silent > self.silence and not value.startswith('finished') and number != str(self.process):
        if value.startswith('failed'):
          code = BAD_INPUT if value.split()[1] == str(BAD_INPUT) else LOST
          return f'process {number} on {host} ended with an error, which it has printed', code
        return f'process {number} on {host} is lost: nothing was heard of it for {silent:.0f} s', LOST
    return None

  def finished(self) -> None:
    if not self.stop.is_set():
      self._say_last('finished')

  def _say_last(self, word: str) -> None:
    with self.lock, contextlib.suppress(Exception):  # others may be gone already
      self.stop.set()
      self._say(f'{word} {socket.gethostname()}')

  def failed(self, code: int) -> None:
    """Says so. Process 0, whose end ends the others with SIGABRT, stays until they have said something, or have been lost."""
    self._say_last(f'failed {code}')
    with contextlib.suppress(Exception):
      until = time.monotonic() + self.silence + 3 * self.beat
      while self.process == 0 and time.monotonic() < until:
        values = [value for key, value in self.client.key_value_dir_get(FOLDER) if key != f'{FOLDER}/0']
        if len(values) == len(self.seen) - 1 and all(value.startswith(('finished', 'failed')) for value in values):
          return
        time.sleep(0.1 * self.beat)
