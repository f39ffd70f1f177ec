"""Self-attention as fused kernels for NVIDIA GPUs (Pallas through Triton): one forward, three backward.

As in FlashAttention the [T, T] weights are never written out, and the backward pass computes them again. What is ours: q, k and v are
read where the product with their matrix left them, biases are added on the way, a tail shorter than a tile is masked, and the position
bias is shared by the images, so that the kernel of its gradient sums over them. tests/test_attention.py holds all to the plain version.

The softmax is in powers of two (the chip's own exponential): `LOG2E` is multiplied into scale and bias. Logits and sums are fp32,
products and the position bias of x's type.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from beitv2_jax.kernels.chip import triton as plgpu

LOG2E = math.log2(math.e)
NEVER = -1e30  # a logit that gets no weight, and makes no NaN


class Tiles(NamedTuple):
  """Queries and keys of a tile, warps that share it, and loads in flight."""

  queries: int
  keys: int
  warps: int
  stages: int


# The fastest of those tried on an H100 at 197 tokens in heads of 64.
FORWARD = Tiles(64, 32, 4, 3)
QUERIES = Tiles(64, 32, 4, 3)
KEYS = Tiles(32, 64, 4, 1)
BIAS = Tiles(64, 32, 4, 3)
PADDED = 128  # biases are padded to whole tiles of any of these
SHARES = 4  # images are shared out among so many programs where their gradients are summed


def fits(head_dim: int) -> bool:
  return head_dim in (16, 32, 64, 128)


def attend(x, qkv, q_bias, v_bias, bias, interpret: bool):
  """Arguments as of attention.attend."""
  (_, tokens, width), heads = x.shape, qkv.shape[2]
  y = jnp.dot(x, qkv.reshape(width, -1))
  q_bias, v_bias = (b.reshape(-1).astype(jnp.float32) for b in (q_bias, v_bias))
  if bias is not None:
    more = _padded(tokens) - tokens
    bias = jnp.pad(jnp.pad(bias * LOG2E, ((0, 0), (0, 0), (0, more)), constant_values=NEVER), ((0, 0), (0, more), (0, 0)))
  return fused(y, q_bias, v_bias, bias, Static(heads, interpret))


def _padded(tokens: int) -> int:
  return -(-tokens // PADDED) * PADDED


class Static(NamedTuple):
  heads: int
  interpret: bool


def _rows(start, size, tokens):
  """(slice of rows, mask [rows, 1] of those that exist)."""
  return pl.ds(start, size), (start + jnp.arange(size) < tokens)[:, None]


def _load(ref, rows, mask, start, size, image=()):
  """[rows, size] of a ref whose leading axes, if it has any, are at `image`."""
  return plgpu.load(ref.at[(*image, rows, pl.ds(start, size))], mask=mask, other=0.0)


def _statistics(lse_ref, delta_ref, rows, mask, image=()):
  """[rows] each. Rows that don't exist get no weights, and so no gradients."""
  lse = plgpu.load(lse_ref.at[(*image, rows)], mask=mask[:, 0], other=-NEVER)
  return lse, plgpu.load(delta_ref.at[(*image, rows)], mask=mask[:, 0], other=0.0)


def _logits(a, b, bias, there):
  """[rows of a, rows of b] in powers of two; `there`, which broadcasts to it, says which keys exist. A bias has it built in."""
  logits = plgpu.dot(a, b.T) * (a.shape[1] ** -0.5 * LOG2E)
  return jnp.where(there, logits, NEVER) if bias is None else logits + bias.astype(jnp.float32)


def _query(qkv_ref, q_bias_ref, rows, mask, column, head_dim, image=()):
  q = _load(qkv_ref, rows, mask, column, head_dim, image)
  return (q.astype(jnp.float32) + q_bias_ref[pl.ds(column, head_dim)]).astype(q.dtype)


