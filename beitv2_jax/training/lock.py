"""One run at a time in a workdir.

Two runs that write the same checkpoints destroy both. The first one leaves `run.lock` with its host and process, and writes it again
every few seconds, counting. A killed run leaves the file behind: a dead process of this machine is seen at once, one of another
machine because nobody counts on. No clocks are compared, and only the file's content is looked at: shared file systems cache the
rest.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from beitv2_jax import storage
from beitv2_jax.errors import SaveError, UserError

BEAT = 10.0  # seconds from one count to the next
STALE = 45.0  # seconds without one after which the run is taken for dead


def _machine() -> str:
  """This machine and its process numbers: containers of one host may share the name, not the numbers."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts += [Path('/proc/sys/kernel/random/boot_id').read_text().strip(), os.readlink('/proc/self/ns/pid')]
  return ' '.join(parts)


def _birth(pid: int) -> str:
  """When a process of this machine started, in the kernel's ticks; '' where that is not to be had."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''


def _alive(owner: dict[str, Any]) -> bool:
  try:
    os.kill(owner['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return _birth(owner['pid']) == owner['birth']  # the number may belong to a new process by now


class Lock:
  """`with Lock(workdir):` holds the workdir for this run, all of whose processes must enter it.

  Raises UserError, in all of them, if another run holds it; its message names that run. SaveError if it cannot be written.
  """

  def __init__(self, workdir: Any, beat: float = BEAT, stale: float = STALE):
    self.path, self.beat, self.stale = workdir / 'run.lock', beat, stale
    now = time.strftime('%Y-%m-%d %H:%M:%S %Z')
    self.ours = dict(host=socket.gethostname(), machine=_machine(), pid=os.getpid(), birth=_birth(os.getpid()), since=now)
    self.stop = threading.Event()
    self.thread = threading.Thread(target=self._count, daemon=True)

  def __enter__(self) -> 'Lock':
    refused: UserError | SaveError | None = None
    if jax.process_index() == 0:
      try:
        self._acquire()
      except (UserError, SaveError) as e:
        refused = e
    if jax.process_count() > 1 and bool(multihost_utils.broadcast_one_to_all(np.array(refused is not None))):
      refused = refused or UserError('process 0 of this run says why it may not train in this workdir.')
    if refused:
      raise refused
    if jax.process_index() == 0:
      self.thread.start()
    return self

  def __exit__(self, *_) -> None:
    self.stop.set()
    if self.thread.is_alive():
      self.thread.join()
    if jax.process_index() == 0 and self._owner() == self.ours:
      self.path.unlink(missing_ok=True)

  def check(self) -> None:
    """Raises SaveError if the workdir is not the one that was locked: where a disk was unmounted, what is written now would be hidden
    when it is back."""
    if jax.process_index() == 0 and self._owner() != self.ours:
      raise SaveError(
        f'{self.path} is gone, or of another run: was the disk unmounted, or the folder moved? Nothing more is written there. Bring it back, then run '
        'the same command.'
      )

  def _acquire(self) -> None:
    for _ in range(3):
      try:
        storage.create(self.path, json.dumps(self.ours))
        return
      except FileExistsError:
        self._take_over()
      except OSError as e:
        raise SaveError(f'could not write {self.path}: {e.strerror or e}; free space or mend the disk, then run the same command.') from e
    raise UserError(f'other runs are starting in {self.path.parent} at this moment; give each its own --workdir.')

  def _take_over(self) -> None:
    """Removes the lock of a run that is dead; raises UserError if it lives."""
    owner = self._owner()
    here = owner.get('machine') == self.ours['machine']
    if here and _alive(owner) or not here and not self._silent():
      who = f'host {owner["host"]}, process {owner["pid"]}, since {owner["since"]}' if owner else 'another run, which is just starting'
      raise UserError(f'{self.path.parent} is in use by a run ({who}). Stop that one first, or give another --workdir.')
    with contextlib.suppress(FileNotFoundError):
      if self._owner() == owner:
        self.path.unlink()

  def _owner(self) -> dict[str, Any]:
    """Whose the lock is; {} if there is none, or it is being written."""
    try:
      with storage.reaching(self.path):
        return {k: v for k, v in json.loads(self.path.read_text()).items() if k != 'count'}
    except (OSError, ValueError):
      return {}

  def _silent(self) -> bool:
    """Waits until the lock changes (False) or has not for long enough (True)."""

    def content() -> bytes:
      with contextlib.suppress(OSError), storage.reaching(self.path):
        return self.path.read_bytes()
      return b''

    first, until = content(), time.monotonic() + self.stale
    print(f'{self.path} is there: waiting up to {self.stale:.0f} s to see whether its run is alive.', file=sys.stderr)
    while time.monotonic() < until:
      time.sleep(min(self.beat, self.stale) / 10)
      if content() != first:
        return False
    return True

  def _count(self) -> None:
    count = 0
    while not self.stop.wait(self.beat):
      count += 1
      with contextlib.suppress(OSError):
        if self._owner() == self.ours:  # or it was taken over while this process was halted
          storage.write(self.path, json.dumps(self.ours | dict(count=count)))
