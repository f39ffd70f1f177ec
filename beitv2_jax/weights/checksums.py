"""A checksum of an array's bits that does not depend on how the array is spread over devices or processes.

Every word is multiplied by an odd number that its position determines, and the products are added modulo 2**32. So a changed bit, or
any number of changed bits in one word, always changes the sum; anything else goes unseen once in four thousand million times. Sums
modulo 2**32 come out the same in any order, so each device adds up what it holds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from beitv2_jax.weights import trees

SMALL = 2**18
WORDS = {1: 'uint8', 2: 'uint16', 4: 'uint32'}


def of_tree(tree: Any) -> dict[str, int]:
  """{path: checksum} of all arrays of a tree: of jax arrays computed where they lie, of others on this host."""
  sums = {}
  for name, x in trees.flatten(tree).items():
    sums[name] = _of_array(x)
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:  # sums over devices that run at once can wait for each other for ever
      jax.block_until_ready(sums[name])
  return {name: int(x) for name, x in jax.device_get(sums).items()}


def sample(tree: Any) -> int:
  """One checksum of all but the large arrays of a tree of numpy arrays: quick to take, and training moves those, too."""
  return sum(int(_of_array(x)) for x in trees.flatten(tree).values() if x.size <= SMALL) % 2**32


def _of_array(x: Any) -> Any:
  if isinstance(x, jax.Array):
    return _on_devices(x.sharding)(x)
  x = np.asarray(x)
  if x.dtype.itemsize == 8:  # two words a number
    x = np.ascontiguousarray(x)[..., None].view(np.uint32)
  words = x.astype(np.uint8) if x.dtype == bool else np.ascontiguousarray(x).view(WORDS[x.dtype.itemsize]).reshape(x.shape)
  return _sum(words, np)


@functools.cache
def _on_devices(sharding: Any) -> Any:
  everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None

  def one(x):
    words = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])
    return _sum(words, jnp)

  return jax.jit(one, out_shardings=everywhere)


def _sum(words: Any, xp: Any) -> Any:
  """sum over i of words[i] * (2 * hash(i) + 1), modulo 2**32, with i counted in row-major order."""
  index, stride = xp.zeros((1,) * words.ndim, xp.uint32), 1
  for axis in reversed(range(words.ndim)):
    along = xp.arange(words.shape[axis], dtype=xp.uint32) * np.uint32(stride % 2**32)
    index = index + along.reshape([-1 if a == axis else 1 for a in range(words.ndim)])
    stride *= words.shape[axis]
  mixed = index * np.uint32(2654435769)
  mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(2246822519)
  return (words.astype(xp.uint32) * (mixed | np.uint32(1))).sum(dtype=xp.uint32)
