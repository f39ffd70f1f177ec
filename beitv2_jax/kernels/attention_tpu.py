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
MIB = 2**20
# What a program may hold in the fast memory, in bytes: v5e and v6e have 128 MiB, v4 has 16 a core; others (v5p has 64 a core) get `ENOUGH`.
# XLA keeps activations in what is left, so that programs of several registers of heads are made up to `ENOUGH` only, too.
VMEM = {'TPU v4': 16 * MIB, 'TPU v5 lite': 96 * MIB, 'TPU v6 lite': 96 * MIB}
ENOUGH = 48 * MIB
TILE = 640 * 640  # logits of a head that are worked on at a time


class Plan(NamedTuple):
  """How the work is cut up: heads, how many of them a program holds at a time, queries in a tile; and the fast memory asked for, in bytes."""

  heads: int
  together: int
  tile: int
  vmem: int

  def order(self, x: jax.Array) -> jax.Array:
    """[..., 3, H, E] → [..., 3*H*E] in the order of the programs: q, k and v of the first one's heads, of the second's ..."""
    *some, three, _, head_dim = x.shape
    x = x.reshape(*some, three, self.heads // self.together, self.together * head_dim)
    return x.swapaxes(-3, -2).reshape(*some, -1)


def plan(tokens: int, heads: int, head_dim: int, kind: str = '', itemsize: int = 2) -> Plan | None:
  """As many heads together as the fast memory of this kind of device takes, or None where the kernel can't be used. `itemsize`: bytes of an activation."""
  if LANES % head_dim or heads * head_dim % LANES:
    return None
  up = lambda n, to: -(-n // to) * to
  per, vmem = LANES // head_dim, VMEM.get(kind, ENOUGH)
  keys, queries = up(tokens, 8), up(tokens, LANES)
  tile = up(-(-tokens // -(-keys * queries // TILE)), LANES)
  for together in range(heads, 0, -per):
    biases = 4 * together * keys * queries * 4  # two buffers each of the bias and of its gradient
    images = 2 * 8 * together * head_dim * up(tokens, 16) * itemsize  # two of q, k, v, their gradients, the output and its gradient
    need = biases + images + 4 * per * keys * tile * 4  # and what a register of heads is worked on with
    if heads % together == 0 and need < (vmem if together == per else min(vmem, ENOUGH)):
      return Plan(heads, together, tile, min(need * 5 // 4, vmem))
  return None


def attend(x, qkv, q_bias, v_bias, bias, plan: Plan, on_tpu: bool, cores: int):
  """Arguments as of attention.attend; off a TPU the kernel is interpreted."""
  y = jnp.dot(x, plan.order(qkv))
  qkv_bias = plan.order(jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(jnp.float32))[None, None]
  bias = None if bias is None else bias.swapaxes(1, 2)[None]
  return fused(y, qkv_bias, bias, Static(plan, jnp.bfloat16 if on_tpu else x.dtype, not on_tpu, cores))


def _dot(a, b, dim_a, dim_b):
  return jax.lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=jnp.float32)


def _only_head(x, h, head_dim):
  """x [T, 128] with the lanes of other heads than the h-th set to zero: a product over lanes then sees one head."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where((lane >= h * head_dim) & (lane < (h + 1) * head_dim), x, jnp.zeros_like(x))


def _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products):
  """q (scaled), k, v [T, 128] of a group of heads, with their biases, as type `products`."""
  at = [slice(s * width + group * LANES, s * width + (group + 1) * LANES) for s in range(3)]
  q, k, v = (qkv_ref[0, :, a].astype(jnp.float32) + qkv_bias_ref[0, :, a] for a in at)
  return [x.astype(products) for x in (q * head_dim**-0.5, k, v)]


def _logits(q, k, bias_ref, head, at):
  """[keys, queries] fp32 of one head and a tile of queries (q is zero in the lanes of the other heads)."""
  logits = _dot(k, q, 1, 1)
  return logits if bias_ref is None else logits + bias_ref[0, head, :, at]


def _tiles(tokens, tile):
  return [slice(start, min(start + tile, tokens)) for start in range(0, tokens, tile)]


def _forward(qkv_ref, qkv_bias_ref, *refs, head_dim, tile, products):
  *bias_ref, y_ref, lse_ref = refs
  bias_ref = bias_ref[0] if bias_ref else None
  tokens, width = y_ref.shape[1:]
  per = LANES // head_dim
  for group in range(width // LANES):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products)
    vt = v.T
    for at in _tiles(tokens, tile):
      out = []
      all_logits = [_logits(_only_head(q[at], h, head_dim), k, bias_ref, group * per + h, at) for h in range(per)]
      for h, logits in enumerate(all_logits):
        head = group * per + h
        largest = logits.max(0, keepdims=True)
        p = jnp.exp(logits - largest)
        total = p.sum(0, keepdims=True)
        lse_ref[0, 0, head : head + 1, at] = largest + jnp.log(total)
        out.append(_dot(vt[h * head_dim : (h + 1) * head_dim], p.astype(products), 1, 0) * (1 / total))
      y_ref[0, at, group * LANES : (group + 1) * LANES] = jnp.concatenate(out).T.astype(y_ref.dtype)


def _backward(qkv_ref, qkv_bias_ref, *refs, head_dim, tile, products):
  # The sums over the batch stay in memory from one image to the next: their blocks do not depend on the inner grid axis.
  if len(refs) == 4:
    (dy_ref, lse_ref, dqkv_ref, dqkv_bias_ref), bias_ref, sums = refs, None, refs[3:]
  else:
    bias_ref, dy_ref, lse_ref, dqkv_ref, dqkv_bias_ref, dbias_ref = refs
    sums = refs[4:]
  tokens, width = dy_ref.shape[1:]
  per, scale = LANES // head_dim, head_dim**-0.5

  @pl.when(pl.program_id(2) == 0)
  def _():
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

  def write(s, group, at, parts):
    """Gradients [E, tile] of the heads of a group: of q (s=0), k or v."""
    d = jnp.concatenate(parts).T
    columns = slice(s * width + group * LANES, s * width + (group + 1) * LANES)
    dqkv_ref[0, at, columns] = d.astype(dqkv_ref.dtype)
    if s != 1:
      dqkv_bias_ref[0, :, columns] += d.sum(0, keepdims=True)

  for group in range(width // LANES):
    q, k, v = _qkv(qkv_ref, qkv_bias_ref, group, width, head_dim, products)
    dy = dy_ref[0, :, group * LANES : (group + 1) * LANES].astype(products)
    qt, kt, dyt = q.T, k.T, dy.T
    dk, dv = [0.0] * per, [0.0] * per
    for at in _tiles(tokens, tile):
      # All products into [keys, queries] first: the compiler then fills one head's waiting with the other's work.
      logits = [_logits(_only_head(q[at], h, head_dim), k, bias_ref, group * per + h, at) for h in range(per)]
      dps = [_dot(v, _only_head(dy[at], h, head_dim), 1, 1) for h in range(per)]
      dq = []
      for h in range(per):
        head, rows = group * per + h, slice(h * head_dim, (h + 1) * head_dim)
        p = jnp.exp(logits[h] - lse_ref[0, 0, head : head + 1, at])
        ds = p * (dps[h] - (p * dps[h]).sum(0, keepdims=True))
        if bias_ref is not None:
          dbias_ref[0, head, :, at] += ds
        ds, p = ds.astype(products), p.astype(products)
        # Products whose left side has only the head's 64 rows: half of the work of [T, T] x [T, 128].
        dq.append(_dot(kt[rows], ds, 1, 0) * scale)
        dk[h] += _dot(qt[rows, at], ds, 1, 1)
        dv[h] += _dot(dyt[rows, at], p, 1, 1)
      write(0, group, at, dq)
    write(1, group, slice(None), dk)
    write(2, group, slice(None), dv)


class Static(NamedTuple):
  """What a kernel is compiled for: the plan, the products' type, whether it is interpreted, and the cores that share the work."""

  plan: Plan
  products: Any
  interpret: bool
  cores: int


def _call(kernel, name, inputs, static, out, sums=()):
  """One image and the heads of one program a turn: all images before the next heads, and the cores of a device share the images.

  `inputs` are qkv, its bias, the position bias or None, and what else the backward pass takes. `out` are shapes and types of arrays to
  fill, `sums` shapes of fp32 sums over the batch, of which each core fills its own. Programs share heads: the last axis of three, or
  the second of four. The first axis is images, cores or 1.
  """
  qkv, qkv_bias, bias, *more = inputs
  batch, programs = len(qkv), static.plan.heads // static.plan.together
  cores = static.cores if batch % static.cores == 0 else 1

  def block(x, first):
    split = 1 if x.ndim == 4 else 2
    shape = (1, *(n // programs if axis == split else n for axis, n in enumerate(x.shape) if axis))
    return pl.BlockSpec(shape, lambda core, p, i: (first(core, i), *(p if axis == split else 0 for axis in range(1, x.ndim))))

  image = lambda x: block(x, lambda core, i: core * (batch // cores) + i)
  whole = lambda x: block(x, lambda core, i: 0)
  own = lambda x: block(x, lambda core, i: core)
  biases = [qkv_bias] if bias is None else [qkv_bias, bias]
  out = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in out]
  sums = [jax.ShapeDtypeStruct((cores, *shape[1:]), jnp.float32) for shape in sums]
  head_dim = qkv.shape[2] // 3 // static.plan.heads
  result = pl.pallas_call(
    functools.partial(kernel, head_dim=head_dim, tile=static.plan.tile, products=static.products),
    name=name,
    grid=(cores, programs, batch // cores),
    in_specs=[image(qkv), *map(whole, biases), *map(image, more)],
    out_shape=out + sums,
    out_specs=[*map(image, out), *map(own, sums)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=static.plan.vmem),
    metadata=dict(turns=str(batch * programs)),  # costs/estimate.py multiplies the compiler's schedule by it
    interpret=static.interpret,
  )(qkv, *biases, *more)
  return [*result[: len(out)], *(x.sum(0, keepdims=True) for x in result[len(out) :])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused(qkv: jax.Array, qkv_bias: jax.Array, bias: jax.Array | None, static: Static) -> jax.Array:
  """The kernel: qkv [B, T, 3*H*E] in the plan's order, its bias [1, 1, 3*H*E] (fp32), bias [1, H, keys, queries] fp32 or None → [B, T, H*E]."""
  return _fused_forward(qkv, qkv_bias, bias, static)[0]


def _fused_forward(qkv, qkv_bias, bias, static):
  _, tokens, width = qkv.shape
  heads, together, *_ = static.plan
  out = [((tokens, width // 3), qkv.dtype), ((heads // together, together, tokens), jnp.float32)]
  y, lse = _call(_forward, 'attention_forward', (qkv, qkv_bias, bias), static, out)
  return y, (qkv, qkv_bias, bias, lse)


def _fused_backward(static, saved, dy):
  qkv, qkv_bias, bias, lse = saved
  sums = [qkv_bias.shape, *([] if bias is None else [bias.shape])]
  inputs = (qkv, qkv_bias, bias, dy, lse)
  dqkv, dqkv_bias, *dbias = _call(_backward, 'attention_backward', inputs, static, [(qkv.shape[1:], qkv.dtype)], sums)
  return dqkv, dqkv_bias, dbias[0] if dbias else None


fused.defvjp(_fused_forward, _fused_backward)
