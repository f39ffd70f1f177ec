"""The parts every BEiT model is made of: patch embedding, attention with relative positions, pre-norm blocks.

Shape letters: B batch, (Gh, Gw) patch grid, N = Gh*Gw patches, T = N+1 tokens ([CLS] first), D width, H heads.
Parameters are fp32; `dtype` is the type of the matrix products. Norms, softmax and logits are fp32.
"""

import dataclasses
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


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x(1 + erf(x/√2))/2, in torch's form: one polynomial, where jax.nn.gelu's erfc takes two and an exp."""
  y = x.astype(jnp.float32)  # 1 + erf cancels in bf16
  return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def layer_norm(name: str | None, dtype: Any) -> nn.LayerNorm:
  return nn.LayerNorm(LN_EPS, dtype=dtype, use_fast_variance=False, name=name)


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
    return table[relative_position_index(self.grid)].transpose(2, 0, 1)


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
    x = images.astype(self.dtype).reshape(b, h // p, p, w // p, p, c)
    x = jnp.einsum('bhpwqc,pqcd->bhwd', x, kernel.astype(self.dtype))
    return (x + bias.astype(self.dtype)).reshape(b, -1, self.width)


class Linear(nn.Module):
  """y = xW + b over the last axis; `axes` are the logical names of W's two dimensions."""

  features: int
  init: Init = Init()
  axes: tuple = ('embed', None)
  weight_scale: float = 1.0
  dtype: Any = jnp.float32
  precision: Any = None

  @nn.compact
  def __call__(self, x, gamma=None):
    """`gamma` [features] scales the result: a block's layer scale."""
    fan_in = x.shape[-1]
    kernel = nn.with_logical_partitioning(scaled(self.init.weight(fan_in), self.weight_scale), self.axes)
    kernel = self.param('kernel', kernel, (fan_in, self.features))
    bias = self.param('bias', nn.with_logical_partitioning(self.init.bias(fan_in), self.axes[1:]), (self.features,))
    kernel, bias = scale_output(kernel, bias, gamma)
    y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), precision=self.precision)
    return y + bias.astype(self.dtype)


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
    return jnp.dot(y, proj.astype(self.dtype)) + proj_bias.astype(self.dtype)


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
    y = layer_norm('norm1', self.dtype)(x)
    y = Attention(self.heads, self.init, out_scale, self.grid, self.attention, self.dtype, name='attn')(y, bias, gammas[0])
    x = x + drop_path(y, rate, keys[0])
    y = layer_norm('norm2', self.dtype)(x)
    hidden = int(width * self.mlp_ratio)
    y = Linear(hidden, self.init, ('embed', 'mlp'), dtype=self.dtype, name='fc1')(y)
    y = gelu(y)
    y = Linear(width, self.init, ('mlp', 'embed'), out_scale, self.dtype, name='fc2')(y, gammas[1])
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
