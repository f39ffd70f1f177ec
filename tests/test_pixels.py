"""From codes to pixels: the decoder, its figures, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beitv2_jax.configs import pixels_b16
from scipy import ndimage

import beitv2_jax
from beitv2_jax.downstream import imagine
from beitv2_jax.errors import UserError
from beitv2_jax.models.pixels import unpatchify
from beitv2_jax.tasks.scores import psnr, ssim
from beitv2_jax.training import loop, metrics
from tests.conftest import smoke, untrained


def pixels(workdir, tokenizer, **changes):
  config = pixels_b16.get_config('smoke').unlock()
  config.mesh.data, config.layers.scan, config.tokenizer_from, config.optim.lr = 1, True, str(tokenizer), 5e-3
  for key, value in changes.items():
    config[key] = value
  return loop.run(config.lock(), workdir)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('vqkd') / 'run'
  config = smoke('tokenizer').unlock()
  config.model.teacher_width = 8
  untrained(config.lock(), workdir)
  return workdir


@pytest.fixture(scope='module')
def trained(tokenizer, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pixels')
  pixels(workdir, tokenizer, steps=60, log_every=1)
  return workdir


def test_it_learns_and_draws_from_codes_alone(trained, tokenizer):
  rows = metrics.read(trained)
  assert rows[-1]['loss'] < 0.75 * rows[0]['loss']
  model = beitv2_jax.load(trained)
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  codes = model.tokens(images)
  np.testing.assert_array_equal(codes, beitv2_jax.load(tokenizer).tokens(images))
  drawn = np.asarray(model.pixels(codes))
  assert drawn.shape == (3, 32, 32, 3) and drawn.min() >= 0 and drawn.max() <= 1 and drawn.std() > 0
  np.testing.assert_allclose(model.pixels(codes[:1])[0], drawn[0], atol=1e-5)


def test_the_tokenizer_is_left_as_it_is(trained, tokenizer):
  model, theirs = beitv2_jax.load(trained), beitv2_jax.load(tokenizer)
  np.testing.assert_array_equal(model.variables['codebook']['embedding'], theirs.variables['codebook']['quantizer']['embedding'])
  assert set(model.variables['params']) == {'decoder', 'to_pixels', 'seams'}


def test_the_control_learns_less(trained, tokenizer, tmp_path):
  figures = pixels(tmp_path, tokenizer, steps=60, shuffled=True)
  assert figures['l1'] > metrics.read(trained, 'eval')[-1]['l1']


def test_bad_codes_and_another_tokenizer_are_refused(trained, tokenizer, tmp_path):
  model = beitv2_jax.load(trained)
  for codes, reason in (
    (np.zeros((1, 3, 4), int), r'expected whole numbers \[B, 4, 4\]'),
    (np.zeros((1, 4, 4)), 'expected whole numbers'),
    (np.full((1, 4, 4), 32), 'this decoder knows 0 to 31'),
  ):
    with pytest.raises(UserError, match=reason):
      model.pixels(codes)
  with pytest.raises(UserError, match='needs a pixels model'):
    beitv2_jax.load(tokenizer).pixels(np.zeros((1, 4, 4), int))
  config = smoke('tokenizer').unlock()
  config.model.teacher_width = 8
  untrained(config.lock(), tmp_path / 'other', seed=7)
  model.config.tokenizer_from = str(tmp_path / 'other')
  with pytest.raises(UserError, match='is not the one that this pixel decoder was trained with'):
    model.tokens(np.zeros((1, 32, 32, 3), np.uint8))
  with pytest.raises(UserError, match='pixels model; that needs a tokenizer or'):
    model.features(np.zeros((1, 32, 32, 3), np.uint8))


def test_patches_go_where_they_came_from():
  image = jnp.asarray(np.random.default_rng(0).random((2, 6, 9, 3)))
  patches = image.reshape(2, 2, 3, 3, 3, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 27)
  np.testing.assert_array_equal(unpatchify(patches, (2, 3), 3), image)


def test_psnr_and_ssim():
  rng = np.random.default_rng(0)
  a, b = rng.random((2, 40, 30, 3)), rng.random((2, 40, 30, 3))
  b[1] = np.clip(a[1] + 0.05 * rng.normal(size=a[1].shape), 0, 1)
  np.testing.assert_allclose(psnr(jnp.asarray(a), jnp.asarray(b)), -10 * np.log10(((a - b) ** 2).mean((1, 2, 3))), rtol=1e-5)
  expected = []
  for x, y in zip(a, b):  # the definition, with scipy's Gaussian, cut to where the window of 11 x 11 fits
    scores = []
    for c in range(3):
      blur = lambda z: ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]
      u, v = blur(x[..., c]), blur(y[..., c])
      uu, vv, uv = blur(x[..., c] ** 2) - u * u, blur(y[..., c] ** 2) - v * v, blur(x[..., c] * y[..., c]) - u * v
      scores.append(((2 * u * v + 1e-4) * (2 * uv + 9e-4) / ((u * u + v * v + 1e-4) * (uu + vv + 9e-4))).mean())
    expected.append(np.mean(scores))
  np.testing.assert_allclose(jax.jit(ssim)(jnp.asarray(a), jnp.asarray(b)), expected, atol=1e-4)
  np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(a)), 1, atol=1e-4)
  np.testing.assert_allclose(ssim(jnp.asarray(a[:, :4, :6]), jnp.asarray(a[:, :4, :6])), 1, atol=1e-4)  # smaller than the window


@pytest.fixture(scope='module')
def pretrained(tokenizer, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('pretrained') / 'run'
  config = smoke('pretrain', tokenizer_from=str(tokenizer)).unlock()
  config.model.vocab = 32
  untrained(config.lock(), workdir)
  return beitv2_jax.load(workdir)


def test_what_is_imagined_is_drawn_step_by_step_and_only_behind_the_mask(trained, pretrained):
  drawing = beitv2_jax.load(trained)
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  masks = np.zeros((2, 4, 4), bool)
  masks[0, :2], masks[1, 1:, 2] = True, True
  steps = imagine.behind_mask(pretrained, drawing, images, masks, steps=3)
  known = [(codes >= 0).sum((1, 2)).tolist() for codes, _ in steps]
  assert known == [[3, 1], [6, 2], [8, 3]]
  codes, last = steps[-1]
  assert ((codes >= 0) == masks).all()
  outside = ~masks.repeat(8, 1).repeat(8, 2)
  np.testing.assert_array_equal(last[outside], images[outside])
  (at_once, _), *_ = imagine.behind_mask(pretrained, drawing, images, masks)
  expected = np.asarray(pretrained.masked_logits(images, masks)[-1]).argmax(-1).reshape(2, 4, 4)
  np.testing.assert_array_equal(at_once[masks], expected[masks])
  changed = images.copy()
  changed[~outside] = 7  # what is hidden must not matter
  np.testing.assert_array_equal(imagine.behind_mask(pretrained, drawing, changed, masks, steps=3)[-1][1], last)


def test_faces_and_mean_patches(trained):
  drawing = beitv2_jax.load(trained)
  codes = np.random.default_rng(0).integers(0, 31, (3, 4, 4))
  codes[1, 2, 3] = 31
  faces, counts = imagine.faces(drawing, codes)
  assert faces.shape == (32, 8, 8, 3) and counts.sum() == 48 and counts[31] == 1
  np.testing.assert_allclose(faces[31], np.asarray(drawing.pixels(codes))[1, 16:24, 24:32], atol=0.003)
  images = np.zeros((2, 16, 16, 3), np.uint8)
  images[0, :8, :8], images[1, 8:, 8:] = 255, 51
  few = np.array([[[3, 0], [0, 0]], [[0, 0], [0, 3]]])
  means, counts = imagine.mean_patches(images, few, 4)
  assert counts.tolist() == [6, 0, 0, 2] and np.isnan(means[1]).all()
  np.testing.assert_allclose(means[3], 0.6, atol=1e-6)
  np.testing.assert_allclose(means[0], 0)
