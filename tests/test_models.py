"""Sizes, initial distributions and the mathematics of the layers, against the published description and hand-made numbers."""

import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beitv2_jax.kernels import attention, functions, norm_gpu
from beitv2_jax.models import layers, vit
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.images import normalize, unit_images
from beitv2_jax.models.layers import Execution, cut_pixels
from beitv2_jax.models.mim import MIM, code_loss, mask_from_index
from beitv2_jax.models.upernet import Segmenter, convolve, resample
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.training import sharding


def init(module, images):
  return nn.unbox(jax.jit(module.init)(jax.random.key(0), images))


def count(module):
  h, w = (16 * g for g in module.grid)
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, h, w, 3))))
  return sum(x.size for x in jax.tree.leaves(variables['params']))


# Counted in the official code's models.
@pytest.mark.parametrize(
  'module, parameters',
  [
    (MIM(768, 12, 12, 16, (14, 14), 8192), 106_143_056),
    (MIM(768, 12, 12, 16, (14, 14), 8192, head_layers=0), 91_965_776),
    (MIM(1024, 24, 16, 16, (14, 14), 8192, early_layer=21), 336_728_512),
    (MIM(1024, 24, 16, 16, (14, 14), 8192, head_layers=0), 311_534_016),
    (VQKD((14, 14), 16, 8192, 32, 512), 108_829_216),
    (VQKD((14, 14), 16, 8192, 32, 512, decoder_depth=1), 94_655_008),
    (VQKD((14, 14), 16, 8192, 32, 768, decoder_depth=1), 94_851_872),
    (Classifier(768, 12, 12, 16, (14, 14), 1000), 86_530_984),
    (Classifier(768, 12, 12, 16, (14, 14), 21841), 102_557_713),
    (Classifier(768, 12, 12, 16, (24, 24), 1000), 86_744_104),
    (Classifier(1024, 24, 16, 16, (14, 14), 1000), 304_430_568),
    (Classifier(1024, 24, 16, 16, (14, 14), 21841), 325_792_593),
    (Segmenter(768, 12, 12, 16, (32, 32), 150), 163_080_812),
    (Segmenter(1024, 24, 16, 16, (32, 32), 150, (7, 11, 15, 23), channels=1024), 440_398_636),
  ],
)
def test_parameter_counts(module, parameters):
  assert count(module) == parameters


def test_relative_position_index():
  two = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
  np.testing.assert_array_equal(layers.relative_position_index((2, 2)), two)
  wide = layers.relative_position_index((2, 3))
  np.testing.assert_array_equal(wide[0], [17] + [15] * 6)
  np.testing.assert_array_equal(wide[5], [16, 13, 12, 11, 8, 7, 6])
  full = layers.relative_position_index((14, 14))
  assert (full[0, 0], full[0, 1], full[1, 0], full[1, 15], full[15, 1], full[1, 196], full[196, 1]) == (731, 729, 730, 337, 391, 0, 728)
  assert full.sum() == 14_270_119 and len(np.unique(full)) == 732


def test_pretraining_init():
  width = 256
  module = MIM(width, 3, 4, 16, (4, 4), 512, early_layer=2)
  p = init(module, jnp.zeros((1, 64, 64, 3)))['params']
  block = p['backbone']['block_1']
  for w in (block['attn']['qkv'], block['fc1']['kernel'], p['lm_head']['kernel'], p['backbone']['patch_embed']['kernel']):
    assert abs(float(w.std()) - 0.010791) < 2e-4 and float(jnp.abs(w).max()) <= 0.02  # N(0, 0.02²) cut at one sigma
  for w in (block['attn']['proj'], block['fc2']['kernel']):
    assert abs(float(w.std()) - 0.010791 / 2) < 2e-4  # block of index 1: 1/sqrt(4)
  agg = p['aggregation_1']  # torch's default, uniform with non-zero biases
  bound = width**-0.5
  assert abs(float(agg['attn']['qkv'].std()) - bound / 3**0.5) < 1e-3 and float(jnp.abs(agg['attn']['qkv']).max()) <= bound
  assert bound / 2 < float(jnp.abs(agg['fc1']['bias']).max()) <= bound
  np.testing.assert_allclose(float(jnp.abs(agg['attn']['proj']).max()), bound / (2 * 4) ** 0.5, rtol=0.01)
  np.testing.assert_allclose(float(jnp.abs(agg['fc2']['bias']).max()), (4 * width) ** -0.5, rtol=0.05)
  for name in ('q_bias', 'v_bias'):
    assert not block['attn'][name].any() and not agg['attn'][name].any()
  assert not p['backbone']['rel_pos_bias']['table'].any()
  assert (block['gamma1'] == 0.1).all() and (block['norm1']['scale'] == 1).all()


