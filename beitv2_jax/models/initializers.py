"""How random parameters start, and how those of a whole model are drawn together.

XLA takes as long on CPUs to compile one draw of random numbers as another, whatever its size, and a model has one for every matrix:
half a minute of compilation before training starts. `drawn_together` makes one draw for each kind and shape instead.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.kernels import chip

DISTRIBUTIONS: dict[str, Callable] = {
  'normal': jax.random.normal,
  'truncated': lambda key, shape, dtype: jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype),  # its variance is not corrected
  'uniform': lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1.0, 1.0),
}
SMALL = 2**16  # arrays with fewer numbers are drawn as one, whatever their shapes; larger ones keep theirs, so that they can be sharded

_waiting: contextvars.ContextVar[list[tuple[jax.Array, 'Draw']] | None] = contextvars.ContextVar('waiting', default=None)


@dataclasses.dataclass(frozen=True)
class Draw:
  """A Flax initialiser: `scale` times numbers of a distribution (one of DISTRIBUTIONS).

  Inside `drawn_together` it gives zeros, which are replaced at the end.
  """

  distribution: str
  scale: float = 1.0

  def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    waiting = _waiting.get()
    if waiting is None:
      return self.scale * DISTRIBUTIONS[self.distribution](key, shape, dtype)
    placeholder = jnp.zeros(shape, dtype)
    waiting.append((placeholder, self))
    return placeholder

  def scaled(self, factor: float) -> 'Draw':
    return dataclasses.replace(self, scale=self.scale * factor)


def uniform(bound: float) -> Draw:
  """U(-bound, bound); torch's default layers use bound = 1/sqrt(fan_in)."""
  return Draw('uniform', bound)


def drawn_together(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  """`init(key)`, a tree of parameters, with the numbers of all its `Draw`s drawn at the end: on CPUs one draw a kind and shape.

  Made to run under jit. Other chips' compilers take longer for a few large draws than for many; the numbers are the same either way.
  They differ from those that `init(key)` alone gives; their distributions do not.
  """
  waiting: list[tuple[jax.Array, Draw]] = []
  token = _waiting.set(waiting)
  try:
    tree = init(key)
  finally:
    _waiting.reset(token)
  keys = jax.random.split(key, max(len(waiting), 1))
  groups: dict[tuple, list[int]] = {}
  for i, (placeholder, draw) in enumerate(waiting):
    shape = placeholder.shape if placeholder.size >= SMALL else None
    groups.setdefault((draw.distribution, shape, placeholder.dtype), []).append(i)
  values: dict[int, jax.Array] = {}
  for (distribution, shape, dtype), members in groups.items():
    if shape is None:  # small ones of many shapes: as many numbers for each as the largest needs
      shape = (max(waiting[i][0].size for i in members),)
    draw_one = functools.partial(DISTRIBUTIONS[distribution], shape=shape, dtype=dtype)
    drawn = (
      jax.vmap(draw_one)(keys[np.array(members)])
      if (chip.platform() or jax.default_backend()) == 'cpu'
      else [draw_one(keys[i]) for i in members]
    )
    for i, numbers in zip(members, drawn):
      placeholder, draw = waiting[i]
      values[id(placeholder)] = draw.scale * numbers.reshape(-1)[: placeholder.size].reshape(placeholder.shape)
  return jax.tree.map(lambda leaf: values.get(id(leaf), leaf), tree)
