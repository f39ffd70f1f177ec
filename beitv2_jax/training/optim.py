"""Schedule and optimizer. What decays is decided by parameter path (official optim_factory)."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from beitv2_jax.weights import trees


def cosine_schedule(lr: float, min_lr: float, warmup: int, steps: int) -> Callable[[Any], jax.Array]:
  """The official per-step schedule: 0 at step 0, `lr` at step warmup-1 and again at warmup, cosine to just above min_lr."""

  def schedule(step):
    t = jnp.asarray(step, jnp.float32)
    rising = lr * t / max(warmup - 1, 1)
    progress = (t - warmup) / max(steps - warmup, 1)
    falling = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(math.pi * progress))
    return jnp.where(t < warmup, rising, falling)

  return schedule


def linear_schedule(lr: float, warmup: int, steps: int) -> Callable[[Any], jax.Array]:
  """mmsegmentation's 'poly' of power 1: down to 0 at the last step, times 1 - (1 - t/warmup)(1 - 1e-6) in the first `warmup` steps."""

  def schedule(step):
    t = jnp.asarray(step, jnp.float32)
    rising = 1 - (1 - t / max(warmup, 1)) * (1 - 1e-6)
    return lr * (1 - t / max(steps, 1)) * jnp.where(t < warmup, rising, 1.0)

  return schedule


def decay_mask(params: Any, no_decay: Sequence[str]) -> Any:
  """True where weight decay applies: not for vectors, biases and paths that match a pattern of `no_decay`."""
  patterns = [re.compile(p) for p in no_decay]

  def decays(path, x):
    name = trees.path_name(path)
    return x.ndim > 1 and not name.endswith('bias') and not any(p.fullmatch(name) for p in patterns)

  return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, decay: float) -> Any:
  """Layer-wise learning rate decay: the factor of every parameter, decay^(L+1-i) for L blocks.

  i is 0 for the tokens, positions and patch embedding of the backbone, b+1 for its block b (from 0), L+1 for all the rest.
  """
  names = [re.match(r'backbone/block_(\d+)/', name) for name in trees.flatten(params)]
  depth = len({m[1] for m in names if m})

  def scale(path, x):
    name = trees.path_name(path)
    if block := re.match(r'backbone/block_(\d+)/', name):
      layer = int(block[1]) + 1
    else:
      layer = 0 if re.match('backbone/(cls_token|mask_token|pos_embed|patch_embed/)', name) else depth + 1
    return decay ** (depth + 1 - layer)

  return jax.tree_util.tree_map_with_path(scale, params)


def global_norm(arrays: Any) -> jax.Array:
  """√ of the sum of all squares, as optax.global_norm. Squares of one shape are added up before they are summed: a TPU takes a microsecond for
  a sum however few the numbers, and a model has hundreds of arrays."""
  squares: dict[tuple, jax.Array] = {}
  for x in jax.tree.leaves(arrays):
    squares[x.shape] = jnp.square(x) + squares.get(x.shape, 0.0)
  return jnp.sqrt(sum(x.sum() for x in squares.values()))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """torch's clip_grad_norm_: factor min(1, max_norm / (norm + 1e-6))."""

  def scale(grads: Any) -> Any:
    factor = jnp.minimum(1.0, max_norm / (global_norm(grads) + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)

  return optax.stateless(lambda grads, _: scale(grads))


def scale_by_adam(b1: float, b2: float, eps: float, first_moment: Any = jnp.float32) -> optax.GradientTransformation:
  """Adam's direction m̂/(√v̂ + eps), as optax.scale_by_adam but with the bias corrections to fp32's last digit.

  optax takes 1 - b**t in fp32, which for b2 = 0.999 is off by 1.3e-5 at the first step; torch takes it in fp64. `first_moment` is the
  type it is kept in. (The second one moves by a thousandth a step, which bf16 would round away.)
  """

  def init(params):
    zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(first_moment), zeros(None))

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    count = state.count + 1
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
    c1, c2 = (-jnp.expm1(count * math.log(b)) if b else 1.0 for b in (b1, b2))
    kept = jax.tree.map(lambda m: m.astype(first_moment), mu)
    return jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu), optax.ScaleByAdamState(count, kept, nu)

  return optax.GradientTransformation(init, update)  # ty: ignore[invalid-argument-type]


def make(config: Any, steps: int, warmup: int) -> tuple[optax.GradientTransformation, Callable]:
  """AdamW with decoupled decay: p ← p - lr·scale·(m̂/(√v̂+eps) + wd·p). Returns it and the schedule, for logging."""
  schedule = (
    linear_schedule(config.lr, warmup, steps) if config.schedule == 'linear' else cosine_schedule(config.lr, config.min_lr, warmup, steps)
  )
  by_layer = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, layer_scales(params, config.layer_decay)))
  tx = optax.chain(
    clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
    scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.first_moment)),
    optax.add_decayed_weights(config.weight_decay, mask=lambda p: decay_mask(p, config.no_decay)),
    by_layer if config.layer_decay < 1 else optax.identity(),
    optax.scale_by_learning_rate(schedule),
  )
  return tx, schedule
