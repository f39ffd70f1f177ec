"""python -m beitv2_jax.main --config=configs/vqkd_b16.py --workdir=runs/vqkd

Trains the stage that a config describes. Every field can be set from the command line: --config.optim.lr=1e-3. The same command goes
on where a stopped run was. `python -m beitv2_jax train` is the same.
"""

import os
import signal
import sys
import threading
import traceback

from absl import app, flags
from ml_collections import config_flags

from beitv2_jax import recipes
from beitv2_jax.errors import RunFailed, UserError

# Decoding processes import this file again, so what is slow to import is imported inside functions.
CONFIG = config_flags.DEFINE_config_file('config', None, 'A recipe, with arguments after a colon.', lock_config=True)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and config.json go, a directory or gs://BUCKET/RUN; also what a stopped run goes on from.'
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, where nothing else says it. SLURM does.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Several hosts that find each other, as on a TPU VM slice.')
_PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes, with --coordinator.')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'After an error, also where in the code it came up.')
_PROCESS = flags.DEFINE_integer('process', None, 'Index of this process, with --coordinator.')


def train(argv: list[str]) -> None:
  if argv[1:]:
    raise UserError(f'unknown argument {argv[1]}; settings are --config.KEY=VALUE.')
  config = recipes.given(CONFIG.value)
  if not _WORKDIR.value:
    raise UserError('give --workdir=DIR: where checkpoints and metrics go, and what a stopped run goes on from.')
  from beitv2_jax import storage
  from beitv2_jax.training import loop, peers, process

  workdir = storage.place(_WORKDIR.value)

  process.quiet_threads()
  process.use_compilation_cache(workdir)
  process.start_distributed(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value)
  try:
    flag = flags.FLAGS['config']
    about = dict(recipe=recipes.short(config_flags.get_config_filename(flag)), changed=config_flags.get_override_values(flag))
    loop.run(config, workdir, about)
  except Exception as e:
    peers.wait_for_verdict(e)
    raise  # `main` says what it was, and leaves the other processes
  finally:
    if not isinstance(sys.exc_info()[1], Exception):
      peers.finished()


def main(argv: list[str] | None = None) -> None:
  """Exits with 0; 2 for bad input, 1 for a run that failed, 130 and 143 for a signal after which state was saved."""
  if threading.current_thread() is threading.main_thread():  # until training begins, and for a second Ctrl-C in it
    signal.signal(signal.SIGINT, _stop_at_once)
  try:
    app.run(train, argv=argv, flags_parser=recipes.parse)
  except UserError as e:
    code = _error(e, 2)
  except (FloatingPointError, RunFailed) as e:
    code = _error(e, 1)
  except Exception as e:
    _leave_others(1, e)
    raise
  else:
    return
  _leave_others(code)
  sys.exit(code)


def _error(e: Exception, code: int) -> int:
  if flags.FLAGS.is_parsed() and _TRACEBACK.value or '--traceback' in sys.argv:
    traceback.print_exception(e)
  print(f'error: {e}', file=sys.stderr)
  return code


def _leave_others(code: int, unforeseen: Exception | None = None) -> None:
  if peers := sys.modules.get('beitv2_jax.training.peers'):  # no reason to import JAX: a wrong word on the command line is said at once
    peers.leave(code, unforeseen)


def _stop_at_once(*_) -> None:
  """Without an exception, which could come up anywhere and be swallowed."""
  os.write(2, b'stopped; nothing is lost but the steps since the last checkpoint.\n')
  os._exit(130)


def end(code: int) -> None:
  """Ends the process. One that failed does not wait for threads that write to a full disk or wait for a lost host, and one that was stopped
  and has saved does not wait for a program that is still being compiled. With several processes it does: they part together."""
  jax = sys.modules.get('jax')
  if code == 1 or code in (130, 143) and (jax is None or jax.process_count() == 1):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


if __name__ == '__main__':
  try:
    main()
  except SystemExit as e:
    end(e.code if isinstance(e.code, int) else 0 if e.code is None else 1)
