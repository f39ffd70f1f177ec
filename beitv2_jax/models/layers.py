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

from beitv2_jax.kernels import attention, chip
from beitv2_jax.kernels.functions import add_bias, exact, gelu_product, normalize_layer, scale_output
from beitv2_jax.models.initializers import Draw, uniform


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

  def weight(self, fan_in: int) -> Draw:
    if self.scheme == 'torch':
      return uniform(fan_in**-0.5)
    return self.token

  def bias(self, fan_in: int) -> Callable:
    return uniform(fan_in**-0.5) if self.scheme == 'torch' else nn.initializers.zeros

  def patch(self, fan_in: int) -> tuple[Draw, Callable]:
    if self.scheme == 'truncated':
      return self.token, nn.initializers.zeros
    return uniform(fan_in**-0.5), uniform(fan_in**-0.5)

  @property
  def token(self) -> Draw:
    return Draw('truncated' if self.scheme == 'truncated' else 'normal', 0.02)


class LayerNorm(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, keep: bool = False):
    """With `keep`, (x, its norm): going on from that x saves a pass in the gradient."""
    scale, bias = (self.param(n, i, x.shape[-1:]) for n, i in (('scale', nn.initializers.ones), ('bias', nn.initializers.zeros)))
    x, y = normalize_layer(x, scale, bias, self.dtype)
    return (x, y) if keep else y


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
    # The barrier keeps the sum of all layers' gradients apart from what turns it into the table's, which is slow together on a GPU.
    bias = spread_table(table, self.grid)
    return jax.lax.optimization_barrier(bias) if chip.platform() == 'gpu' else bias