def _forward(*refs, static, tiles):
  qkv_ref, q_bias_ref, v_bias_ref, *bias_ref, y_ref, lse_ref = refs
  bias_ref = bias_ref[0] if bias_ref else None
  (tokens, width), head_dim = y_ref.shape, y_ref.shape[1] // static.heads
  start, column = pl.program_id(0) * tiles.queries, pl.program_id(1) * head_dim
  rows, mask = _rows(start, tiles.queries, tokens)
  q = _query(qkv_ref, q_bias_ref, rows, mask, column, head_dim)

  def body(j, carry):
    y, largest, total = carry
    cols, there = _rows(j * tiles.keys, tiles.keys, tokens)
    k, v = (_load(qkv_ref, cols, there, s * width + column, head_dim) for s in (1, 2))
    logits = _logits(q, k, None if bias_ref is None else bias_ref[rows, cols], there.T)
    largest, before = jnp.maximum(largest, logits.max(1)), largest
    p, shrink = jnp.exp2(logits - largest[:, None]), jnp.exp2(before - largest)
    y = y * shrink[:, None] + plgpu.dot(p.astype(v.dtype), v)
    return y, largest, total * shrink + p.sum(1)

  carry = jnp.zeros((tiles.queries, head_dim)), jnp.full(tiles.queries, -jnp.inf), jnp.zeros(tiles.queries)
  y, largest, total = jax.lax.fori_loop(0, pl.cdiv(tokens, tiles.keys), body, carry)
  plgpu.store(lse_ref.at[rows], largest + jnp.log2(total), mask=mask[:, 0])
  y = y / total[:, None] + v_bias_ref[pl.ds(column, head_dim)]  # weights sum to one: v's bias can be added here
  plgpu.store(y_ref.at[rows, pl.ds(column, head_dim)], y.astype(y_ref.dtype), mask=mask)


def _backward_queries(*refs, static, tiles):
  """Gradients of queries and of the biases of q and v (sums over a tile's rows), and delta, the other two kernels' Σ p dp."""
  qkv_ref, q_bias_ref, v_bias_ref, *bias_ref, lse_ref, y_ref, dy_ref, dqkv_ref, delta_ref, dq_bias_ref, dv_bias_ref = refs
  bias_ref = bias_ref[0] if bias_ref else None
  (tokens, width), head_dim = y_ref.shape, y_ref.shape[1] // static.heads
  start, column = pl.program_id(0) * tiles.queries, pl.program_id(1) * head_dim
  rows, mask = _rows(start, tiles.queries, tokens)
  here = pl.ds(column, head_dim)
  q = _query(qkv_ref, q_bias_ref, rows, mask, column, head_dim)
  dy, y = (_load(ref, rows, mask, column, head_dim) for ref in (dy_ref, y_ref))
  delta = (dy.astype(jnp.float32) * (y.astype(jnp.float32) - v_bias_ref[here])).sum(1)
  plgpu.store(delta_ref.at[rows], delta, mask=mask[:, 0])
  lse, delta = plgpu.load(lse_ref.at[rows], mask=mask[:, 0], other=-NEVER)[:, None], delta[:, None]

  def body(j, dq):
    cols, there = _rows(j * tiles.keys, tiles.keys, tokens)
    k, v = (_load(qkv_ref, cols, there, s * width + column, head_dim) for s in (1, 2))
    logits = _logits(q, k, None if bias_ref is None else bias_ref[rows, cols], there.T)
    ds = jnp.exp2(logits - lse) * (plgpu.dot(dy, v.T) - delta)
    return dq + plgpu.dot(ds.astype(k.dtype), k)

  dq = jax.lax.fori_loop(0, pl.cdiv(tokens, tiles.keys), body, jnp.zeros((tiles.queries, head_dim))) * head_dim**-0.5
  plgpu.store(dqkv_ref.at[rows, here], dq.astype(dqkv_ref.dtype), mask=mask)
  dq_bias_ref[here] = dq.sum(0)
  dv_bias_ref[here] = dy.astype(jnp.float32).sum(0)


