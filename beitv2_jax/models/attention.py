"""Self-attention between T tokens with a learned position bias: plain XLA, and one fused kernel for TPUs.

The kernel keeps the [T, T] weights of an image's heads in the chip's fast memory: they are never written out, neither on the
way forward nor for the backward pass, which computes them again from q and k. Two heads of 64 share the 128 lanes of a
register, everything is transposed ([keys, queries], so that the softmax sums over sublanes), and the gradients of the biases
are summed over the batch inside. tests/test_attention.py holds it to the plain version. On a TPU it takes products in bf16 and
sums in fp32, whatever x's type, as XLA's default precision does there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

LANES = 128
VMEM = 48 * 2**20  # what a program may hold there, in bytes; all TPUs since v4 have more

_refused = ''  # why 'auto' doesn't take the kernel in this process; set by `check`


def attend(x: jax.Array, qkv: jax.Array, q_bias: jax.Array, v_bias: jax.Array, bias: jax.Array | None, how: str = 'auto') -> jax.Array:
  """Multi-head self-attention up to its output matrix: x [B, T, D] → [B, T, H*E].

  Args:
    qkv: [D, 3, H, E] of x's type. q_bias, v_bias: [H, E]; keys have none.
    bias: [H, queries, keys], fp32, added to the scaled logits, or None.
    how: 'xla', 'pallas' (the kernel; interpreted, which is slow, where there is no TPU), or 'auto': the kernel on a TPU mesh
      (`jax.set_mesh`) that it fits.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = 1 if mesh.empty or qkv.shape[2] % mesh.shape['model'] else mesh.shape['model']
  tpu = not mesh.empty and mesh.abstract_device.platform == 'tpu'
  possible = fits(x.shape[1], qkv.shape[2] // split, qkv.shape[3])
  if how == 'xla' or (how == 'auto' and not (tpu and possible and default_precision() and not _refused)):
    return plain(x, qkv, q_bias, v_bias, bias)
  if not possible:
    raise ValueError(f'layers.attention=pallas cannot take {x.shape[1]} tokens in heads of {qkv.shape[3]}; use auto or xla.')

  def local(x, qkv, q_bias, v_bias, bias):
    width, _, heads, _ = qkv.shape
    y = jnp.dot(x, qkv.reshape(width, -1))
    qkv_bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias]).reshape(1, -1).astype(jnp.float32)
    bias = None if bias is None else bias.swapaxes(1, 2)
    return fused(y, qkv_bias, bias, heads, jnp.bfloat16 if tpu else x.dtype, not tpu)

  if mesh.empty:
    return local(x, qkv, q_bias, v_bias, bias)
  m = 'model' if split > 1 else None
  specs = (P('data'), P(None, None, m), P(m), P(m), None if bias is None else P(m))
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P('data', None, m), check_vma=False)(x, qkv, q_bias, v_bias, bias)


def plain(x, qkv, q_bias, v_bias, bias):
  heads, head_dim = qkv.shape[2:]
  q, k, v = jnp.moveaxis(jnp.einsum('btd,dshe->btshe', x, qkv), 2, 0)
  logits = jnp.einsum('bqhe,bkhe->bhqk', (q + q_bias) * head_dim**-0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits if bias is None else logits + bias).astype(x.dtype)
  return jnp.einsum('bhqk,bkhe->bqhe', weights, v + v_bias).reshape(*x.shape[:2], heads * head_dim)