def test_tokenizer_init():
  p = init(VQKD((4, 4), 16, 16, 8, 32, 128, 2, 4, 128, 1, 4), jnp.zeros((1, 64, 64, 3)))['params']
  block = p['encoder']['vit']['block_0']
  assert abs(float(block['fc1']['kernel'].std()) - 0.02) < 5e-4 and float(block['fc1']['kernel'].max()) > 0.05  # not cut
  patch = p['encoder']['vit']['patch_embed']['kernel']
  assert abs(float(patch.std()) - 768**-0.5 / 3**0.5) < 1e-3  # torch's default for convolutions
  assert 'gamma1' not in block


def test_mask_token_hides_the_patch():
  module = MIM(32, 2, 2, 8, (4, 4), 16, early_layer=1)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 32, 32, 3)), jnp.float32)
  variables = init(module, images)
  apply = jax.jit(module.apply)
  index = jnp.array([[0, 5], [3, 15]])
  seen = apply(variables, images, index=index)
  changed = images.at[0, :8, :8].add(3.0)  # patch 0 of image 0 is masked
  for a, b in zip(seen, apply(variables, changed, index=index)):
    np.testing.assert_allclose(a, b, atol=1e-6)
  changed = images.at[0, 8:16, :8].add(3.0)  # patch 4 is not
  assert float(jnp.abs(seen[0] - apply(variables, changed, index=index)[0]).max()) > 1e-5
  mask = mask_from_index(index, 16)
  assert mask.sum() == 4 and mask[1, 15] and not mask[1, 5]
  everywhere = apply(variables, images, mask)
  for a, b in zip(seen, everywhere):
    np.testing.assert_allclose(a, np.take_along_axis(np.asarray(b), np.asarray(index)[..., None], 1), atol=1e-5)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
  x = jnp.ones((4000, 2, 3))
  y = layers.drop_path(x, 0.25, jax.random.key(0))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert (y == y[:, :1, :1]).all() and abs(float(y.mean()) - 1) < 0.05
  assert vit.drop_path_rates(0.1, 12)[1] == pytest.approx(0.1 / 11)


def test_position_embedding_resize_is_bicubic():
  np.testing.assert_allclose(vit.cubic_weights(4, 1, 0.25)[0], [-0.09375, 0.59375, 0.59375, -0.09375])  # a = -0.75, half way
  np.testing.assert_allclose(vit.cubic_weights(5, 9, 9.1 / 5).sum(1), 1, rtol=1e-6)
  table = jnp.asarray(np.arange(17.0)[None, :, None], jnp.float32)
  out = vit.resize_pos_embed(table, (4, 4), (6, 5))
  assert out.shape == (1, 31, 1) and out[0, 0, 0] == 0
  assert vit.resize_pos_embed(table, (4, 4), (4, 4)) is table


def test_scanned_layers_drop_the_same_paths():
  images, mask = jax.random.normal(jax.random.key(0), (4, 32, 32, 3)), jnp.zeros((4, 16), bool)
  build = lambda execution: MIM(16, 4, 2, 8, (4, 4), 24, early_layer=3, layer_scale=1.0, drop_path=0.5, execution=execution)
  variables = init(build(Execution()), images)

  def apply(execution, **kwargs):
    return jax.jit(lambda v: build(execution).apply(v, images, mask, **kwargs))(variables)

  train = dict(train=True, rngs={'drop_path': jax.random.key(2)})
  plain = apply(Execution(), **train)
  for remat in ('none', 'dots', 'full'):
    for a, b in zip(plain, apply(Execution(scan=True, remat=remat), **train)):
      np.testing.assert_allclose(a, b, atol=1e-5, err_msg=remat)
  assert np.abs(plain[0] - apply(Execution(scan=True))[0]).max() > 1e-6  # something was dropped


