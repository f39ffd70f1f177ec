"""The parts every BEiT model is made of: patch embedding, attention with relative positions, pre-norm blocks.

Shape letters: B batch, (Gh, Gw) patch grid, N = Gh*Gw patches, T = N+1 tokens ([CLS] first), D width, H heads.
Parameters are fp32; `dtype` is the type of the matrix products. Norms, softmax and logits are fp32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.models import attention

LN_EPS = 1e-6


def uniform(bound: float) -> Callable:
  """Initialiser U(-bound, bound); torch's default layers use bound = 1/sqrt(fan_in)."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Init:
  """An initialisation scheme of the official code.

  `normal`: N(0, 0.02²) (its truncation at ±2 is ±100 sigma), patch embedding left at torch's default.
            Fine-tuning models, VQ-KD and its heads.
  `truncated`: N(0, 0.02²) cut at ±0.02, i.e. ±1 sigma and a standard deviation of 0.0108. The pretraining model.
  `torch`: torch's default, weights and biases U(±1/sqrt(fan_in)). The two patch aggregation blocks, which the
           official code builds after its init pass has run.
  """

  scheme: str = 'normal'

  def weight(self, fan_in: int) -> Callable:
    if self.scheme == 'torch':
      return uniform(fan_in**-0.5)
    return self.token

  def bias(self, fan_in: int) -> Callable:
    return uniform(fan_in**-0.5) if self.scheme == 'torch' else nn.initializers.zeros

  def patch(self, fan_in: int) -> tuple[Callable, Callable]:
    if self.scheme == 'truncated':
      return self.token, nn.initializers.zeros
    return uniform(fan_in**-0.5), uniform(fan_in**-0.5)

  @property
  def token(self) -> Callable:
    if self.scheme == 'truncated':
      return nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)  # no variance correction
    return nn.initializers.normal(0.02)


def scaled(init: Callable, factor: float) -> Callable:
  return lambda key, shape, dtype=jnp.float32: init(key, shape, dtype) * factor


def _odd_polynomial(f: Callable, terms: int, end: float) -> list[float]:
  """Coefficients c of f(x) - 1/2 ≈ Σ c_k u^(2k+1), u = x/end in [0, 1], meeting 1/2 exactly at u = 1: near-minimax, by least squares."""
  u = np.cos(np.linspace(0, np.pi / 2, 2000))[:-1]
  odd = np.stack([u ** (2 * k + 1) for k in range(terms - 1)], 1)
  q = np.linalg.lstsq((1 - u * u)[:, None] * odd, np.vectorize(f)(u * end) - 0.5 - u / 2, rcond=None)[0]
  c = np.r_[q, 0] - np.r_[0, q]
  c[0] += 0.5
  return [float(x) for x in c]


