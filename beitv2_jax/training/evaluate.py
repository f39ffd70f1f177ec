"""A task over a whole data set: every image counts once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.tasks.base import Task
from beitv2_jax.training import sharding


def make_eval_step(task: Task, mesh: Any, compiler_options: dict | None = None) -> Callable:
  """jitted (params, model_state, frozen, batch) → ({name: sum over valid examples}, number of valid examples)."""

  def step(params, model_state, frozen, batch):
    valid = batch['valid'].astype(jnp.float32)
    values = task.evaluate(params, model_state, frozen, batch)
    return jax.tree.map(lambda v: jnp.tensordot(valid, v.astype(jnp.float32), 1), values), valid.sum()

  return jax.jit(step, out_shardings=sharding.replicated(mesh), compiler_options=compiler_options)


def run(task: Task, eval_step: Callable, variables: tuple, batches: Iterable[dict], mesh: Any) -> dict[str, float]:
  """Averages over all valid examples of `batches` (numpy, this process's parts), through `task.summarize`."""
  sums, count = {}, 0.0
  for batch in batches:
    out, valid = jax.device_get(eval_step(*variables, sharding.put_batch(batch, mesh)))
    sums = {k: sums.get(k, 0) + np.asarray(v, np.float64) for k, v in out.items()}
    count += float(valid)
  return task.summarize({k: v / count for k, v in sums.items()})