def values_and_gradients(f, *args):
  """(f's value, gradients of a weighted sum of it)."""

  @jax.jit
  def both(*args):
    y, back = jax.vjp(f, *args)
    w = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *back(w.astype(y.dtype))

  return [np.asarray(x, np.float32) for x in both(*args)]


def close(ours, theirs, tolerance):
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-6))


def some(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def test_gelu():
  x = jnp.linspace(-6, 6, 4001)
  close(values_and_gradients(functions.gelu, x), values_and_gradients(lambda x: jax.nn.gelu(x, approximate=False), x), 1e-6)
  far = jnp.array([-1e4, -40, -7, 7, 40, 1e4])
  phi = functions._normal_cdf(jnp.r_[x, far], jnp.bfloat16)  # its own error, seen before rounding
  np.testing.assert_allclose(phi, jax.scipy.stats.norm.cdf(jnp.r_[x, far]), atol=2e-5)
  np.testing.assert_allclose(phi[-6:], [0, 0, 0, 1, 1, 1], atol=1e-6)  # nothing is left in the tails
  low = x.astype(jnp.bfloat16)
  exact = low.astype(jnp.float32)
  y, (slope,) = functions.gelu(low), functions._gelu_backward(low, jnp.ones_like(low))
  assert y.dtype == slope.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), jax.nn.gelu(exact, approximate=False), rtol=2**-8, atol=1e-4)
  theirs = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(exact)
  np.testing.assert_allclose(slope.astype(jnp.float32), theirs, rtol=2**-8, atol=5e-5)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 0.05)])
def test_layer_norm_is_flaxs(dtype, tolerance):
  x, scale, bias = 3 * some(4, 7, 24, dtype=dtype) + 2, 1 + 0.1 * some(24, seed=1), some(24, seed=2)
  flax = nn.LayerNorm(1e-6, use_fast_variance=False)

  def theirs(x, scale, bias):
    return flax.apply({'params': dict(scale=scale, bias=bias)}, x.astype(jnp.float32))

  ours = values_and_gradients(lambda *a: functions.normalize_layer(*a, dtype)[1], x, scale, bias)
  close(ours, values_and_gradients(theirs, x, scale, bias), tolerance)


def test_layer_norm_kernel_for_gpus(monkeypatch):
  """Interpreted, images split over four devices: the gradients of the plain version, with what comes past the norm added."""
  x, scale, bias = 3 * some(8, 21, 24) + 2, 1 + 0.1 * some(24, seed=1), some(24, seed=2)
  x = x.astype(jnp.bfloat16)  # with which the kernel is used
  later = some(8, 21, 24, seed=3)

  def loss(x, scale, bias):
    x, y = functions.normalize_layer(x, scale, bias, jnp.bfloat16)
    return (jnp.tanh(x.astype(jnp.float32)) * later).sum() + (y.astype(jnp.float32) ** 2 * later).sum()

  plain = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)
  calls = []

  def interpreted(*args):
    calls.append(args[0].shape)
    return norm_gpu.backward(*args, interpret=True)

  kernel = types.SimpleNamespace(backward=interpreted)
  monkeypatch.setattr(functions, 'norm_gpu', kernel)
  monkeypatch.setattr(functions.chip, 'platform', lambda: 'gpu')
  with jax.set_mesh(sharding.make_mesh(4, 1, jax.devices()[:4])):
    close(jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias), plain, 0.01)
  assert calls == [(2, 21, 24)]


def test_gelu_where_erf_is_cheap(monkeypatch):
  """In bf16 too it is exact up to bf16's own rounding, values and slopes."""
  x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
  y, slope = values_and_gradients(lambda x: jax.nn.gelu(x, approximate=False), x.astype(jnp.float32))
  monkeypatch.setattr(functions.chip, 'erf_is_cheap', lambda: True)
  monkeypatch.setattr(functions.jnp, 'tanh', lambda *_: pytest.fail('tanh was taken'))
  ours, our_slope = values_and_gradients(functions.gelu, x)
  for a, b in ((ours, y), (our_slope, slope)):
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2e-6)  # 1 + erf in fp32, as torch has it, in the far tail


