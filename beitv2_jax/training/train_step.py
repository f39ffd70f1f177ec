"""One step of training, as a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beitv2_jax.tasks.base import Task
from beitv2_jax.training import optim
from beitv2_jax.training.train_state import StateLayout, TrainState


def make_train_step(
  task: Task, optimizer: optax.GradientTransformation, schedule: Callable, micro_batches: int, layout: StateLayout
) -> Callable:
  """Pure (state, frozen, batch, key) → (state, metrics). The gradients of the batch's `micro_batches` are averaged.

  The parameters lie as `layout.shardings` say, and are used as `layout.gathered` says; gradients come back to where the parameters lie.
  """
  place = jax.lax.with_sharding_constraint

  def step(state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> tuple[TrainState, dict]:
    key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
    params = place(state.params, layout.gathered['params'])

    def gradient(batch, key):
      loss_fn = lambda params: task.loss(params, state.model_state, frozen, batch, key)
      (loss, (stats, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      return grads, metrics | dict(loss=loss), stats

    def accumulate(total, micro_batch):
      grads, metrics, stats = gradient(*micro_batch)
      return jax.tree.map(jnp.add, total, (place(grads, layout.shardings.params), metrics)), stats

    if micro_batches == 1:
      grads, metrics, stats = gradient(batch, key)
      stats = jax.tree.map(lambda x: x[None], stats)
    else:
      # Micro-batch i takes rows i, i + micro_batches, ...: every device cuts up its own rows, and none moves.
      rows = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
      inputs = (rows, jax.random.split(key, micro_batches))
      shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], inputs))[:2]
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      (grads, metrics), stats = jax.lax.scan(accumulate, zeros, inputs)
      grads, metrics = jax.tree.map(lambda x: x / micro_batches, (grads, metrics))
    grads = place(grads, layout.shardings.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model_state, update_metrics = task.update(state.model_state, stats, update_key, params)
    metrics = metrics | update_metrics | dict(grad_norm=optim.global_norm(grads), lr=schedule(state.step))
    return TrainState(state.step + 1, params, model_state, opt_state), metrics

  return step