def _backward_keys(*refs, static, tiles):
  """Gradients of keys and values. Everything is [keys, queries], the bias too, so that no tile needs to be turned."""
  qkv_ref, q_bias_ref, *bias_ref, lse_ref, delta_ref, dy_ref, _, dqkv_ref = refs
  bias_ref = bias_ref[0] if bias_ref else None
  (tokens, width), head_dim = dy_ref.shape, dy_ref.shape[1] // static.heads
  start, column = pl.program_id(0) * tiles.keys, pl.program_id(1) * head_dim
  cols, there = _rows(start, tiles.keys, tokens)
  k, v = (_load(qkv_ref, cols, there, s * width + column, head_dim) for s in (1, 2))

  def body(i, carry):
    dk, dv = carry
    rows, mask = _rows(i * tiles.queries, tiles.queries, tokens)
    q = _query(qkv_ref, q_bias_ref, rows, mask, column, head_dim)
    dy = _load(dy_ref, rows, mask, column, head_dim)
    lse, delta = _statistics(lse_ref, delta_ref, rows, mask)
    p = jnp.exp2(_logits(k, q, None if bias_ref is None else bias_ref[cols, rows], there) - lse)
    ds = p * (plgpu.dot(v, dy.T) - delta)
    return dk + plgpu.dot(ds.astype(q.dtype), q), dv + plgpu.dot(p.astype(q.dtype), dy)

  zeros = jnp.zeros((tiles.keys, head_dim))
  dk, dv = jax.lax.fori_loop(0, pl.cdiv(tokens, tiles.queries), body, (zeros, zeros))
  for s, d in ((1, dk * head_dim**-0.5), (2, dv)):
    plgpu.store(dqkv_ref.at[cols, pl.ds(s * width + column, head_dim)], d.astype(dqkv_ref.dtype), mask=there)


def _backward_bias(qkv_ref, q_bias_ref, bias_ref, lse_ref, delta_ref, dy_ref, dbias_ref, *, static, tiles):
  """The position bias's gradient, one tile of one head, summed over a share of the images. Arrays keep their batch axis here."""
  batch, tokens, width = dy_ref.shape
  head_dim = width // static.heads
  across = pl.cdiv(tokens, tiles.keys)
  tile, head, turn = (pl.program_id(a) for a in range(3))
  row, col, column = (tile // across) * tiles.queries, (tile % across) * tiles.keys, head * head_dim
  (rows, mask), (cols, there) = _rows(row, tiles.queries, tokens), _rows(col, tiles.keys, tokens)
  bias = bias_ref[head, rows, cols]

  def body(n, total):
    b = n * pl.num_programs(2) + turn
    q = _query(qkv_ref, q_bias_ref, rows, mask, column, head_dim, (b,))
    dy = _load(dy_ref, rows, mask, column, head_dim, (b,))
    k, v = (_load(qkv_ref, cols, there, s * width + column, head_dim, (b,)) for s in (1, 2))
    logits = _logits(q, k, bias, None)
    lse, delta = _statistics(lse_ref, delta_ref, rows, mask, (b, head))
    return total + jnp.exp2(logits - lse[:, None]) * (plgpu.dot(dy, v.T) - delta[:, None])

  images = (batch - turn + pl.num_programs(2) - 1) // pl.num_programs(2)
  dbias_ref[rows, cols] = jax.lax.fori_loop(0, images, body, jnp.zeros((tiles.queries, tiles.keys)))


_image = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b, 0, 0))
_whole = lambda x: pl.BlockSpec(x.shape, lambda i, h, b: (0,) * x.ndim)
_head = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (h, 0, 0))  # a bias
_row = lambda x: pl.BlockSpec((None, None, x.shape[2]), lambda i, h, b: (b, h, 0))  # statistics of the queries
_part = lambda x: pl.BlockSpec((None, None, x.shape[2]), lambda i, h, b: (b, i, 0))  # sums over the rows of a tile