_PHI = lambda x: (1 + math.erf(x * math.sqrt(0.5))) / 2
_SLOPE = lambda x: _PHI(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
_END = 4.5
_POLYNOMIALS = {f: _odd_polynomial(f, terms, _END) for f, terms in ((_PHI, 9), (_SLOPE, 10))}


def _evaluate(f: Callable, x: jax.Array) -> jax.Array:
  u = jnp.clip(x * (1 / _END), -1, 1)
  square, y = u * u, 0.0
  for c in reversed(_POLYNOMIALS[f]):
    y = y * square + c
  return y * u + 0.5


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, xΦ(x).

  fp32 goes through erf, torch's form. In bf16 a polynomial stands for Φ (within 3e-5) and another for the slope (within 1.5e-4), both
  far below bf16's own rounding: that work hides behind the matrix products around it, which erf and exp do not.
  """
  return _gelu_forward(x)[0]


def _gelu_forward(x):
  if x.dtype == jnp.float32:
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))), x
  y = x.astype(jnp.float32)
  return (y * _evaluate(_PHI, y)).astype(x.dtype), x


def _gelu_backward(x, dy):
  y = x.astype(jnp.float32)
  if x.dtype == jnp.float32:
    slope = 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))) + y * jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
  else:
    slope = _evaluate(_SLOPE, y)
  return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """gelu(x) @ kernel, whose backward pass computes gelu(x) again: inside the product that is free, keeping and reading it is not."""
  return jnp.dot(gelu(x), kernel)


def _gelu_product_backward(saved, dy):
  x, kernel = saved
  x = jax.lax.optimization_barrier(x)  # or the compiler finds that it has gelu(x) already, and keeps it
  features = lambda y: y.reshape(-1, y.shape[-1])
  return _gelu_backward(x, jnp.dot(dy, kernel.T))[0], jnp.dot(features(gelu(x)).T, features(dy))


gelu_product.defvjp(lambda x, kernel: (gelu_product(x, kernel), (x, kernel)), _gelu_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_layer(x: jax.Array, scale: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
  """Layer norm over the last axis in fp32, as `dtype`.

  The variance takes a second pass in fp32, unless products are rounded anyway; in bf16 it comes in the same pass as the mean, which
  fuses into the product that made x. The gradient is written out: what automatic differentiation makes of the mean and the
  variance costs two more passes.
  """
  return _layer_norm_forward(x, scale, bias, dtype)[0]


def _layer_norm_forward(x, scale, bias, dtype):
  y = x.astype(jnp.float32)
  mean = y.mean(-1, keepdims=True)
  if x.dtype == jnp.float32 and not attention.rounded_products():
    variance = jnp.square(y - mean).mean(-1, keepdims=True)
  else:
    variance = jnp.maximum((y * y).mean(-1, keepdims=True) - mean * mean, 0)
  inverse = jax.lax.rsqrt(variance + LN_EPS)
  return ((y - mean) * inverse * scale + bias).astype(dtype), (x, scale, mean, inverse)


def _layer_norm_backward(dtype, saved, dy):
  x, scale, mean, inverse = saved
  dy, rows = dy.astype(jnp.float32), tuple(range(x.ndim - 1))
  normal = (x.astype(jnp.float32) - mean) * inverse
  g = dy * scale
  dx = inverse * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
  return dx.astype(x.dtype), (dy * normal).sum(rows), dy.sum(rows)


normalize_layer.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale, bias = (self.param(n, i, x.shape[-1:]) for n, i in (('scale', nn.initializers.ones), ('bias', nn.initializers.zeros)))
    return normalize_layer(x, scale, bias, self.dtype)


def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
  """[T, T] rows of the bias table for (query, key); the last three rows are CLS→any, any→CLS, CLS→CLS."""
  gh, gw = grid
  rows, cols = (x.ravel() for x in np.meshgrid(np.arange(gh), np.arange(gw), indexing='ij'))
  size = table_size(grid)
  index = np.empty((gh * gw + 1,) * 2, np.int32)
  index[1:, 1:] = (rows[:, None] - rows + gh - 1) * (2 * gw - 1) + (cols[:, None] - cols + gw - 1)
  index[0, :] = size - 3
  index[:, 0] = size - 2
  index[0, 0] = size - 1
  return index


def table_size(grid: tuple[int, int]) -> int:
  return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


class RelPosBias(nn.Module):
  """A learned bias for every head and every relative position, zero at the start. Returns [H, T, T] in fp32."""

  grid: tuple[int, int]
  heads: int

  @nn.compact
  def __call__(self):
    table = self.param(
      'table',
      nn.with_logical_partitioning(nn.initializers.zeros, (None, 'heads')),
      (table_size(self.grid), self.heads),
    )
    return spread_table(table, self.grid)


def spread_table(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """table[relative_position_index(grid)] as [H, T, T], by two products with 0/1 matrices, one an axis of the grid.

  They are exact, and a small fraction of what gathering T² rows, and scattering their gradients, takes on an accelerator.
  """
  (gh, gw), heads = grid, table.shape[1]
  offsets = lambda n: (np.arange(n)[:, None] - np.arange(n) + n - 1).ravel()
  rows, cols = (np.eye(2 * n - 1, dtype=np.float32)[:, offsets(n)] for n in grid)
  body = table[:-3].T.reshape(heads, 2 * gh - 1, 2 * gw - 1)
  body = jnp.einsum('hab,ap,bq->hpq', body, rows, cols, precision='highest').reshape(heads, gh, gh, gw, gw)
  body = body.transpose(0, 1, 3, 2, 4).reshape(heads, gh * gw, gh * gw)
  from_cls, to_cls, both = (table[i - 3][:, None, None] for i in range(3))
  first = jnp.concatenate([both, jnp.broadcast_to(from_cls, (heads, 1, gh * gw))], 2)
  rest = jnp.concatenate([jnp.broadcast_to(to_cls, (heads, gh * gw, 1)), body], 2)
  return jnp.concatenate([first, rest], 1)


class PatchEmbed(nn.Module):
  """Non-overlapping patches through one linear map with bias: [B, h, w, C] → [B, N, D], rows first."""

  width: int
  patch: int
  init: Init
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    b, h, w, c = images.shape
    p = self.patch
    weight, bias = self.init.patch(p * p * c)
    kernel = self.param('kernel', nn.with_logical_partitioning(weight, (None, None, None, 'embed')), (p, p, c, self.width))
    bias = self.param('bias', bias, (self.width,))
    x = images.reshape(b, h // p, p, w // p, p * c).transpose(0, 1, 3, 2, 4).reshape(b, -1, p * p * c)
    return add_bias(jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype).reshape(-1, self.width)), bias)


class Linear(nn.Module):
  """y = xW + b over the last axis; `axes` are the logical names of W's two dimensions."""

  features: int
  init: Init = Init()
  axes: tuple = ('embed', None)
  weight_scale: float = 1.0
  dtype: Any = jnp.float32
  precision: Any = None
  bias_by_product: bool = False  # see add_bias

  @nn.compact
  def __call__(self, x, gamma=None, gelu_first: bool = False, apart: bool = False):
    """`gamma` [features] scales the result: a block's layer scale. With `gelu_first` x goes through GELU before the product, with
    `apart` xW and b are returned without being added."""
    fan_in = x.shape[-1]
    kernel = nn.with_logical_partitioning(scaled(self.init.weight(fan_in), self.weight_scale), self.axes)
    kernel = self.param('kernel', kernel, (fan_in, self.features))
    bias = self.param('bias', nn.with_logical_partitioning(self.init.bias(fan_in), self.axes[1:]), (self.features,))
    kernel, bias = scale_output(kernel, bias, gamma)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    product = gelu_product(x, kernel) if gelu_first else jnp.dot(x, kernel, precision=self.precision)
    return (product, bias) if apart else add_bias(product, bias, self.bias_by_product)


def sum_rows(x: jax.Array) -> jax.Array:
  """[..., F] → fp32 [F]. On the matrix unit if x is bf16, which is exact too: what computes x can then be part of a product."""
  rows = tuple(range(x.ndim - 1))  # not reshaped into one axis: the batch among them may be sharded
  if x.dtype == jnp.float32:
    return x.sum(rows)
  ones = jnp.ones((8, *x.shape[:-1]), x.dtype)  # eight times: the compiler would make one into a plain sum again
  return jax.lax.dot_general(ones, x, ((tuple(r + 1 for r in rows), rows), ((), ())), preferred_element_type=jnp.float32)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: jax.Array, bias: jax.Array, by_product: bool = False) -> jax.Array:
  """y [..., F] plus the fp32 bias [F], in fp32 whatever y's type, so that the bias's gradient, a sum over all tokens, is too.

  `by_product` takes it by `sum_rows`: cheaper where dy comes straight out of a product, dearer where a pass can sum on its way.
  """
  return (y.astype(jnp.float32) + bias).astype(y.dtype)