def spread_table(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """table[relative_position_index(grid)] as [H, T, T], without gathering T² rows or scattering their gradients, which is slow on
  accelerators.

  Columns of the grid come by a product with a 0/1 matrix, which is exact. What all queries get from the keys of one row of the grid is then
  a window of the result, one row further back for the row below. So [H, keys, queries] comes first, as the TPU kernel takes it.
  """
  (gh, gw), heads = grid, table.shape[1]
  body = table[:-3].T.reshape(heads, 2 * gh - 1, 2 * gw - 1)
  cols = np.eye(2 * gw - 1, dtype=np.float32)[:, np.arange(gw) - np.arange(gw)[:, None] + gw - 1]  # [offset, key, query]
  all_rows = jnp.einsum('hab,bkq->hkaq', body, cols, precision='highest').reshape(heads, gw, -1)
  from_cls, to_cls, both = (table[i - 3][:, None, None] for i in range(3))
  first = jnp.concatenate([both, jnp.broadcast_to(to_cls, (heads, 1, gh * gw))], 2)
  from_cls = jnp.broadcast_to(from_cls, (heads, gw, 1))
  starts = [(gh - 1 - row) * gw for row in range(gh)]
  by_key = jnp.concatenate([first, *(jnp.concatenate([from_cls, all_rows[:, :, i : i + gh * gw]], 2) for i in starts)], 1)
  return by_key.swapaxes(1, 2)


def patches(images: jax.Array, size: int) -> jax.Array:
  """[B, h, w, C] → [B, N, size*size*C], rows first."""
  b, h, w, c = images.shape
  return images.reshape(b, h // size, size, w // size, size * c).transpose(0, 1, 3, 2, 4).reshape(b, -1, size * size * c)


def cut_pixels(images: jax.Array, size: int) -> jax.Array:
  """uint8 [B, h, w, C] → patches [B, Gh, Gw, size*size*C], which a ViT takes as it takes images. For several networks on the same images:
  cut once and as bytes, that takes half of the instructions of cutting floats for each."""
  # Apart from what comes before and after. Rows of pixels, because with C numbers in its last axis an array takes a TPU many times its size.
  rows = chip.kept_apart(images.reshape(*images.shape[:2], -1))
  cut = chip.kept_apart(patches(rows.reshape(images.shape), size))
  return cut.reshape(len(images), images.shape[1] // size, images.shape[2] // size, -1)


class PatchEmbed(nn.Module):
  """Non-overlapping patches through one linear map with bias: [B, h, w, C], or from `cut_pixels` [B, Gh, Gw, p*p*C], → [B, Gh, Gw, D]."""

  width: int
  patch: int
  init: Init
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images):
    p = self.patch
    c = nn.unbox(self.get_variable('params', 'kernel')).shape[2] if self.has_variable('params', 'kernel') else images.shape[3]
    weight, bias = self.init.patch(p * p * c)
    kernel = self.param('kernel', nn.with_logical_partitioning(weight, (None, None, None, 'embed')), (p, p, c, self.width))
    bias = self.param('bias', bias, (self.width,))
    x = images.astype(self.dtype)
    if x.shape[3] == p * p * c:
      grid, rows = x.shape[1:3], x.reshape(len(x), -1, p * p * c)
    else:
      # What makes floats of pixels stays apart from cutting them up: together they take five times as long in a loop over micro-batches on
      # v5e (compiler estimate).
      if x.shape[1] % p or x.shape[2] % p:
        raise ValueError(f'images of {x.shape[1]} x {x.shape[2]} px do not divide into patches of {p} px. Resize them.')
      grid, rows = (x.shape[1] // p, x.shape[2] // p), patches(chip.kept_apart(x), p)
    # What uses the patches stays apart, too, or the kernel's gradient would be a product over six axes, which takes long to compile.
    x = add_bias(jnp.dot(chip.kept_apart(rows), kernel.astype(self.dtype).reshape(-1, self.width)), bias)
    return x.reshape(len(x), *grid, self.width)


class Linear(nn.Module):
  """y = xW + b over the last axis; `axes` are the logical names of W's two dimensions."""

  features: int
  init: Init = Init()
  axes: tuple = ('embed', None)
  weight_scale: float = 1.0
  dtype: Any = jnp.float32
  exact: bool = False  # fp32 products even where they round by default
  bias_by_product: bool = False  # see add_bias

  @nn.compact
  def __call__(self, x, gamma=None, gelu_first: bool = False, apart: bool = False):
    """`gamma` [features] scales the result: a block's layer scale. With `gelu_first` x goes through GELU before the product, with
    `apart` xW and b are returned without being added."""
    fan_in = x.shape[-1]
    kernel = nn.with_logical_partitioning(self.init.weight(fan_in).scaled(self.weight_scale), self.axes)
    kernel = self.param('kernel', kernel, (fan_in, self.features))
    bias = self.param('bias', nn.with_logical_partitioning(self.init.bias(fan_in), self.axes[1:]), (self.features,))
    kernel, bias = scale_output(kernel, bias, gamma)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    product = gelu_product(x, kernel) if gelu_first else jnp.dot(x, kernel, precision=exact() if self.exact else None)
    return (product, bias) if apart else add_bias(product, bias, self.bias_by_product)


class Attention(nn.Module):
  """Multi-head self-attention whose keys have no bias; q is scaled before the product, the position bias is not."""

  heads: int
  init: Init
  proj_scale: float = 1.0
  grid: tuple[int, int] | None = None  # owns a relative position table when given
  implementation: str = 'auto'  # see attention.attend
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, bias=None, gamma=None, rows=None):
    """`rows`: see Block."""
    width = x.shape[-1]
    head_dim = width // self.heads
    heads = (self.heads, head_dim)
    qkv = nn.with_logical_partitioning(self.init.weight(width), ('embed', None, 'heads', None))
    qkv = self.param('qkv', qkv, (width, 3, *heads)).astype(self.dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('heads', None))
    q_bias, v_bias = (self.param(n, zeros, heads) for n in ('q_bias', 'v_bias'))
    if self.grid is not None:
      own = RelPosBias(self.grid, self.heads, name='rel_pos_bias')()
      bias = own if bias is None else bias + own
    how = 'xla' if self.is_initializing() else self.implementation
    y = pick(rows, attention.attend(x, qkv, q_bias, v_bias, bias, how))
    proj = nn.with_logical_partitioning(self.init.weight(width).scaled(self.proj_scale), ('heads', None, 'embed'))
    proj, proj_bias = self.param('proj', proj, (*heads, width)), self.param('proj_bias', self.init.bias(width), (width,))
    proj, proj_bias = scale_output(proj.reshape(width, width), proj_bias, gamma)
    return add_bias(jnp.dot(y, proj.astype(self.dtype)), proj_bias)


def pick(rows: jax.Array | None, x: jax.Array) -> jax.Array:
  """The tokens `rows` [B, R] of x [B, T, D]; all if it is None. By a 0/1 matrix: exact, and faster on accelerators than to gather and,
  backward, to scatter."""
  if rows is None:
    return x
  chosen = jax.nn.one_hot(rows, x.shape[1], dtype=x.dtype)
  return jnp.einsum('brt,btd->brd', chosen, x, precision='highest' if x.dtype == jnp.float32 else None)


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
  def __call__(self, x, bias=None, rate: float | jax.Array = 0.0, key: jax.Array | None = None, rows: jax.Array | None = None):
    """`rate` of drop path is used when a `key` is given. With `rows` [B, R] only those tokens of the result are made, [B, R, D]:
    all tokens attend, and what comes after takes these."""
    width = x.shape[-1]
    out_scale = 1 / math.sqrt(2 * (self.index + 1))
    keys = (None, None) if key is None else jax.random.split(key)
    constant = nn.initializers.constant(self.layer_scale)
    gammas = [self.param(name, constant, (width,)) if self.layer_scale else None for name in ('gamma1', 'gamma2')]
    x, y = LayerNorm(self.dtype, name='norm1')(x, keep=True)
    y = Attention(self.heads, self.init, out_scale, self.grid, self.attention, self.dtype, name='attn')(y, bias, gammas[0], rows)
    x = pick(rows, x) + drop_path(y, rate, keys[0])
    x, y = LayerNorm(self.dtype, name='norm2')(x, keep=True)
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

  `scan` compiles one block instead of all that are alike, at the price of stacking the parameters in every step. `remat` is one of REMAT,
  `attention` one of attention.attend's.
  """

  scan: bool = False
  remat: str = 'none'
  attention: str = 'auto'


def apply_blocks(
  block: Block,
  params: list[dict],
  x: jax.Array,
  bias: Any,
  rates: list[float],
  key: jax.Array | None,
  execution: Execution,
  rows: jax.Array | None = None,
) -> jax.Array:
  """`block` with each of `params` in turn, block i with drop path rate `rates[i]` and a key of its own. With `rows` the last makes only
  those tokens."""

  def apply(x, params, rate, key, rows=None):
    return block.apply({'params': params}, x, bias, rate, key, rows)

  policy = REMAT[execution.remat]
  one: Callable = jax.checkpoint(apply, policy=policy) if policy else apply
  keys = None if key is None else jax.random.split(key, len(params))
  done, alike = 0, len(params) if rows is None else len(params) - 1
  if execution.scan and alike > 1:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[:alike])
    each = stacked, jnp.asarray(rates[:alike]), None if keys is None else keys[:alike]
    x, done = jax.lax.scan(lambda x, each: (one(x, *each), None), x, each)[0], alike
  for i in range(done, len(params)):
    x = one(x, params[i], rates[i], keys[i] if keys is not None and rates[i] else None, rows if i == len(params) - 1 else None)
  return x
