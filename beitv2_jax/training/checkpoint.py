"""Orbax checkpoints: workdir/checkpoints/<step>/ with `variables` (what the next stage opens) and `optimizer`.

Orbax writes to a temporary name and renames at the end, so a checkpoint that can be seen is complete.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

from beitv2_jax.errors import SaveError
from beitv2_jax.weights import trees
from beitv2_jax.weights.stages import complete_steps, saved_shapes

logging.set_verbosity(logging.WARNING)  # Orbax reports every phase of a save


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0):
    self.folder = Path(workdir).absolute() / 'checkpoints'
    self.manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
      ),
      item_handlers={k: ocp.StandardCheckpointHandler() for k in ('variables', 'optimizer')},
    )

  def latest(self) -> int | None:
    return self.manager.latest_step()

  def save(self, step: int, variables: Any, optimizer: Any) -> None:
    """Starts writing; returns once the arrays are copied. An earlier save's failure shows here."""
    args = ocp.args.Composite(variables=ocp.args.StandardSave(variables), optimizer=ocp.args.StandardSave(optimizer))
    self._check(f'before step {step}')
    try:
      self.manager.save(step, args=args, force=True)
    except Exception as e:  # disk full, no permission, lost mount: Orbax and tensorstore raise many types
      raise self._failed(step, e) from e

  def _check(self, which: str) -> None:
    """Raises SaveError if a save in the background has failed."""
    try:
      self.manager.check_for_errors()
    except Exception as e:
      raise self._failed(which, e) from e

  def wait(self) -> None:
    """Until everything is on disk."""
    try:
      self.manager.wait_until_finished()
    except Exception as e:
      raise self._failed('in the background', e) from e
    self._check('in the background')

  def _failed(self, step, e) -> SaveError:
    try:
      self.manager.wait_until_finished()  # an earlier save may still be on its way
    except Exception:  # this save is the one to report
      pass
    last = [s for s in complete_steps(self.folder) if s != step]
    good = f'The last good checkpoint is step {max(last)}' if last else 'There is no earlier checkpoint'
    reason = (str(e).splitlines() or [type(e).__name__])[0][:300]
    return SaveError(
      f'could not save checkpoint {step} in {self.folder}: {reason}. {good}; free space or mend the disk, then run the same command to go on.'
    )

  def restore(self, step: int, variables: Any, optimizer: Any) -> tuple[Any, Any]:
    """Arrays with the shapes and shardings of the given abstract trees; another layout's checkpoint is resharded."""
    trees.check_same(
      saved_shapes(self.folder / str(step) / 'variables'),
      variables,
      f'the checkpoint {self.folder}/{step}',
      'the model of this config',
      'Use the config it was made with or another workdir.',
    )
    restored = self.manager.restore(
      step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(variables), optimizer=ocp.args.StandardRestore(optimizer))
    )
    return restored['variables'], restored['optimizer']

  def close(self) -> None:
    self.manager.close()
