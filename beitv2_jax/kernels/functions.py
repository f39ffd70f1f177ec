"""Functions whose gradients are written out: GELU, layer norm, biases, and what else is cheaper than what differentiation makes of it.

Each is the plain function; tests/test_models.py holds values and gradients to it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from beitv2_jax.kernels import chip, norm_gpu

LN_EPS = 1e-6


def exact() -> Any:
  """The `precision` of products that must be fp32 whatever products are by default, as fast as the chip has it.

  On a GPU that has TF32, three products of it stand for one of fp32 (within 2^-21).
  """
  thrice = chip.platform() == 'gpu' and 'TF32 product' not in chip.refused
  return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if thrice else 'highest'


def _normal_cdf(x: jax.Array, dtype: Any) -> jax.Array:
  """Φ(x) of fp32 x, the share of a normal distribution below x: through erf, as torch has it. For a result of bf16 it goes through tanh, which
  most chips have an instruction for, and is within 2e-5, far below bf16's own rounding."""
  if dtype == jnp.float32 or chip.erf_is_cheap():
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
  square = jnp.minimum(x * x, 40)  # beyond, tanh is 1 anyway, and the polynomial would turn back
  return 0.5 * jnp.tanh(x * (0.797717831 + square * (0.0367982602 - 3.15807916e-4 * square))) + 0.5  # fitted by us, for the least error


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, xΦ(x)."""
  return _gelu_forward(x)[0]


def _gelu_forward(x):
  y = x.astype(jnp.float32)
  return (y * _normal_cdf(y, x.dtype)).astype(x.dtype), x


def _gelu_backward(x, dy):
  y = x.astype(jnp.float32)
  slope = _normal_cdf(y, x.dtype) + y * jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
  return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """gelu(x) @ kernel, whose backward pass computes gelu(x) again on chips that hide it in the product.

  Without a backward pass the TPU compiler would make one operation of this product and the one before, which takes longer.
  """
  return jnp.dot(chip.kept_apart(gelu(x)), kernel)


def _gelu_product_backward(saved, dy):
  x, kernel = saved
  if chip.kind().startswith('TPU v5'):  # v4 has no room for it, and later ones multiply so fast that the product would wait for it
    x = chip.made_anew(x)  # or the compiler finds that it has gelu(x) already, and keeps it
  features = lambda y: y.reshape(-1, y.shape[-1])
  return _gelu_backward(x, jnp.dot(dy, kernel.T))[0], jnp.dot(features(gelu(x)).T, features(dy))


gelu_product.defvjp(lambda x, kernel: (jnp.dot(gelu(x), kernel), (x, kernel)), _gelu_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_layer(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """(x itself, layer norm of x over the last axis in fp32, as `dtype`).

  The variance takes a second pass in fp32, unless products are rounded anyway; in bf16 it comes in the same pass as the mean, which
  fuses into the product that made x. The gradient is written out: what automatic differentiation makes of the mean and the
  variance costs two more passes. x is handed on so that the gradient of what follows on x can be added in the same pass.
  """
  return _layer_norm_forward(x, scale, bias, dtype)[0]


def _layer_norm_forward(x, scale, bias, dtype):
  y = x.astype(jnp.float32)
  mean = y.mean(-1, keepdims=True)
  if x.dtype == jnp.float32 and not chip.rounded_products():
    variance = jnp.square(y - mean).mean(-1, keepdims=True)
  else:
    variance = jnp.maximum((y * y).mean(-1, keepdims=True) - mean * mean, 0)
  inverse = jax.lax.rsqrt(variance + LN_EPS)
  return (x, ((y - mean) * inverse * scale + bias).astype(dtype)), (x, scale, mean, inverse)


def _layer_norm_backward(dtype, saved, cotangents):
  x, scale, mean, inverse = saved
  past, dy = cotangents
  if chip.platform() == 'gpu' and x.dtype == jnp.bfloat16 and 'layer norm' not in chip.refused and _divides(x):
    return _on_each_chip(x, mean, inverse, scale, dy, past)
  dy, rows = dy.astype(jnp.float32), tuple(range(x.ndim - 1))
  normal = (x.astype(jnp.float32) - mean) * inverse
  g = dy * scale
  dx = inverse * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
  return past + dx.astype(x.dtype), (dy * normal).sum(rows), dy.sum(rows)


def _divides(x) -> bool:
  return x.shape[0] % jax.sharding.get_abstract_mesh().shape['data'] == 0


def _on_each_chip(*args):
  """norm_gpu.backward, with images split over the mesh's `data` axis."""

  def local(*args):
    dx, *sums = norm_gpu.backward(*args)
    return dx, *(jax.lax.psum(s, 'data') for s in sums)

  data, whole = P('data'), P()
  specs = (data, data, data, whole, data, data)
  mesh = jax.sharding.get_abstract_mesh()
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(data, whole, whole), check_vma=False)(*args)


