"""The fused attention kernels, interpreted on the CPU, against the plain version."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention, attention_tpu, chip
from beitv2_jax.training import sharding


def inputs(batch, tokens, heads, head_dim, with_bias, width=32):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  bias = normal(heads, tokens, tokens) if with_bias else None
  return (normal(batch, tokens, width), normal(width, 3, heads, head_dim) / 4, normal(heads, head_dim), normal(heads, head_dim), bias)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(how, args, dy):
  y, back = jax.vjp(lambda *a: attention.attend(*a, how), *args)
  return y, *back(dy)


def assert_close(ours, theirs, tolerance):
  """Within `tolerance` of the largest value."""
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


SIZES = [(2, 17, 2, 64, True), (3, 13, 2, 64, False), (1, 10, 4, 32, True), (2, 9, 1, 128, True)]


@pytest.mark.parametrize('how, batch, tokens, heads, head_dim, with_bias', [('tpu', *size) for size in SIZES] + [
  ('gpu', *size) for size in [*SIZES, (9, 70, 2, 16, True)]
])  # fmt: skip
def test_kernel_is_plain_attention(how, batch, tokens, heads, head_dim, with_bias):
  args = inputs(batch, tokens, heads, head_dim, with_bias)
  dy = jnp.asarray(np.random.default_rng(1).normal(size=(batch, tokens, heads * head_dim)), jnp.float32)
  assert_close(both_ways(how, args, dy), both_ways('xla', args, dy), 1e-5)


@pytest.mark.parametrize('how', ['tpu', 'gpu'])
def test_kernel_in_bf16(how):
  """bf16 products round by 0.4 %; the plain version in bf16 is as far from fp32 as that."""
  args, dy = inputs(2, 17, 2, 64, True), jnp.asarray(np.random.default_rng(1).normal(size=(2, 17, 128)), jnp.float32)
  low = [x.astype(jnp.bfloat16) for x in args[:4]]
  assert_close(both_ways(how, (*low, args[4]), dy.astype(jnp.bfloat16)), both_ways('xla', args, dy), 0.03)


@pytest.mark.parametrize('how, data, model', [('tpu', 4, 1), ('tpu', 2, 2), ('gpu', 4, 1), ('gpu', 2, 2)])
def test_kernel_under_a_mesh(how, data, model):
  """Images over `data`, heads over `model`: the same values and gradients as on one device."""
  args = inputs(8, 11, 4, 64, True)
  dy = jnp.asarray(np.random.default_rng(1).normal(size=(8, 11, 256)), jnp.float32)
  alone = both_ways('xla', args, dy)
  with jax.set_mesh(sharding.make_mesh(data, model, jax.devices()[: data * model])):
    split = both_ways(how, args, dy)
  assert_close(split, alone, 1e-5)


@pytest.mark.parametrize('model', [1, 2])
@pytest.mark.parametrize('with_bias', [True, False])
def test_kernel_in_programs_and_tiles(model, with_bias, monkeypatch):
  """Too many tokens for all heads at once: each program takes two of eight, and three tiles of queries one after the other."""
  monkeypatch.setattr(attention_tpu, 'ENOUGH', 10 * 2**20)
  monkeypatch.setattr(attention_tpu, 'TILE', 128 * 300)
  assert attention_tpu.plan(300, 8 // model, 64, itemsize=4)[1:3] == (2, 128)
  args = inputs(4, 300, 8, 64, with_bias)
  dy = jnp.asarray(np.random.default_rng(1).normal(size=(4, 300, 512)), jnp.float32)
  alone = both_ways('xla', args, dy)
  with jax.set_mesh(sharding.make_mesh(2, model, jax.devices()[: 2 * model])):
    assert_close(both_ways('tpu', args, dy), alone, 1e-5)


def test_what_fits_the_fast_memory():
  together = lambda *args: (p := attention_tpu.plan(*args)) and p.together
  assert together(197, 12, 64) == 12 and together(197, 16, 64) == 16
  assert together(197, 12, 64, 'TPU v4') == 12 and together(197, 16, 64, 'TPU v4') == 8
  assert together(257, 12, 64) == 12 and together(577, 16, 64) == 4 and together(577, 16, 64, 'TPU v4') is None
  assert together(1025, 16, 64) is None and together(1025, 16, 64, 'TPU v5 lite') == 2
  assert together(17, 2, 16) is None and together(17, 3, 64) is None


def test_what_the_kernel_cannot_take():
  args = inputs(1, 5, 2, 16, False)
  with pytest.raises(UserError, match='heads of 16'):
    attention.attend(*args, 'tpu')
  assert attention.attend(*args, 'auto').shape == (1, 5, 32)


def test_a_kernel_that_is_wrong_is_left_alone(monkeypatch):
  monkeypatch.setattr(chip, 'refused', {})
  x = jnp.linspace(-1, 1, 8)
  plain = lambda x: (x, 2 * x)
  chip.check('good', lambda x: (x, 2.01 * x), plain, x)
  chip.check('off', lambda x: (x, 2.1 * x), plain, x)
  chip.check('NaN', lambda x: (x, x * jnp.nan), plain, x)
  chip.check('broken', lambda x: (x, x @ jnp.ones(3)), plain, x)
  assert chip.refused.keys() == {'off', 'NaN', 'broken'} and '5.0%' in chip.refused['off']
