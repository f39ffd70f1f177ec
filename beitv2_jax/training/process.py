"""What a process does before its first computation: keep compiled programs, find the other processes of its run."""

import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import jax

from beitv2_jax import storage
from beitv2_jax.errors import UserError
from beitv2_jax.training import peers


def quiet_threads() -> None:
  """Leaves out the tracebacks of threads that write checkpoints: what fails there is raised, and said, in the main thread as well."""
  thread_hook, unraisable_hook = threading.excepthook, sys.unraisablehook

  def is_theirs(trace: Any) -> bool:
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return not files or any(name in file for file in files for name in ('orbax', 'asyncio', 'tensorstore'))

  threading.excepthook = lambda args: None if is_theirs(args.exc_traceback) else thread_hook(args)
  sys.unraisablehook = lambda args: None if is_theirs(args.exc_traceback) else unraisable_hook(args)


def use_compilation_cache(workdir: Any = '') -> None:
  """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says otherwise: in the home directory, or beside a run in a
  bucket, whose next machine may be a new one."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    where = workdir / 'compiled' if storage.in_bucket(workdir) else Path.home() / '.cache' / 'beitv2_jax' / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(where))


def start_distributed(coordinator: str | None, processes: int | None, process: int | None, distributed: bool) -> None:
  """Connects the processes of a multi-host run: by `coordinator` (host:port), or as the TPU slice or SLURM job says.

  Does nothing for a run of one process. Raises UserError if they do not find each other.
  """
  slurm, pod = int(os.environ.get('SLURM_NTASKS', 1)) > 1, ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if not (coordinator or slurm or pod or distributed):
    return
  through = f'--coordinator={coordinator}' if coordinator else 'SLURM' if slurm else 'the TPU slice'
  try:
    peers.initialize(coordinator, processes, process)
  except Exception as e:  # timeouts, missing variables, refused connections: jax and grpc raise many types
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
    raise UserError(
      f'the processes did not find each other through {through} ({reason}). Is the same command running on every host, and can they reach the '
      'first one? Elsewhere give --coordinator=HOST:PORT --processes=N --process=I.'
    ) from e