normalize_layer.defvjp(_layer_norm_forward, _layer_norm_backward)


def check() -> None:
  """Holds the kernel behind `normalize_layer` to the plain gradient, and products of TF32 to fp32, on a GPU (chip.refused)."""
  if jax.default_backend() != 'gpu':
    return
  x, scale = jax.random.normal(jax.random.key(0), (2, 197, 192)), jnp.linspace(0.5, 2, 192)

  def gradients(x, scale):
    y, back = jax.vjp(lambda *a: normalize_layer(*a, x.dtype), x, scale, scale)
    return back((y[1], jnp.sin(y[1])))

  chip.check('layer norm', gradients, gradients, x.astype(jnp.bfloat16), scale)
  rows = x[0]
  product = lambda x: (jnp.dot(x, x.T, precision=exact()),)
  chip.check('TF32 product', product, lambda x: (jnp.dot(x, x.T, precision='highest'),), rows, tolerance=1e-5)


def sum_rows(x: jax.Array, axes: int | None = None) -> jax.Array:
  """fp32 sum over the first `axes` axes, all but the last if not given. On the matrix unit if x is bf16, which is exact too: what
  computes x can then be part of a product."""
  rows = tuple(range(x.ndim - 1 if axes is None else axes))  # not reshaped into one axis: the batch among them may be sharded
  if x.dtype == jnp.float32:
    return x.sum(rows)
  ones = jnp.ones((8, *x.shape[: len(rows)]), x.dtype)  # eight times: the compiler would make one into a plain sum again
  return jax.lax.dot_general(ones, x, ((tuple(r + 1 for r in rows), rows), ((), ())), preferred_element_type=jnp.float32)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: jax.Array, bias: jax.Array, by_product: bool = False) -> jax.Array:
  """y [..., F] plus the fp32 bias [F], whose gradient, a sum over all tokens, is fp32 whatever y's type. So is the sum, except on GPUs.

  `by_product` takes it by `sum_rows`: cheaper where dy comes straight out of a product, dearer where a pass can sum on its way.
  """
  if chip.platform() == 'gpu':
    return y + bias.astype(y.dtype)  # which cuBLAS adds before it rounds the product
  return (y.astype(jnp.float32) + bias).astype(y.dtype)


def _add_bias_backward(by_product, _, dy):
  return dy, sum_rows(dy) if by_product else dy.astype(jnp.float32).sum(tuple(range(dy.ndim - 1)))


add_bias.defvjp(lambda y, bias, by_product: (add_bias(y, bias, by_product), None), _add_bias_backward)


@jax.custom_vjp
def add_positions(x: jax.Array, table: jax.Array) -> jax.Array:
  """x [B, T, D] plus the position embedding [T, D], fp32, rounded to x's type.

  Its gradient sums over images only. As a plain sum that makes XLA lay out the whole network with images last, on GPUs, and turn it
  around before and after every product (8 of 66 ms of a VQ-KD step on an H100); as a product it does not.
  """
  return x + table.astype(x.dtype)


add_positions.defvjp(lambda x, table: (add_positions(x, table), None), lambda _, dy: (dy, sum_rows(dy, 1)))


def scale_output(kernel: jax.Array, bias: jax.Array, gamma: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Layer scale, multiplied into the matrix before it instead of onto its result.

  The same function, but gamma's gradient is then summed over a matrix and not over all tokens (5 % of a block's time, compiler
  estimate).
  """
  return (kernel, bias) if gamma is None else (kernel * gamma, bias * gamma)
