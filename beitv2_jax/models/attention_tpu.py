"""Self-attention as one fused kernel for TPUs (Pallas).

It keeps the [T, T] weights of an image's heads in the chip's fast memory: they are never written out, neither on the
way forward nor for the backward pass, which computes them again from q and k. Two heads of 64 share the 128 lanes of a
register, everything is transposed ([keys, queries], so that the softmax sums over sublanes), and the gradients of the biases
are summed over the batch inside. tests/test_attention.py holds it to the plain version. On a TPU it takes products in bf16 and
sums in fp32, whatever x's type, as XLA's default precision does there.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# What a program may hold in the fast memory, in bytes. v5e, v5p and v6e have more than 48 MiB; v4 has 16 a core.
VMEM = {'TPU v4': 16 * 2**20}
OTHERS = 48 * 2**20


def fits(tokens: int, heads: int, head_dim: int, kind: str = '') -> bool:
  """Heads fill whole registers, and biases with their gradients fit the fast memory of this kind of device."""
  padded = -(-tokens // LANES) * LANES
  return LANES % head_dim == 0 and heads * head_dim % LANES == 0 and 4 * heads * padded**2 * 4 < VMEM.get(kind, OTHERS)


def attend(x, qkv, q_bias, v_bias, bias, on_tpu: bool, cores: int, kind: str = ''):
  """Arguments as of attention.attend; off a TPU the kernel is interpreted."""
  width, _, heads, _ = qkv.shape
  y = jnp.dot(x, qkv.reshape(width, -1))
  qkv_bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias]).reshape(1, -1).astype(jnp.float32)
  bias = None if bias is None else bias.swapaxes(1, 2)
  return fused(y, qkv_bias, bias, Static(heads, jnp.bfloat16 if on_tpu else x.dtype, not on_tpu, cores, VMEM.get(kind, OTHERS)))


def _dot(a, b, dim_a, dim_b):
  return jax.lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=jnp.float32)


def _only_head(x, h, head_dim):
  """x [T, 128] with the lanes of other heads than the h-th set to zero: a product over lanes then sees one head."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where((lane >= h * head_dim) & (lane < (h + 1) * head_dim), x, jnp.zeros_like(x))


def _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products):
  """q (scaled), k, v [T, 128] of a group of heads, with their biases, as type `products`."""
  at = [slice(s * width + group * LANES, s * width + (group + 1) * LANES) for s in range(3)]
  q, k, v = (qkv_ref[0, :, a].astype(jnp.float32) + qkv_bias_ref[:, a] for a in at)
  return [x.astype(products) for x in (q * head_dim**-0.5, k, v)]


def _logits(q, k, bias_ref, h):
  """[keys, queries] fp32 of one head (q is zero in the lanes of the others)."""
  logits = _dot(k, q, 1, 1)
  return logits if bias_ref is None else logits + bias_ref[h]