def test_chips_whose_erf_is_cheap(monkeypatch):
  for kind, cheap in {'TPU v4': False, 'TPU v5 lite': False, 'TPU v5': False, 'TPU v6 lite': True, 'TPU7x': False, '': False}.items():
    monkeypatch.setattr(functions.chip, 'kind', lambda kind=kind: kind)
    assert functions.chip.erf_is_cheap() == cheap, kind


@pytest.mark.parametrize('kind', ['', 'TPU v5 lite', 'TPU v6 lite'])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_products_and_biases_with_gradients_of_their_own(dtype, tolerance, kind, monkeypatch):
  monkeypatch.setattr(functions.chip, 'kind', lambda: kind)
  x, kernel, bias = some(2, 9, 16, dtype=dtype), some(16, 12, seed=1, dtype=dtype), some(12, seed=2)
  wide = lambda f: lambda *a: f(*(v.astype(jnp.float32) for v in a))
  plain = wide(lambda x, kernel: jax.nn.gelu(x, approximate=False) @ kernel)
  close(values_and_gradients(functions.gelu_product, x, kernel), values_and_gradients(plain, x, kernel), tolerance)
  y = some(2, 9, 12, seed=3, dtype=dtype)
  for by_product in (False, True):
    ours = values_and_gradients(lambda y, b, p=by_product: functions.add_bias(y, b, p), y, bias)
    close(ours, values_and_gradients(wide(lambda y, b: y + b), y, bias), tolerance)
  positions = some(9, 12, seed=4)
  close(
    values_and_gradients(functions.add_positions, y, positions), values_and_gradients(wide(lambda y, p: y + p), y, positions), tolerance
  )


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
def test_code_loss_is_cross_entropy(dtype, tolerance):
  products, bias = 2 * some(2, 3, 5, 11, dtype=dtype), some(11, seed=1)
  labels = jax.random.randint(jax.random.key(4), (2, 3, 5), 0, 11)
  plain = lambda p, b: optax.softmax_cross_entropy_with_integer_labels(p.astype(jnp.float32) + b, labels)
  ours = values_and_gradients(lambda p, b: code_loss(p, b, labels)[0], products, bias)
  close(ours, values_and_gradients(plain, products, bias), tolerance)
  hits = code_loss(products, bias, labels)[1]
  np.testing.assert_array_equal(hits, (products.astype(jnp.float32) + bias).argmax(-1) == labels)
  tied = jnp.zeros((1, 4)), jnp.zeros(4)
  assert [float(code_loss(*tied, jnp.array([i]))[1][0]) for i in range(4)] == [1, 0, 0, 0]  # the first of equals


@pytest.mark.parametrize('grid', [(3, 3), (2, 5), (14, 14)])
def test_spreading_a_bias_table_is_indexing_it(grid):
  table = some(layers.table_size(grid), 2)
  index = layers.relative_position_index(grid)
  ours = values_and_gradients(lambda t: layers.spread_table(t, grid), table)
  close(ours, values_and_gradients(lambda t: t[index].transpose(2, 0, 1), table), 1e-5)
  np.testing.assert_array_equal(ours[0], np.asarray(table)[index].transpose(2, 0, 1))


def test_a_jax_without_triton(monkeypatch):
  """Everything imports, and training says that plain XLA takes over."""
  program = "import sys; sys.modules['jax.experimental.pallas.triton'] = None; from beitv2_jax.kernels import attention, chip; assert chip.triton is None"
  subprocess.run([sys.executable, '-c', program], check=True)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(functions.chip, 'triton', None)
  monkeypatch.setattr(functions.chip, 'refused', {})
  attention.check()
  assert 'no Triton for Pallas any more; plain XLA' in functions.chip.refused['attention']


