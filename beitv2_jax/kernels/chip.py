"""Which chip a program is made for, and which of our kernels work on the chip of this process."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

try:  # deprecated since jax 0.11, and to go
  from jax.experimental.pallas import triton
except ImportError:
  triton: Any = None

KERNELS = ('attention', 'layer norm', 'TF32 product')
WITH_TRITON = ('attention', 'layer norm')  # on GPUs
refused: dict[str, str] = {}  # kernels that are left alone in this process, and why


def platform() -> str:
  """'tpu', 'gpu' or 'cpu': of the mesh set by `jax.set_mesh`; '' without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return '' if mesh.empty else mesh.abstract_device.platform


def kind() -> str:
  """What JAX calls the chip of the mesh, such as 'TPU v5 lite'; '' without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return '' if mesh.empty else mesh.abstract_device.device_kind


def erf_is_cheap() -> bool:
  """Whether erf costs no more than tanh here: on v6e, which has an instruction for it. So has tpu7x, where tanh costs less."""
  return kind().startswith('TPU v6')


def rounded_products() -> bool:
  """Whether products of fp32 round their inputs to bf16 here: on a TPU mesh, unless a higher precision was asked for."""
  return platform() == 'tpu' and jax.config.jax_default_matmul_precision in (None, 'default', 'bfloat16')  # ty: ignore[missing-attribute]


def made_anew(x: jax.Array) -> jax.Array:
  """x, from which the compiler makes again what it has made of x before: inside a product that costs less than to keep and read it.
  Not on GPUs, whose compiler can't make it inside a product."""
  return x if platform() == 'gpu' else jax.lax.optimization_barrier(x)


def kept_apart(x: jax.Array) -> jax.Array:
  """x, which the compiler does not make as a part of what uses it, on TPUs."""
  return jax.lax.optimization_barrier(x) if platform() == 'tpu' else x


def check(kernel: str, ours: Callable, plain: Callable, *args, tolerance: float = 0.03) -> None:
  """Compares `ours(*args)` with `plain` of the same in fp32, on this process's chip. Refuses the kernel if it fails, or is off by more
  than `tolerance` of the largest value."""
  if kernel in WITH_TRITON and jax.default_backend() == 'gpu' and triton is None:
    refused[kernel] = f'jax {jax.__version__} has no Triton for Pallas any more; plain XLA, which is slower, takes over'
    return
  try:
    mesh = jax.make_mesh((1, 1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
    with jax.set_mesh(mesh):
      a = jax.jit(ours)(*args)
      with jax.default_matmul_precision('highest'):
        b = jax.jit(plain)(*(x.astype(jnp.float32) for x in args))
    off = [float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in zip(a, b, strict=True)]
    wrong = '' if all(o < tolerance for o in off) else f'it is off by {max(off, key=lambda o: (o != o, o)):.1%}'  # NaN counts too
  except Exception as e:  # whatever the compiler says
    wrong = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
  if wrong:
    refused[kernel] = wrong


def agree() -> None:
  """What one process refuses, all do: they must run the same program."""
  if jax.process_count() > 1:
    everywhere = multihost_utils.process_allgather(np.array([k in refused for k in KERNELS]))
    for kernel in np.array(KERNELS)[everywhere.any(0)]:
      refused.setdefault(str(kernel), 'it failed in another process')