def fits(tokens: int, heads: int, head_dim: int) -> bool:
  """Heads fill whole registers, and biases with their gradients fit the fast memory."""
  padded = -(-tokens // LANES) * LANES
  return LANES % head_dim == 0 and heads * head_dim % LANES == 0 and 4 * heads * padded**2 * 4 < VMEM


def default_precision() -> bool:
  return jax.config.jax_default_matmul_precision in (None, 'default', 'bfloat16')


def check() -> str:
  """Runs the kernel against the plain version on this process's TPU, if it has one. Returns what is wrong, '' if nothing is;
  from then on 'auto' leaves the kernel alone."""
  global _refused
  if jax.default_backend() != 'tpu':
    return ''
  rng = np.random.default_rng(0)
  heads, head_dim, tokens = 2, 64, 197
  qkv, qkv_bias, bias, dy = (
    jnp.asarray(rng.normal(size=s), jnp.float32)
    for s in ((2, tokens, 3 * heads * head_dim), (1, 3 * heads * head_dim), (heads, tokens, tokens), (2, tokens, heads * head_dim))
  )
  qkv_bias = qkv_bias.at[:, heads * head_dim : 2 * heads * head_dim].set(0)

  def reference(qkv, qkv_bias, bias):
    q, k, v = jnp.moveaxis((qkv + qkv_bias).reshape(2, tokens, 3, heads, head_dim), 2, 0)
    logits = jnp.einsum('bqhe,bkhe->bhqk', q, k, precision='highest') * head_dim**-0.5 + bias.swapaxes(1, 2)
    return jnp.einsum('bhqk,bkhe->bqhe', jax.nn.softmax(logits), v, precision='highest').reshape(2, tokens, -1)

  def both(f):
    y, back = jax.vjp(f, qkv, qkv_bias, bias)
    return y, *back(dy)

  try:
    ours, theirs = jax.jit(lambda: (both(lambda *a: fused(*a, heads, jnp.bfloat16, False)), both(reference)))()
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(ours, theirs))
    _refused = '' if worst < 0.03 else f'it is off by {worst:.1%}'
  except Exception as e:  # whatever the compiler says
    _refused = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
  return _refused


def _dot(a, b, dim_a, dim_b):
  return jax.lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=jnp.float32)