@pytest.mark.parametrize('scan, remat, head_layers', [(False, 'none', 2), (True, 'none', 2), (True, 'dots', 0), (False, 'full', 0)])
def test_tokens_that_no_loss_is_about_are_left_out_of_the_last_block(scan, remat, head_layers):
  model = MIM(32, 3, 2, 8, (3, 4), 16, 4.0, 0.1, 0.5, early_layer=2, head_layers=head_layers, execution=Execution(scan, remat))
  images = jax.random.normal(jax.random.key(1), (3, 24, 32, 3))
  index = jnp.array([[1, 4, 11], [0, 2, 3], [5, 6, 9]])
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, index=index, labels=index))  # with these, too
  params = init(model, images)['params']
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(shapes)['params'])
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)

  def logits(params, everything):
    if not everything:
      return model.apply({'params': params}, images, index=index, train=True, rngs={'drop_path': jax.random.key(2)})
    y = model.apply({'params': params}, images, mask_from_index(index, 12), train=True, rngs={'drop_path': jax.random.key(2)})
    return jnp.take_along_axis(y, index[None, :, :, None], 2)

  (y, gradient), (expected, expected_gradient) = (
    jax.jit(jax.value_and_grad(lambda p, e=e: jnp.sin(logits(p, e)).sum()))(params) for e in (False, True)
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected_gradient)


def test_codes_of_some_patches():
  model = VQKD((3, 4), 8, 16, 4, 8, 32, 3, 2, 32, 1, 2)
  images, index = jax.random.normal(jax.random.key(1), (2, 24, 32, 3)), jnp.array([[1, 4, 11], [0, 2, 3]])
  variables = init(model, images)
  variables |= dict(params=jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), variables['params']))
  codes = model.apply(variables, images, method='tokens')
  np.testing.assert_array_equal(model.apply(variables, images, index, method='tokens'), jnp.take_along_axis(codes, index, 1))
  assert len(np.unique(codes)) > 2


@pytest.mark.parametrize('grid, mean', [((3, 4), (0.5, 0.4, 0.3)), ((6, 6), (0.1, 0.2, 0.3, 0.4))])
def test_patches_cut_beforehand_are_what_images_are(grid, mean):
  shape = (2, 8 * grid[0], 8 * grid[1], len(mean))
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)
  model = vit.ViT(16, 1, 2, 8, (3, 4))  # the second of the two grids is not its own
  variables = nn.unbox(model.init_with_output(jax.random.key(1), jnp.zeros((2, 24, 32, len(mean))))[1])
  seen = lambda x: normalize(unit_images(x), mean, (0.2,) * len(mean))
  cut = cut_pixels(images, 8)
  assert cut.shape == (2, *grid, 8 * 8 * len(mean)) and cut.dtype == jnp.uint8
  loss = lambda variables, x: jnp.sin(model.apply(variables, x)[0]).sum()
  ours, theirs = (jax.jit(jax.value_and_grad(loss))(variables, seen(x)) for x in (cut, images))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def convolve_as_published(x, kernel, *more):
  x = jnp.concatenate([x, *(resample(m, x.shape[1:3]) for m in more)], -1)
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@pytest.mark.parametrize('sizes', [[(8, 8), (4, 4), (2, 2)], [(7, 5), (1, 1), (3, 4)]])
def test_convolving_smaller_maps_is_convolving_them_resampled(sizes):
  rng = np.random.default_rng(0)
  maps = [jnp.asarray(rng.normal(size=(2, *size, channels)), jnp.float32) for size, channels in zip(sizes, (3, 4, 5))]
  kernel = jnp.asarray(rng.normal(size=(3, 3, 12, 6)), jnp.float32)

  x, *more = maps
  expected, back = jax.vjp(convolve_as_published, x, kernel, *more)
  y, our_back = jax.vjp(convolve, x, kernel, *more)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  for ours, gradient in zip(our_back(jnp.sin(y)), back(jnp.sin(y)), strict=True):
    np.testing.assert_allclose(ours, gradient, atol=1e-4)


def test_convolving_smaller_maps_rounds_no_worse_in_bf16():
  rng = np.random.default_rng(0)
  maps = [jnp.asarray(rng.normal(size=(1, n, n, 64)), jnp.float32) for n in (16, 8, 4)]
  kernel = jnp.asarray(rng.normal(size=(3, 3, 192, 32)), jnp.float32)
  expected, half = convolve(maps[0], kernel, *maps[1:]), lambda x: x.astype(jnp.bfloat16)
  published, ours = (f(half(maps[0]), half(kernel), *map(half, maps[1:])) for f in (convolve_as_published, convolve))
  off = lambda y: float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - expected) ** 2) / jnp.mean(expected**2)))
  assert off(ours) < 1.5 * off(published) < 0.01
