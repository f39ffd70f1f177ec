"""What to ask of the compiler, XLA, for each kind of chip."""

import functools
import operator
import sys
from typing import Any

import jax


def asked_of_tpus(kind: str) -> list[dict[str, Any]]:
  """What XLA for this kind of TPU does not do by itself where the state is split over the chips (docs/estimates.md, "Flags of the
  compiler"). Options in one dictionary only help together."""
  # Sum a matrix's gradient over the chips after its product, and not in between parts of it.
  asked: list[dict[str, Any]] = [{'xla_tpu_enable_windowed_einsum_for_reduce_scatter': False}]
  # Gather parameters as such, beside computing. Otherwise arrays that are zero but for a chip's own part are summed.
  asked.append({'xla_tpu_prefer_async_allgather_to_allreduce': True})
  if kind == 'TPU v5 lite':  # the compiler refuses it on others
    # Sum gradients beside computing, matrix by matrix. Otherwise all are summed when the last one is there.
    asked.append(
      {
        'xla_enable_async_all_reduce': True,
        'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
        'xla_jf_crs_combiner_threshold_in_bytes': 1_000_000,
      }
    )
  return asked


def options(config: Any, runs_once: bool = False, device: Any = None, quick: bool = False) -> dict[str, Any] | None:
  """What to ask of XLA, as jax.jit takes it, for this process's devices or for one that is not here: how to work together on TPUs, less
  work on what is to be `quick` (everything, with `quick_compile`), and on CPUs on a program that `runs_once`.

  The programs stay the same, with another rounding here and there.
  """
  here, device, quick = device is None, device or jax.devices()[0], quick or config.get('quick_compile', False)
  if device.platform == 'cpu' and quick:
    return dict(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False)
  if device.platform == 'cpu' and runs_once:
    return dict(xla_backend_optimization_level=1)
  if device.platform == 'tpu':
    level = dict(optimization_level=19) if quick else {}  # XLA's O1, as a number: jax 0.10 takes no name
    together = taken(device.device_kind) if here else functools.reduce(operator.or_, asked_of_tpus(device.device_kind))
    return level | together
  return None


def first_steps(config: Any) -> int:
  """How many steps of a run are made by a program that is quick to compile, while the fast one is being compiled (training/programs.py)."""
  if config.get('quick_compile', False):
    return 0  # they all are, and there is one program only
  asked = config.get('quick_steps', -1)
  return asked if asked >= 0 else 10 * (jax.devices()[0].platform == 'tpu')


@functools.cache
def taken(kind: str) -> dict[str, Any]:
  """What of `asked_of_tpus` this process's compiler takes: they are libtpu's own options, and it may drop one. Warns of the others."""
  known = {}
  for group in asked_of_tpus(kind):
    try:
      jax.jit(lambda x: x + 1, compiler_options=group).lower(0).compile()
      known |= group
    except jax.errors.JaxRuntimeError as e:
      print(f'the TPU compiler does not take {", ".join(group)} (steps may be slower): {str(e).splitlines()[0][:200]}', file=sys.stderr)
  return known
