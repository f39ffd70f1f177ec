"""The checkpoints of a run: workdir/checkpoints/<step>/ with `variables` (what the next stage opens), `optimizer` and `checksums`.

Saves are written in the background, under a temporary name that is changed at the end. What is read is held to its checksums
(weights/checkpoint_files.py); a damaged checkpoint is set aside, and the newest whole one taken.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from beitv2_jax import storage
from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.weights import checkpoint_files, stages, trees
from beitv2_jax.weights.checkpoint_files import Damaged


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0):
    self.folder = storage.place(workdir) / 'checkpoints'
    self.keep, self.keep_every = keep, keep_every
    self._manager: ocp.CheckpointManager | None = None

  @property
  def manager(self) -> ocp.CheckpointManager:
    """Orbax's view of the folder, opened when damaged checkpoints are out of it."""
    if self._manager is None:
      self._manager = checkpoint_files.manager(self.folder, self.keep, self.keep_every)
    return self._manager

  def latest(self) -> int | None:
    return max(checkpoint_files.steps(self.folder), default=None)

  def save(self, step: int, variables: Any, optimizer: Any) -> None:
    """Starts writing; returns once the arrays are copied. An earlier save's failure shows here."""
    self._check(f'before step {step}')
    try:
      self.manager.save(step, args=checkpoint_files.to_save(variables=variables, optimizer=optimizer), force=True)
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

  def _failed(self, step: int | str, e: Exception) -> SaveError:
    try:
      self.manager.wait_until_finished()  # an earlier save may still be on its way
    except Exception:  # this save is the one to report
      pass
    reason = 'No space left on device' if 'No space left' in str(e) else (str(e).splitlines() or [type(e).__name__])[0][:300]
    return SaveError(f'could not save checkpoint {step} in {self.folder}: {reason}. {self.last_good(but=step)}')

  def last_good(self, but: int | str | None = None) -> str:
    """What a run that cannot go on says last."""
    last = [s for s in checkpoint_files.steps(self.folder) if s != but]
    good = f'The last good checkpoint is step {last[0]}' if last else 'There is no earlier checkpoint'
    return f'{good}; free space or mend the disk, then run the same command to go on.'

  def restore(self, variables: Any, optimizer: Any) -> tuple[int, Any, Any, list[str]] | None:
    """(step, variables, optimizer, what to tell the user) of the newest whole checkpoint; None if there is no checkpoint at all.

    The arguments are abstract trees with the shapes and shardings wanted; another layout's checkpoint is resharded. Damaged checkpoints
    that are newer are renamed to damaged-STEP. All processes must call it. Raises UserError if none is whole, or if it is another model's.
    """
    damaged: dict[int, Damaged] = {}
    for step in checkpoint_files.steps(self.folder):
      path = self.folder / str(step)
      try:
        self._check_same(path, variables=variables, optimizer=optimizer)
        restored = checkpoint_files.read(path, 'variables', variables), checkpoint_files.read(path, 'optimizer', optimizer)
      except Damaged as e:
        damaged[step] = e
        continue
      return step, *restored, [self._set_aside(other, why, step) for other, why in damaged.items()]
    if damaged:
      raise UserError(stages.no_whole_checkpoint(self.folder, damaged))
    return None

  def _check_same(self, path: Path, **targets: Any) -> None:
    contents = checkpoint_files.contents(path)
    for item, target in targets.items():
      trees.check_same(
        contents.get(item, {}),
        target,
        f'the checkpoint {path}',
        'the model of this config' if item == 'variables' else "this config's optimizer",
        'Use the config it was made with or another workdir.',
      )

  def _set_aside(self, step: int, why: Damaged, taken: int) -> str:
    name = checkpoint_files.free_name(self.folder, f'damaged-{step}')
    if jax.process_index() == 0:
      (self.folder / str(step)).rename(self.folder / name)
    multihost_utils.sync_global_devices(f'damaged checkpoint {step}')
    lost = f'{step - taken} steps are done again'
    return f'warning: checkpoint {step} is damaged ({why}); it is now {self.folder / name}. Going on from step {taken}: {lost}.'

  def close(self) -> None:
    if self._manager is not None:
      self._manager.close()
