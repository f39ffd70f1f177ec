"""How many operations of matrix products a traced program has, outside kernels of ours and inside them: two for every multiply-add.

A check on the formula of models/flops.py, and that no work vanishes into a kernel that the compiler cannot see into.
"""

import math
from typing import Any

import jax
from jax.extend import core


def count(jaxpr: Any) -> tuple[float, float]:
  """(operations of products and convolutions outside kernels, inside kernels) of a closed jaxpr, over all devices together."""
  return _count(jaxpr.jaxpr, 1, False)


def _count(jaxpr: Any, times: float, kernel: bool) -> tuple[float, float]:
  outside = inside = 0.0
  for equation in jaxpr.eqns:
    name, own = equation.primitive.name, times
    if name in ('dot_general', 'conv_general_dilated'):
      operations = times * (_product(equation) if name == 'dot_general' else _convolution(equation))
      outside, inside = (outside, inside + operations) if kernel else (outside + operations, inside)
    elif name == 'scan':
      own *= equation.params['length']
    elif name == 'shard_map':
      own *= math.prod(equation.params['mesh'].shape[axis] for axis in equation.params['newly_manual_axes'])
    elif name == 'pallas_call':
      own *= math.prod(equation.params['grid_mapping'].grid)
    for part in _inner(equation):
      found = _count(part, own, kernel or name == 'pallas_call')
      outside, inside = outside + found[0], inside + found[1]
  return outside, inside


def _inner(equation: Any) -> list:
  """The programs inside an equation; of several branches the dearest."""
  if equation.primitive.name == 'cond':
    branches = [branch.jaxpr for branch in equation.params['branches']]
    return [max(branches, key=lambda b: sum(_count(b, 1, False)))]
  found = [x for x in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program) if _is_program(x)]
  return [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in found]


def _is_program(x: Any) -> bool:
  return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))


def _product(equation: Any) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  a = equation.invars[0].aval
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(a.shape[d] for d in contracted)


def _convolution(equation: Any) -> float:
  kernel, numbers = equation.invars[1].aval.shape, equation.params['dimension_numbers']
  out_channels = kernel[numbers.rhs_spec[0]]
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_channels
