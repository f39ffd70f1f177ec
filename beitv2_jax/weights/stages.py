"""The weights that a stage left in its workdir, read without the rest of its training: config.json and the newest `variables`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError


def complete_steps(folder: Path) -> list[int]:
  """Steps whose checkpoint was renamed to its final name, which Orbax does last."""
  return [int(p.name) for p in folder.glob('*') if p.name.isdigit() and (p / 'variables').is_dir()]


def saved_shapes(folder: Path) -> Any:
  """The tree of a saved item, with array metadata for leaves."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax looks for metadata of a whole checkpoint here, and warns
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.metadata(folder).item_metadata.tree
  finally:
    logging.set_verbosity(level)


def write_variables(workdir: str | Path, step: int, variables: Any) -> None:
  """A checkpoint without optimizer state, as an importer makes it."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(workdir).absolute() / 'checkpoints' / str(step) / 'variables', variables)


def load_variables(workdir: str | Path, what: str = 'a workdir of a finished stage') -> tuple[Any, Any, int]:
  """(config, variables as numpy arrays, step) of the newest checkpoint in `workdir`. Raises UserError if there is none."""
  config = config_lib.load(workdir, what)
  folder = Path(workdir).expanduser().absolute() / 'checkpoints'
  steps = complete_steps(folder)
  if not steps:
    raise UserError(f'no complete checkpoint in {folder}: expected {what}; has its training saved yet?')
  path = folder / str(max(steps)) / 'variables'
  try:
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved_shapes(path))
    with ocp.PyTreeCheckpointer() as checkpointer:
      variables = checkpointer.restore(path, restore_args=restore_args)
  except Exception as e:  # missing or cut files: Orbax and tensorstore raise many types
    raise UserError(f'the checkpoint {path} is damaged ({(str(e).splitlines() or [type(e).__name__])[0][:200]}).') from e
  return config, variables, max(steps)