def _add_bias_backward(by_product, _, dy):
  return dy, sum_rows(dy) if by_product else dy.astype(jnp.float32).sum(tuple(range(dy.ndim - 1)))


add_bias.defvjp(lambda y, bias, by_product: (add_bias(y, bias, by_product), None), _add_bias_backward)


def scale_output(kernel: jax.Array, bias: jax.Array, gamma: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Layer scale, multiplied into the matrix before it instead of onto its result.

  The same function, but gamma's gradient is then summed over a matrix and not over all tokens (5 % of a block's time, compiler
  estimate).
  """
  return (kernel, bias) if gamma is None else (kernel * gamma, bias * gamma)


class Attention(nn.Module):
  """Multi-head self-attention whose keys have no bias; q is scaled before the product, the position bias is not."""

  heads: int
  init: Init
  proj_scale: float = 1.0
  grid: tuple[int, int] | None = None  # owns a relative position table when given
  implementation: str = 'auto'  # see attention.attend
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias=None, gamma=None):
    width = x.shape[-1]
    head_dim = width // self.heads
    heads = (self.heads, head_dim)
    qkv = nn.with_logical_partitioning(self.init.weight(width), ('embed', None, 'heads', None))
    qkv = self.param('qkv', qkv, (width, 3, *heads)).astype(self.dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('heads', None))
    q_bias, v_bias = (self.param(n, zeros, heads).astype(self.dtype) for n in ('q_bias', 'v_bias'))
    if self.grid is not None:
      own = RelPosBias(self.grid, self.heads, name='rel_pos_bias')()
      bias = own if bias is None else bias + own
    how = 'xla' if self.is_initializing() else self.implementation
    y = attention.attend(x, qkv, q_bias, v_bias, bias, how)
    proj = nn.with_logical_partitioning(scaled(self.init.weight(width), self.proj_scale), ('heads', None, 'embed'))
    proj, proj_bias = self.param('proj', proj, (*heads, width)), self.param('proj_bias', self.init.bias(width), (width,))
    proj, proj_bias = scale_output(proj.reshape(width, width), proj_bias, gamma)
    return add_bias(jnp.dot(y, proj.astype(self.dtype)), proj_bias)


def drop_path(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
  """Stochastic depth: a whole residual branch is dropped per sample and the kept ones divided by 1 - rate."""
  if key is None:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
  return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


class Block(nn.Module):
  """Pre-norm transformer block with optional layer scale.

  `index` counts from 0 and sets the official rescale of the two output matrices, 1/sqrt(2(index+1)).
  """

  heads: int
  index: int
  mlp_ratio: float = 4.0
  init: Init = Init()
  layer_scale: float = 0.0
  grid: tuple[int, int] | None = None
  attention: str = 'auto'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias=None, rate: float | jax.Array = 0.0, key: jax.Array | None = None):
    """`rate` of drop path is used when a `key` is given."""
    width = x.shape[-1]
    out_scale = 1 / math.sqrt(2 * (self.index + 1))
    keys = (None, None) if key is None else jax.random.split(key)
    constant = nn.initializers.constant(self.layer_scale)
    gammas = [self.param(name, constant, (width,)) if self.layer_scale else None for name in ('gamma1', 'gamma2')]
    y = LayerNorm(self.dtype, name='norm1')(x)
    y = Attention(self.heads, self.init, out_scale, self.grid, self.attention, self.dtype, name='attn')(y, bias, gammas[0])
    x = x + drop_path(y, rate, keys[0])
    y = LayerNorm(self.dtype, name='norm2')(x)
    hidden = int(width * self.mlp_ratio)
    y = Linear(hidden, self.init, ('embed', 'mlp'), dtype=self.dtype, bias_by_product=True, name='fc1')(y)
    y = Linear(width, self.init, ('mlp', 'embed'), out_scale, self.dtype, name='fc2')(y, gammas[1], gelu_first=True)
    return x + drop_path(y, rate, keys[1])


# What the backward pass recomputes instead of keeping: nothing; all but the blocks' inputs; all but the results of their
# weight matrices (so attention and GELU are computed twice, the large products once).
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a stack of blocks is run; the result is the same.

  `scan` compiles one block instead of all, at the price of stacking the parameters in every step. `remat` is one of REMAT,
  `attention` one of attention.attend's.
  """

  scan: bool = False
  remat: str = 'none'
  attention: str = 'auto'


def apply_blocks(
  block: Block, params: list[dict], x: jax.Array, bias: Any, rates: list[float], key: jax.Array | None, execution: Execution
) -> jax.Array:
  """`block` with each of `params` in turn, block i with drop path rate `rates[i]` and a key of its own."""

  def one(x, params, rate, key):
    return block.apply({'params': params}, x, bias, rate, key)

  if REMAT[execution.remat]:
    one = jax.checkpoint(one, policy=REMAT[execution.remat])
  keys = None if key is None else jax.random.split(key, len(params))
  if execution.scan and len(params) > 1:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(lambda x, each: (one(x, *each), None), x, (stacked, jnp.asarray(rates), keys))[0]
  for i, p in enumerate(params):
    x = one(x, p, rates[i], keys[i] if key is not None and rates[i] else None)
  return x
