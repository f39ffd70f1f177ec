"""Schedule and optimizer. What decays is decided by parameter path (official optim_factory)."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beitv2_jax import handoff


def cosine_schedule(lr: float, min_lr: float, warmup: int, steps: int) -> Callable[[Any], jax.Array]:
  """The official per-step schedule: 0 at step 0, `lr` at step warmup-1 and again at warmup, cosine to just above min_lr."""

  def schedule(step):
    t = jnp.asarray(step, jnp.float32)
    rising = lr * t / max(warmup - 1, 1)
    progress = (t - warmup) / max(steps - warmup, 1)
    falling = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(math.pi * progress))
    return jnp.where(t < warmup, rising, falling)

  return schedule


def decay_mask(params: Any, no_decay: Sequence[str]) -> Any:
  """True where weight decay applies: not for vectors, biases and paths that match a pattern of `no_decay`."""
  patterns = [re.compile(p) for p in no_decay]

  def decays(path, x):
    name = handoff.path_name(path)
    return x.ndim > 1 and not name.endswith('bias') and not any(p.fullmatch(name) for p in patterns)

  return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """torch's clip_grad_norm_: factor min(1, max_norm / (norm + 1e-6))."""

  def update(grads, state, params=None):
    factor = jnp.minimum(1.0, max_norm / (optax.global_norm(grads) + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make(c: Any, steps: int, warmup: int) -> tuple[optax.GradientTransformation, Callable]:
  """AdamW with decoupled decay: p ← p - lr·(m̂/(√v̂+eps) + wd·p). Returns it and the schedule, for logging."""
  schedule = cosine_schedule(c.lr, c.min_lr, warmup, steps)
  tx = optax.chain(
    clip_by_global_norm(c.clip_norm) if c.clip_norm > 0 else optax.identity(),
    optax.scale_by_adam(c.b1, c.b2, c.eps),
    optax.add_decayed_weights(c.weight_decay, mask=lambda p: decay_mask(p, c.no_decay)),
    optax.scale_by_learning_rate(schedule),
  )
  return tx, schedule