def _forward(qkv_ref, qkv_bias_ref, *refs, heads, products):
  *bias_ref, y_ref, lse_ref = refs
  width = y_ref.shape[-1]
  head_dim = width // heads
  per = LANES // head_dim
  for group in range(heads // per):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products)
    vt = v.T
    out = []
    all_logits = [_logits(_only_head(q, h, head_dim), k, bias_ref[0] if bias_ref else None, group * per + h) for h in range(per)]
    for h, logits in enumerate(all_logits):
      head = group * per + h
      largest = logits.max(0, keepdims=True)
      p = jnp.exp(logits - largest)
      total = p.sum(0, keepdims=True)
      lse_ref[0, head : head + 1] = largest + jnp.log(total)
      out.append(_dot(vt[h * head_dim : (h + 1) * head_dim], p.astype(products), 1, 0) * (1 / total))
    y_ref[0, :, group * LANES : (group + 1) * LANES] = jnp.concatenate(out).T.astype(y_ref.dtype)


def _backward(qkv_ref, qkv_bias_ref, *refs, heads, products):
  # The sums over the batch stay in memory from one image to the next: their blocks do not depend on the inner grid axis.
  if len(refs) == 4:
    (dy_ref, lse_ref, dqkv_ref, dqkv_bias_ref), bias_ref, sums = refs, None, refs[3:]
  else:
    bias_ref, dy_ref, lse_ref, dqkv_ref, dqkv_bias_ref, dbias_ref = refs
    sums = refs[4:]
  width = dy_ref.shape[-1]
  head_dim = width // heads
  per, scale = LANES // head_dim, head_dim**-0.5

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  for group in range(heads // per):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products)
    dy = dy_ref[0, :, group * LANES : (group + 1) * LANES].astype(products)
    qt, kt, dyt, transposed = q.T, k.T, dy.T, []
    # All products into [T, T] first: the compiler then fills one head's waiting with the other's work.
    logits = [_logits(_only_head(q, h, head_dim), k, bias_ref, group * per + h) for h in range(per)]
    dps = [_dot(v, _only_head(dy, h, head_dim), 1, 1) for h in range(per)]
    for h in range(per):
      head, rows = group * per + h, slice(h * head_dim, (h + 1) * head_dim)
      p = jnp.exp(logits[h] - lse_ref[0, head : head + 1])
      ds = p * (dps[h] - (p * dps[h]).sum(0, keepdims=True))
      if bias_ref is not None:
        dbias_ref[0, head] += ds
      ds, p = ds.astype(products), p.astype(products)
      # Products whose left side has only the head's 64 rows: half of the work of [T, T] x [T, 128].
      transposed.append((_dot(kt[rows], ds, 1, 0) * scale, _dot(qt[rows], ds, 1, 1), _dot(dyt[rows], p, 1, 1)))
    for s, parts in enumerate(zip(*transposed)):
      d = jnp.concatenate(parts).T
      at = slice(s * width + group * LANES, s * width + (group + 1) * LANES)
      dqkv_ref[0, :, at] = d.astype(dqkv_ref.dtype)
      if s != 1:
        dqkv_bias_ref[0, :, at] += d.sum(0, keepdims=True)


def _call(kernel, name, inputs, static, out, sums=()):
  """One image a turn; the cores of a device share the images.

  `inputs` are qkv, its bias, the position bias or None, and what else the backward takes, [B, ...]. `out` are shapes and types of
  arrays [B, ...] to fill; `sums` are shapes of fp32 sums over the batch, of which each core fills its own.
  """
  qkv, qkv_bias, bias, *more = inputs
  batch = len(qkv)
  cores = static.cores if batch % static.cores == 0 else 1
  image = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda p, i: (p * (batch // cores) + i, *(0,) * (len(x.shape) - 1)))
  whole = lambda x: pl.BlockSpec(x.shape, lambda p, i: (0,) * x.ndim)
  own = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda p, i: (p, *(0,) * (len(x.shape) - 1)))
  biases = [qkv_bias] if bias is None else [qkv_bias, bias]
  out = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in out]
  sums = [jax.ShapeDtypeStruct((cores, *shape), jnp.float32) for shape in sums]
  result = pl.pallas_call(
    functools.partial(kernel, heads=static.heads, products=static.products),
    name=name,
    grid=(cores, batch // cores),
    in_specs=[image(qkv), *map(whole, biases), *map(image, more)],
    out_shape=out + sums,
    out_specs=[*map(image, out), *map(own, sums)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=static.vmem),
    metadata=dict(turns=str(batch)),  # aot.py multiplies the compiler's schedule by it
    interpret=static.interpret,
  )(qkv, *biases, *more)
  return [*result[: len(out)], *(x.sum(0) for x in result[len(out) :])]


class Static(NamedTuple):
  """What a kernel is compiled for: heads, type of the products, whether it is interpreted, cores that share the work, fast memory in bytes."""

  heads: int
  products: Any
  interpret: bool
  cores: int
  vmem: int = OTHERS


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused(qkv: jax.Array, qkv_bias: jax.Array, bias: jax.Array | None, static: Static) -> jax.Array:
  """The kernel: qkv [B, T, 3*H*E] before its bias [1, 3*H*E] (fp32), bias [H, keys, queries] fp32 or None → [B, T, H*E]."""
  return _fused_forward(qkv, qkv_bias, bias, static)[0]


def _fused_forward(qkv, qkv_bias, bias, static):
  _, tokens, width = qkv.shape
  out = [((tokens, width // 3), qkv.dtype), ((static.heads, tokens), jnp.float32)]
  y, lse = _call(_forward, 'attention_forward', (qkv, qkv_bias, bias), static, out)
  return y, (qkv, qkv_bias, bias, lse)


def _fused_backward(static, saved, dy):
  qkv, qkv_bias, bias, lse = saved
  sums = [qkv_bias.shape, *([] if bias is None else [bias.shape])]
  inputs = (qkv, qkv_bias, bias, dy, lse)
  dqkv, dqkv_bias, *dbias = _call(_backward, 'attention_backward', inputs, static, [(qkv.shape[1:], qkv.dtype)], sums)
  return dqkv, dqkv_bias, dbias[0] if dbias else None


fused.defvjp(_fused_forward, _fused_backward)
