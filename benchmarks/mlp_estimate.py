"""One MLP of base on one TPU device, forward and backward, by XLA's TPU compiler: with GELU through tanh and, as training does
on v6e, through erf. Also single products.

  python benchmarks/mlp_estimate.py v5e:2x2 v6e:2x2 tpu7x:2x2x1

Compiler estimates, no measurements: by the compiler's cost model, and by the instructions that its programs issue (in which no waiting for
memory or for the matrix units counts, so that a single product can seem to be faster than the chip). Needs the extra [aot]; v6e and tpu7x need jax 0.11.2.
"""

import os
import sys
from unittest import mock

os.environ['JAX_PLATFORMS'] = 'cpu'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.costs import estimate
from beitv2_jax.kernels import chip
from beitv2_jax.kernels.functions import add_bias, gelu_product

IMAGES, TOKENS, WIDTH, HIDDEN = 128, 197, 768, 3072


def mlp(x, kernel1, bias1, kernel2, bias2):
  hidden = add_bias(jnp.dot(x, kernel1), bias1, True)
  return add_bias(gelu_product(hidden, kernel2), bias2)


def both_ways(dy, *arguments):
  y, back = jax.vjp(mlp, *arguments)
  return y, *back(dy)


def cost(topology, function, *shapes):
  """(cycles by the cost model, instructions, devices of a chip)."""
  devices = estimate.topology_devices(topology)
  mesh = jax.make_mesh((1, 1), ('data', 'model'), devices=devices[:1], axis_types=(AxisType.Auto,) * 2)
  kind = lambda shape: jnp.float32 if len(shape) == 1 else jnp.bfloat16  # biases
  arguments = [jax.ShapeDtypeStruct(shape, kind(shape), sharding=NamedSharding(mesh, P())) for shape in shapes]
  a_chip = len(devices) // len({tuple(d.coords) for d in devices})
  jax.clear_caches()  # or a function that was traced before would not be traced again
  with jax.set_mesh(mesh):
    program, _ = estimate.read(jax.jit(function).lower(*arguments).compile(), topology, a_chip)
  return program.cycles(), program.instructions(), a_chip


def line(topology, what, products, cycles, instructions, a_chip):
  made = estimate.CHIPS[topology.partition(':')[0]]
  needed = 2 * products * IMAGES * TOKENS * WIDTH * HIDDEN / (made.peak / a_chip * 1e12) * made.clock * 1e9
  shares = ' | '.join(f'{n / 1e6:.2f} | {100 * needed / n:.1f} %' for n in (cycles, instructions))
  print(f'| {topology.partition(":")[0]} | {what} | {shares} |', flush=True)


def main():
  print('| device | | M cycles | of peak | M instructions | of peak |\n|---|---|---|---|---|---|')
  tokens = (IMAGES, TOKENS, WIDTH)
  for topology in sys.argv[1:]:
    for columns in (WIDTH // 3, WIDTH * 2 // 3, WIDTH):
      cycles = cost(topology, jnp.dot, (IMAGES * TOKENS, columns), (columns, HIDDEN))
      line(topology, f'one product, {columns} to {HIDDEN:,}', columns / WIDTH, *cycles)
    for what, erf in (('MLP, GELU through tanh', False), ('MLP, GELU through erf', True)):
      with mock.patch.object(chip, 'erf_is_cheap', lambda erf=erf: erf):
        line(topology, what, 6, *cost(topology, both_ways, tokens, tokens, (WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,)))


if __name__ == '__main__':
  main()
