"""What a task is. The loop in training/loop.py knows nothing but this interface."""

from collections.abc import Sequence
from typing import Any

import jax

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.weights import adapt


class Task:
  """Base of all tasks: what a task can do, with what most need by default."""

  config: Any
  title: str  # what is trained, in words
  headline: tuple[str, ...] = ()  # the figures besides the loss that matter most while this trains

  def init(self, key: jax.Array) -> dict:
    """{'params': ..., and mutable collections such as 'codebook'}, with logical axis names in flax boxes."""
    raise NotImplementedError

  def adopt(self, theirs: Any, variables: Any, fresh: Any) -> Any:
    """What `init_from` means: the variables of another stage (its config is `theirs`) in the shape of this one's `fresh` ones.

    By default a model of the same task, whose position tables are resampled if its patch grid differs.
    """
    if theirs.task != self.config.task:
      raise UserError(f'init_from holds a {theirs.task} stage; a {self.config.task} stage starts from one of its own kind.')
    grids = config_lib.patch_grid(theirs), config_lib.patch_grid(self.config)
    return variables if grids[0] == grids[1] else variables | {'params': adapt.fit_grid(variables['params'], *grids)}

  @staticmethod
  def transforms(config: Any, train: bool, source: Any) -> Sequence:
    """Callables (record, rng) → record; see data/transforms.py. `source.classes` names the labels."""
    raise NotImplementedError

  def look_at(self, sources: dict[str, Any]) -> list[str]:
    """What the data are understood to be, in lines to be read before training; `sources` has 'train' and 'eval'. Raises UserError if
    that cannot be what is meant."""
    return [f'data: {len(sources["train"]):,} training and {len(sources["eval"]):,} evaluation images of {self.config.data.source}']

  def warm_start(self, params: Any, model_state: Any, frozen: Any, batch: dict, key: jax.Array) -> Any:
    """A better model_state from the first global batch, once, before step 0 (k-means codebook). Jitted."""
    return model_state

  def loss(self, params: Any, model_state: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[jax.Array, tuple[Any, dict]]:
    """(scalar, (statistics for `update`, scalar metrics)) of a training batch, or of a part of one."""
    raise NotImplementedError

  def update(self, model_state: Any, stats: Any, key: jax.Array, params: Any) -> tuple[Any, dict]:
    """(new model_state, scalar metrics) from the statistics of a step's parts, stacked along a new first axis, and the new parameters."""
    return model_state, {}

  def warning(self, step: int, values: dict[str, float]) -> str | None:
    """What is wrong with these training metrics and what to do, if anything is. Said once a run."""
    return None

  def evaluate(self, params: Any, model_state: Any, frozen: Any, batch: dict) -> dict[str, jax.Array]:
    """{name: [B, ...]} values of every example; the loop averages them over the valid ones."""
    raise NotImplementedError

  def samples(self, params: Any, model_state: Any, frozen: Any, batch: dict) -> dict[str, jax.Array]:
    """What the model makes of a few evaluation images, to be drawn by reports/draw.samples: `image`, and what goes with it."""
    return {}

  def summarize(self, means: dict[str, Any]) -> dict[str, float]:
    """Averages over the evaluation set (numpy, float64) → scalars to report."""
    return {k: float(v) for k, v in means.items()}

  def finish(self, params: Any, workdir: Any) -> None:
    """What the stage leaves beside its checkpoint."""
