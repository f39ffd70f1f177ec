"""How random parameters start, and how those of a whole model are drawn together.

XLA takes as long to compile one draw of random numbers as another, whatever its size, and a model has one for every matrix:
half a minute of compilation before training starts. `in_one_draw` makes one draw for each kind and shape instead.
"""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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

  Inside `in_one_draw` it gives zeros, which are replaced at the end.
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


def in_one_draw(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  """`init(key)`, a tree of parameters, with the numbers of all its `Draw`s drawn together: one draw a kind and shape.

  Made to run under jit. The numbers differ from those that `init(key)` alone gives; their distributions do not.
  """
  waiting: list[tuple[jax.Array, Draw]] = []
  token = _waiting.set(waiting)
  try:
    tree = init(key)
  finally:
    _waiting.reset(token)
  groups: dict[tuple, list[tuple[jax.Array, Draw]]] = {}
  for placeholder, draw in waiting:
    shape = placeholder.shape if placeholder.size >= SMALL else None
    groups.setdefault((draw.distribution, shape, placeholder.dtype), []).append((placeholder, draw))
  values: dict[int, jax.Array] = {}
  keys = jax.random.split(key, max(len(groups), 1))
  for group_key, ((distribution, shape, dtype), members) in zip(keys, groups.items()):
    sample = DISTRIBUTIONS[distribution]
    if shape is not None:
      numbers = list(sample(group_key, (len(members), *shape), dtype))
    else:
      sizes = [placeholder.size for placeholder, _ in members]
      flat, start, numbers = sample(group_key, (sum(sizes),), dtype), 0, []
      for (placeholder, _), size in zip(members, sizes):
        numbers.append(flat[start : start + size].reshape(placeholder.shape))
        start += size
    values |= {id(placeholder): draw.scale * x for (placeholder, draw), x in zip(members, numbers)}
  return jax.tree.map(lambda leaf: values.get(id(leaf), leaf), tree)
