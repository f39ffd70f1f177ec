"""Self-attention between T tokens with a learned position bias: plain XLA here, fused kernels in attention_tpu.py and attention_gpu.py."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention_gpu, attention_tpu, chip


def attend(x: jax.Array, qkv: jax.Array, q_bias: jax.Array, v_bias: jax.Array, bias: jax.Array | None, how: str = 'auto') -> jax.Array:
  """Multi-head self-attention up to its output matrix: x [B, T, D] → [B, T, H*E].

  Args:
    qkv: [D, 3, H, E] of x's type. q_bias, v_bias: [H, E], fp32; keys have none.
    bias: [H, queries, keys], fp32, added to the scaled logits, or None.
    how: 'xla'; 'tpu' or 'gpu', the fused kernels (interpreted, which is slow, where there is no such chip); or 'auto': on the mesh of
      `jax.set_mesh`, its chip's kernel where that fits, images divide over the devices, and products are rounded to bf16 anyway.
  """
  mesh, heads, head_dim = jax.sharding.get_abstract_mesh(), *qkv.shape[2:]
  split = 1 if mesh.empty or heads % mesh.shape['model'] else mesh.shape['model']
  plan = attention_tpu.plan(x.shape[1], heads // split, head_dim, chip.kind(), x.dtype.itemsize)
  parts = 1 if mesh.empty else mesh.shape['data']
  divides = x.shape[0] % parts == 0
  fits = dict(tpu=divides and plan is not None, gpu=divides and attention_gpu.fits(head_dim), xla=True)
  if how == 'auto':
    rounded = dict(tpu=chip.rounded_products(), gpu=x.dtype == jnp.bfloat16)
    how = chip.platform() if rounded.get(chip.platform()) and fits[chip.platform()] and 'attention' not in chip.refused else 'xla'
  if not fits[how]:
    raise UserError(
      f'layers.attention={how} cannot take {x.shape[0]} images of {x.shape[1]} tokens in heads of {head_dim} on {parts} data devices; use auto or xla.'
    )
  if how == 'xla':
    return plain(x, qkv, q_bias, v_bias, bias)
  if how == 'tpu' and plan is not None:
    cores = (mesh.abstract_device.num_cores or 1) if chip.platform() == 'tpu' else 2
    local = functools.partial(attention_tpu.attend, plan=plan, on_tpu=chip.platform() == 'tpu', cores=cores)
  else:
    local = functools.partial(attention_gpu.attend, interpret=chip.platform() != 'gpu')
  if mesh.empty:
    return local(x, qkv, q_bias, v_bias, bias)
  m = 'model' if split > 1 else None
  specs = (P('data'), P(None, None, m), P(m), P(m), None if bias is None else P(m))
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P('data', None, m), check_vma=False)(x, qkv, q_bias, v_bias, bias)


def plain(x, qkv, q_bias, v_bias, bias):
  heads, head_dim = qkv.shape[2:]
  q, k, v = jnp.moveaxis(jnp.einsum('btd,dshe->btshe', x, qkv), 2, 0)
  weights = _weights(q + q_bias.astype(q.dtype), k, bias)
  return jnp.einsum('bhqk,bkhe->bqhe', weights, v + v_bias.astype(v.dtype)).reshape(*x.shape[:2], heads * head_dim)


def weights(x: jax.Array, qkv: jax.Array, q_bias: jax.Array, bias: jax.Array | None) -> jax.Array:
  """How much each token attends to each other, [B, H, T, T], rows of sum 1: for looking at. Arguments as for `attend`."""
  q, k = jnp.moveaxis(jnp.einsum('btd,dshe->btshe', x, qkv[:, :2]), 2, 0)
  return _weights(q + q_bias.astype(q.dtype), k, bias)


def _weights(q, k, bias):
  logits = jnp.einsum('bqhe,bkhe->bhqk', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
  return jax.nn.softmax(logits if bias is None else logits + bias).astype(q.dtype)


def check(head_dims: Iterable[int] = (64,)) -> None:
  """Holds the kernel of this process's chip, if it has one, to the plain version; 'auto' leaves it alone if it fails (chip.refused)."""
  how, tokens = jax.default_backend(), 197
  if how not in ('tpu', 'gpu'):
    return
  rng = np.random.default_rng(0)

  def both(way, *args):
    y, back = jax.vjp(lambda *a: way(*(a if len(a) == 5 else (*a, None))), *args)
    return y, *back(args[0])

  for head_dim in head_dims:
    heads = max(256 // head_dim, 2)
    width = heads * head_dim
    shapes = (2, tokens, width), (width, 3, heads, head_dim), (heads, head_dim), (heads, head_dim), (heads, tokens, tokens)
    args = [jnp.asarray(rng.normal(size=s, scale=width**-0.5 if len(s) == 4 else 1), jnp.float32) for s in shapes]
    args[:2] = (x.astype(jnp.bfloat16) for x in args[:2])
    ways = [functools.partial(attend, how=how)]
    if how == 'gpu' and not attention_gpu.fits(head_dim):
      continue
    if how == 'tpu':
      plan = attention_tpu.plan(tokens, heads, head_dim)
      if plan is None:
        continue
      in_parts = plan._replace(together=heads // 2, tile=128)  # what longer sequences take
      ways.append(functools.partial(attention_tpu.attend, plan=in_parts, on_tpu=True, cores=1))
    for way in ways:
      for some in (args, args[:4]):
        chip.check('attention', functools.partial(both, way), functools.partial(both, plain), *some)
