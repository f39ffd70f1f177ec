"""python -m beitv2_jax.main --config=configs/vqkd_b16.py --workdir=runs/vqkd

Trains the stage that a config describes. Every field can be set from the command line: --config.optim.lr=1e-3.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from beitv2_jax.errors import SaveError, UserError

# Decoding processes import this file again, so what is slow to import is imported inside functions.
CONFIG = config_flags.DEFINE_config_file('config', None, 'A file in configs/, with recipe arguments after a colon.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics and config.json go; also what a stopped run goes on from.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, where nothing else says it. SLURM does.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Several hosts that find each other, as on a TPU VM slice.')
_PROCESSES = flags.DEFINE_integer('processes', None, 'Number of processes, with --coordinator.')
_PROCESS = flags.DEFINE_integer('process', None, 'Index of this process, with --coordinator.')


def start_distributed() -> None:
  """Connects the processes of a multi-host run: by flags, or as the TPU pod or SLURM job says."""
  import jax

  given = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
  slurm, pod = int(os.environ.get('SLURM_NTASKS', 1)) > 1, ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if not (given[0] or slurm or pod or _DISTRIBUTED.value):
    return
  how = f'--coordinator={given[0]}' if given[0] else 'SLURM' if slurm else 'the TPU slice'
  try:
    jax.distributed.initialize(*given)
  except Exception as e:  # timeouts, missing variables, refused connections: jax and grpc raise many types
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
    raise UserError(
      f'the processes did not find each other through {how} ({reason}). Is the same command running on every host, and can they reach the first one? '
      'Elsewhere give --coordinator=HOST:PORT --processes=N --process=I.'
    ) from e


def use_compilation_cache() -> None:
  """Compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
  import jax

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'beitv2_jax' / 'xla'))


def parse(argv: list[str]) -> list[str]:
  """absl's parser with one-line errors: config files and recipe arguments fail in many ways."""
  for arg in argv:
    path = arg.removeprefix('--config=').split(':')[0]
    if path != arg.split(':')[0] and not Path(path).is_file():
      raise UserError(f'no config file {path}; recipes are in configs/, as configs/vqkd_b16.py.')
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
    named = re.search(r'UserError: (.*)', str(e))  # raised in a recipe, wrapped by absl
    if named:
      raise UserError(named[1]) from e
    key = str(e).strip('"\'')
    guilty = next((a for a in argv if isinstance(e, (AttributeError, KeyError)) and key in a), None)
    raise UserError(
      f'unknown config key in {guilty}; the keys are in beitv2_jax/config.py and the recipe.' if guilty else str(e).splitlines()[0]
    ) from e


def given_config():
  if CONFIG.value is None:
    raise UserError('give --config=FILE, such as --config=configs/vqkd_b16.py; recipes are in configs/.')
  return CONFIG.value


def train(_) -> None:
  config = given_config()
  if not _WORKDIR.value:
    raise UserError('give --workdir=DIR: where checkpoints and metrics go, and what a stopped run goes on from.')
  if '://' in _WORKDIR.value:
    raise UserError(f'--workdir={_WORKDIR.value}: give a directory; mount a bucket (gcsfuse) where you want to write to one.')
  from beitv2_jax import train

  use_compilation_cache()
  start_distributed()
  train.run(config, _WORKDIR.value)


def entry(main: Callable = train) -> None:
  """`main` with one-line errors: 2 is bad input, 1 a run that failed, 130 and 143 a signal after which state was saved."""
  try:
    app.run(main, flags_parser=parse)
  except UserError as e:
    sys.exit(_error(e, 2))
  except (FloatingPointError, SaveError) as e:
    sys.exit(_error(e, 1))


def _error(e: Exception, code: int) -> int:
  print(f'error: {e}', file=sys.stderr)
  return code


if __name__ == '__main__':
  entry()