def _call(kernel, static, tiles, grid, inputs, out, **more):
  """`inputs` and `out`: pairs of arrays (or shapes) and their specs; inputs may be None."""
  inputs = [(x, spec) for x, spec in inputs if x is not None]
  return pl.pallas_call(
    functools.partial(kernel, static=static, tiles=tiles),
    name='attention' + kernel.__name__,
    grid=grid,
    in_specs=[spec(x) for x, spec in inputs],
    out_specs=[spec(x) for x, spec in out],
    out_shape=[x for x, _ in out],
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    interpret=static.interpret,
    **more,
  )(*(x for x, _ in inputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused(qkv: jax.Array, q_bias: jax.Array, v_bias: jax.Array, bias: jax.Array | None, static: Static) -> jax.Array:
  """qkv [B, T, 3*H*E] before its biases [H*E] and bias [H, P, P], padded and times LOG2E, or None (all fp32) → [B, T, H*E]."""
  return _fused_forward(qkv, q_bias, v_bias, bias, static)[0]


def _fused_forward(qkv, q_bias, v_bias, bias, static):
  bias = None if bias is None else bias.astype(qkv.dtype)
  batch, tokens, width = qkv.shape
  y = jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype)
  lse = jax.ShapeDtypeStruct((batch, static.heads, tokens), jnp.float32)
  inputs = [(qkv, _image), (q_bias, _whole), (v_bias, _whole), (bias, _head)]
  grid = pl.cdiv(tokens, FORWARD.queries), static.heads, batch
  y, lse = _call(_forward, static, FORWARD, grid, inputs, [(y, _image), (lse, _row)])
  return y, (qkv, q_bias, v_bias, bias, y, lse)


def _fused_backward(static, saved, dy):
  qkv, q_bias, v_bias, bias, y, lse = saved
  (batch, tokens, width), heads = y.shape, static.heads
  shape = jax.ShapeDtypeStruct
  count = pl.cdiv(tokens, QUERIES.queries)
  part = shape((batch, count, width), jnp.float32)
  dqkv = shape(qkv.shape, qkv.dtype)
  inputs = [(qkv, _image), (q_bias, _whole), (v_bias, _whole), (bias, _head), (lse, _row), (y, _image), (dy, _image)]
  outputs = [(dqkv, _image), (shape(lse.shape, jnp.float32), _row), (part, _part), (part, _part)]
  dqkv, delta, dq_bias, dv_bias = _call(_backward_queries, static, QUERIES, (count, heads, batch), inputs, outputs)

  turned = None if bias is None else bias.swapaxes(1, 2)
  inputs = [(qkv, _image), (q_bias, _whole), (turned, _head), (lse, _row), (delta, _row), (dy, _image), (dqkv, _image)]
  last = sum(x is not None for x, _ in inputs) - 1  # the same array, of which this kernel fills the other two thirds
  grid = pl.cdiv(tokens, KEYS.keys), heads, batch
  (dqkv,) = _call(_backward_keys, static, KEYS, grid, inputs, [(shape(qkv.shape, qkv.dtype), _image)], input_output_aliases={last: 0})

  dbias = None
  if bias is not None:
    turns = min(SHARES, batch)
    grid = pl.cdiv(tokens, BIAS.queries) * pl.cdiv(tokens, BIAS.keys), heads, turns
    parts = shape((turns, *bias.shape), jnp.float32)
    own = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, turn: (turn, h, 0, 0))
    inputs = [(x, _whole) for x in (qkv, q_bias, bias, lse, delta, dy)]
    (parts,) = _call(_backward_bias, static, BIAS, grid, inputs, [(parts, own)])
    dbias = parts.sum(0) / LOG2E  # `bias` came multiplied by it
  return dqkv, dq_bias.sum((0, 1)), dv_bias.sum((0, 1)), dbias


fused.defvjp(_fused_forward, _fused_backward)
