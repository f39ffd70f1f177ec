"""The weights that a stage left in its workdir, read without the rest of its training: config.json and the newest `variables`."""

import re
import sys
from pathlib import Path
from typing import Any

from beitv2_jax import config as config_lib
from beitv2_jax import storage
from beitv2_jax.errors import UserError
from beitv2_jax.weights import checkpoint_files
from beitv2_jax.weights.checkpoint_files import Damaged


def write_variables(workdir: str | Path, step: int, variables: Any) -> None:
  """A checkpoint without optimizer state, as an importer makes it."""
  with checkpoint_files.manager(storage.place(workdir) / 'checkpoints') as manager:
    manager.save(step, args=checkpoint_files.to_save(variables=variables), force=True)


def load_variables(workdir: str | Path, what: str = 'a workdir of a finished stage') -> tuple[Any, Any, int]:
  """(config, variables as numpy arrays, step) of the newest whole checkpoint in `workdir`, or of step N of 'WORKDIR@N'.

  Nothing is changed there. Raises UserError if there is none. Warns on stderr of damaged ones that were passed over.
  """
  workdir, _, wanted = str(workdir).rpartition('@') if re.search(r'@\d+$', str(workdir)) else (str(workdir), '', '')
  config = config_lib.load(workdir, what)
  folder = storage.place(workdir) / 'checkpoints'
  damaged: dict[int, Damaged] = {}
  steps = checkpoint_files.steps(folder)
  if wanted and int(wanted) not in steps:
    raise UserError(f'{workdir} has no checkpoint of step {wanted}; it has {", ".join(map(str, sorted(steps))) or "none"}.')
  for step in [int(wanted)] if wanted else steps:
    try:
      variables = checkpoint_files.read(folder / str(step), 'variables')
    except Damaged as e:
      damaged[step] = e
      continue
    for other, why in damaged.items():
      print(f'warning: the checkpoint {folder}/{other} is damaged ({why}); taking step {step}.', file=sys.stderr)
    return config, variables, step
  if damaged:
    raise UserError(no_whole_checkpoint(folder, damaged))
  raise UserError(f'no complete checkpoint in {folder}: expected {what}; has its training saved yet?')


def checkpoints_of(workdir: str | Path) -> tuple[Any, Any]:
  """(folder of checkpoints, config) of a workdir. Raises UserError if it is none."""
  config = config_lib.load(workdir, 'a workdir')
  folder = storage.place(workdir) / 'checkpoints'
  if not folder.is_dir():
    raise UserError(f'no checkpoints in {folder.parent}: has its training saved yet?')
  return folder, config


def no_whole_checkpoint(folder: Any, damaged: dict[int, Damaged]) -> str:
  found = '; '.join(f'{step}: {why}' for step, why in damaged.items())
  return (
    f'no checkpoint in {folder} is whole ({found}). Nothing was changed: bring them back from a copy, or begin in another --workdir. '
    'If they were made before checkpoints had checksums: python -m beitv2_jax checkpoints --from DIR --trust.'
  )