def _only_head(x, h, head_dim):
  """x [T, 128] with the lanes of other heads than the h-th set to zero: a product over lanes then sees one head."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where((lane >= h * head_dim) & (lane < (h + 1) * head_dim), x, jnp.zeros_like(x))


def _qkv(qkv_ref, qkv_bias_ref, group, width, products):
  """q, k, v [T, 128] of a group of heads, with their biases, as type `products`."""
  at = [slice(s * width + group * LANES, s * width + (group + 1) * LANES) for s in range(3)]
  return [(qkv_ref[0, :, a].astype(jnp.float32) + qkv_bias_ref[:, a]).astype(products) for a in at]


def _weights(q, k, bias_ref, h, head_dim):
  """Softmax over keys, [keys, queries] fp32, of one head (q is zero in the lanes of the others)."""
  logits = _dot(k, q, 1, 1) * head_dim**-0.5
  if bias_ref is not None:
    logits += bias_ref[h]
  p = jnp.exp(logits - logits.max(0, keepdims=True))
  return p * (1 / p.sum(0, keepdims=True))


def _forward(qkv_ref, qkv_bias_ref, *refs, heads, products):
  *bias_ref, y_ref = refs
  width = y_ref.shape[-1]
  head_dim = width // heads
  per = LANES // head_dim
  for group in range(heads // per):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, products)
    vt = v.T
    out = []
    for h in range(per):
      p = _weights(_only_head(q, h, head_dim), k, bias_ref[0] if bias_ref else None, group * per + h, head_dim)
      out.append(_dot(vt[h * head_dim : (h + 1) * head_dim], p.astype(v.dtype), 1, 0))
    y_ref[0, :, group * LANES : (group + 1) * LANES] = jnp.concatenate(out).T.astype(y_ref.dtype)


def _backward(qkv_ref, qkv_bias_ref, *refs, heads, products):
  # The sums over the batch stay in memory from one image to the next: their blocks do not depend on the inner grid axis.
  if len(refs) == 3:
    (dy_ref, dqkv_ref, dqkv_bias_ref), bias_ref, sums = refs, None, refs[2:]
  else:
    bias_ref, dy_ref, dqkv_ref, dqkv_bias_ref, dbias_ref = refs
    sums = refs[3:]
  width = dy_ref.shape[-1]
  head_dim = width // heads
  per, scale = LANES // head_dim, head_dim**-0.5

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  for group in range(heads // per):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, products)
    dy = dy_ref[0, :, group * LANES : (group + 1) * LANES].astype(q.dtype)
    kt, dq, dk, dv = k.T, [], 0, 0
    for h in range(per):
      qh, dyh = _only_head(q, h, head_dim), _only_head(dy, h, head_dim)
      p = _weights(qh, k, bias_ref, group * per + h, head_dim)
      dp = _dot(v, dyh, 1, 1)
      ds = p * (dp - (p * dp).sum(0, keepdims=True))
      if bias_ref is not None:
        dbias_ref[0, group * per + h] += ds
      ds = ds.astype(q.dtype)
      dq.append(_dot(kt[h * head_dim : (h + 1) * head_dim], ds, 1, 0))
      dk += _dot(ds, qh, 1, 0)
      dv += _dot(p.astype(q.dtype), dyh, 1, 0)
    for s, d in enumerate((jnp.concatenate(dq).T * scale, dk * scale, dv)):
      at = slice(s * width + group * LANES, s * width + (group + 1) * LANES)
      dqkv_ref[0, :, at] = d.astype(dqkv_ref.dtype)
      if s != 1:
        dqkv_bias_ref[0, :, at] += d.sum(0, keepdims=True)


def _call(kernel, name, qkv, qkv_bias, bias, heads, products, interpret, more=(), sums=()):
  """One image a turn, in two halves that a chip with two cores shares. `more` are inputs and `sums` outputs of the backward."""
  batch, tokens, width = qkv.shape
  halves = 2 if batch % 2 == 0 else 1
  image = lambda x: pl.BlockSpec((1, tokens, x.shape[-1]), lambda p, i: (p * (batch // halves) + i, 0, 0))
  whole = lambda x: pl.BlockSpec(x.shape, lambda p, i: (0,) * x.ndim)
  half = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda p, i: (p, *(0,) * (x.ndim - 1)))
  biases = [qkv_bias] if bias is None else [qkv_bias, bias]
  out = [jax.ShapeDtypeStruct((batch, tokens, width if sums else width // 3), qkv.dtype)]
  out += [jax.ShapeDtypeStruct((halves, *shape), jnp.float32) for shape in sums]
  result = pl.pallas_call(
    functools.partial(kernel, heads=heads, products=products),
    name=name,
    grid=(halves, batch // halves),
    in_specs=[image(qkv), *map(whole, biases), *map(image, more)],
    out_shape=out,
    out_specs=[image(out[0]), *map(half, out[1:])],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM),
    metadata=dict(turns=str(batch)),  # aot.py multiplies the compiler's schedule by it
    interpret=interpret,
  )(qkv, *biases, *more)
  return result[0], [x.sum(0) for x in result[1:]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def fused(qkv: jax.Array, qkv_bias: jax.Array, bias: jax.Array | None, heads: int, products: Any, interpret: bool) -> jax.Array:
  """The kernel: qkv [B, T, 3*H*E] before its bias [1, 3*H*E] (fp32), bias [H, keys, queries] fp32 or None → [B, T, H*E]."""
  return _call(_forward, 'attention_forward', qkv, qkv_bias, bias, heads, products, interpret)[0]


def _fused_forward(qkv, qkv_bias, bias, *static):
  return fused(qkv, qkv_bias, bias, *static), (qkv, qkv_bias, bias)


def _fused_backward(heads, products, interpret, saved, dy):
  qkv, qkv_bias, bias = saved
  sums = [qkv_bias.shape, *([] if bias is None else [bias.shape])]
  dqkv, (dqkv_bias, *dbias) = _call(_backward, 'attention_backward', *saved, heads, products, interpret, [dy], sums)
  return dqkv, dqkv_bias, dbias[0] if dbias else None


fused.defvjp(_fused_forward, _fused_backward)
