"""The device mesh, and where every array lives on it.

Parameters carry logical axis names (embed, mlp, heads, vocab); the config's rules map those to the mesh axes `data` and
`model`. Under jit a sum over the sharded batch is the global sum, so no other file needs to know how many devices there are.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.errors import UserError

SMALL = 2**16  # to put so few numbers together costs more than to update them on every device


def make_mesh(data: int = -1, model: int = 1, devices: Any = None) -> Mesh:
  """A mesh of `data` x `model` devices. Raises UserError if the devices of a model do not fit into one process."""
  devices = jax.devices() if devices is None else devices
  a_process = len(devices) // len({d.process_index for d in devices})
  data = len(devices) // model if data < 0 else data
  # Auto axes: transformers' Flax models don't run under the newer Explicit ones.
  devices, auto = devices[: data * model], (AxisType.Auto, AxisType.Auto)
  mesh = jax.make_mesh((data, model), ('data', 'model'), axis_types=auto, devices=devices)
  if _share_rows(mesh.devices):  # the fastest ring of a slice may go through several hosts
    mesh = Mesh(np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(data, model), ('data', 'model'), axis_types=auto)
  if _share_rows(mesh.devices):
    raise UserError(
      f'mesh.model={model} needs devices of several processes (hosts), but each of these reads images of its own: '
      f'use a number that divides the {a_process} devices of a process.'
    )
  return mesh


def _share_rows(devices: np.ndarray) -> bool:
  """Whether the devices of a row, which see the same images, belong to several processes."""
  return any(len({device.process_index for device in row}) > 1 for row in devices)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def variable_shardings(mesh: Mesh, rules: Any, init: Callable, *args) -> tuple[Any, Any]:
  """(abstract unboxed variables, their shardings) of `init(*args)`, from the logical names in the model."""
  boxed = jax.eval_shape(init, *args)
  rules = tuple((name, axis) for name, axis in rules)
  specs = nn.get_partition_spec(boxed)
  abstract = nn.unbox(boxed)

  def one(path, x, spec):
    axes = (nn.logical_to_mesh_axes(spec, rules) if isinstance(spec, P) else None) or P()
    for size, axis in zip(x.shape, axes):
      if axis is not None and size % mesh.shape[axis]:
        raise UserError(
          f'{jax.tree_util.keystr(path)} {x.shape} does not divide over mesh axis {axis!r} of {mesh.shape[axis]}; change mesh.{axis} or mesh.rules.'
        )
    return NamedSharding(mesh, axes)

  return abstract, jax.tree_util.tree_map_with_path(one, abstract, specs)


def split_over_data(mesh: Mesh, params: Any, shardings: Any) -> Any:
  """`shardings` of abstract `params`, with large ones cut up over `data` as well, along the first axis that divides."""
  parts = mesh.shape['data']

  def one(x, sharding):
    axes = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    free = [i for i, (size, axis) in enumerate(zip(x.shape, axes)) if axis is None and size % parts == 0]
    if parts == 1 or 'data' in axes or not free or x.size < SMALL:
      return sharding
    axes[free[0]] = 'data'
    return NamedSharding(mesh, P(*axes))

  return jax.tree.map(one, params, shardings)


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Any, shardings: Any) -> tuple[Any, Any]:
  """(abstract optimizer state, its shardings): moments lie where their parameters lie."""
  abstract = jax.eval_shape(tx.init, params)
  placed = optax.tree_utils.tree_map_params(tx, lambda _, s: s, abstract, shardings, transform_non_params=lambda _: replicated(mesh))
  return abstract, placed


def split_rows(mesh: Mesh) -> NamedSharding:
  """Arrays whose first axis is the batch, in parts over `data`."""
  return NamedSharding(mesh, P('data'))


def unbox(tree: Any) -> Any:
  return nn.unbox(tree)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's part of a batch → global arrays split over the `data` axis."""
  return {k: jax.make_array_from_process_local_data(split_rows(mesh), np.asarray(v)) for k, v in batch.items()}


def put(tree: Any, shardings: Any) -> Any:
  """Host arrays as global ones under a tree of shardings (all processes must pass the same values)."""

  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, tree, shardings)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
  """The same host arrays on every device."""
  return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))
