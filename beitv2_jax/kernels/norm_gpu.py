"""The backward pass of layer norm as one fused kernel for NVIDIA GPUs (Pallas through Triton).

XLA reads x and dy three times: for dx, for the scale's gradient and for the bias's. This kernel reads them once, and adds the gradient
that comes past the norm (the residual branch) on the way.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from beitv2_jax.kernels.chip import triton as plgpu

ROWS, WARPS = 4, 4  # tokens at a time, and the warps that share them
TURNS = 16  # that a program goes through, summing over them


def _kernel(x_ref, mean_ref, inverse_ref, scale_ref, dy_ref, past_ref, dx_ref, dscale_ref, dbias_ref):
  count, width = x_ref.shape
  size = pl.next_power_of_2(width)
  there, col = (jnp.arange(size) < width)[None], pl.ds(0, size)
  first = pl.program_id(0) * TURNS
  scale = plgpu.load(scale_ref.at[col], mask=there[0], other=0.0)

  def body(i, sums):
    start = (first + i) * ROWS
    row, exists = pl.ds(start, ROWS), start + jnp.arange(ROWS) < count
    mask = exists[:, None] & there
    x, dy, past = (plgpu.load(ref.at[row, col], mask=mask, other=0.0).astype(jnp.float32) for ref in (x_ref, dy_ref, past_ref))
    mean, inverse = (plgpu.load(ref.at[row], mask=exists, other=0.0)[:, None] for ref in (mean_ref, inverse_ref))
    normal = jnp.where(mask, (x - mean) * inverse, 0)
    g = dy * scale[None]
    dx = inverse * (g - g.sum(1)[:, None] / width - normal * ((g * normal).sum(1)[:, None] / width)) + past
    plgpu.store(dx_ref.at[row, col], dx.astype(dx_ref.dtype), mask=mask)
    return sums[0] + (dy * normal).sum(0), sums[1] + dy.sum(0)

  dscale, dbias = jax.lax.fori_loop(0, TURNS, body, (jnp.zeros(size), jnp.zeros(size)))
  plgpu.store(dscale_ref.at[col], dscale, mask=there[0])
  plgpu.store(dbias_ref.at[col], dbias, mask=there[0])


def backward(x, mean, inverse, scale, dy, past, interpret: bool = False):
  """x, dy, past (the gradient that x gets besides) [..., D], mean, inverse [..., 1], scale [D] → dx [..., D], and fp32 [D] twice."""
  rows = lambda a: a.reshape(-1, x.shape[-1])
  count, width = rows(x).shape
  programs = pl.cdiv(count, ROWS * TURNS)
  whole = lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim)
  inputs = [rows(x), mean.reshape(-1), inverse.reshape(-1), scale, rows(dy), rows(past)]
  part = jax.ShapeDtypeStruct((programs, width), jnp.float32)
  own = pl.BlockSpec((None, width), lambda i: (i, 0))
  dx, dscale, dbias = pl.pallas_call(
    _kernel,
    name='layer_norm_backward',
    grid=(programs,),
    in_specs=[*map(whole, inputs)],
    out_specs=[whole(inputs[0]), own, own],
    out_shape=[jax.ShapeDtypeStruct((count, width), x.dtype), part, part],
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
    interpret=interpret,
  )(*inputs)
  return dx.reshape(x.shape), dscale.sum(0), dbias.sum(0)
