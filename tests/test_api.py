"""What `beitv2_jax.load` opens and refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

import beitv2_jax
from beitv2_jax.downstream import trained
from beitv2_jax.errors import UserError
from tests.conftest import smoke, untrained


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp('api')
  for task, changes in dict(tokenizer=dict(model__teacher_width=24), pretrain=dict(model__vocab=32)).items():
    untrained(smoke(task, **changes), root / task)
  return beitv2_jax.load(root / 'tokenizer'), beitv2_jax.load(root / 'pretrain')


def images(n=3):
  return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_tokenizer(models):
  model, _ = models
  assert model.kind == 'tokenizer' and model.config.model.codes == 32
  codes = model.tokens(images())
  assert codes.shape == (3, 4, 4) and codes.dtype == jnp.int32 and 0 <= codes.min() and codes.max() < 32
  floats = images().astype(np.float32) / 255
  np.testing.assert_array_equal(model.tokens(floats), codes)
  np.testing.assert_array_equal(model.tokens(floats * 255 / 127.5 - 1, normalize=False), codes)
  assert model.reconstruct(images()).shape == (3, 16, model.config.model.teacher_width)
  assert model.features(images())['patches'].shape == (3, 16, 32)


def test_pretrained(models):
  _, model = models
  out = model.features(images(), layers=True)
  assert out['cls'].shape == (3, 32) and out['patches'].shape == (3, 16, 32) and len(out['layers']) == 3
  np.testing.assert_allclose(out['layers'][-1]['patches'], out['patches'], atol=1e-6)
  mask = np.arange(16) < 6
  logits = model.masked_logits(images(), np.tile(mask, (3, 1)))
  assert [x.shape for x in logits] == [(3, 16, 32)] * 2
  same = images()
  same[:, :8, :8] = 0  # under the mask
  for a, b in zip(logits, model.masked_logits(same, np.tile(mask, (3, 1)))):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_in_batches_pads_and_joins():
  x = np.arange(10)[:, None]
  seen = []
  out = trained.in_batches(lambda a, b: seen.append(len(a)) or {'sum': a + b}, x, x, batch=4)
  np.testing.assert_array_equal(out['sum'], 2 * x)
  assert seen == [4, 4, 4]


def test_refusals(models, tmp_path):
  tokenizer, pretrained = models
  with pytest.raises(UserError, match='channels last'):
    tokenizer.tokens(images().transpose(0, 3, 1, 2))
  with pytest.raises(UserError, match='takes 32x32'):
    tokenizer.tokens(np.zeros((1, 40, 40, 3), np.uint8))
  with pytest.raises(UserError, match=r'lie in \[0, 1\]'):
    tokenizer.tokens(images().astype(np.float32))
  with pytest.raises(UserError, match='use uint8'):
    tokenizer.tokens(images().astype(np.int32))
  with pytest.raises(UserError, match='needs a tokenizer model'):
    pretrained.tokens(images())
  with pytest.raises(UserError, match=r'mask has shape \(3, 9\)'):
    pretrained.masked_logits(images(), np.zeros((3, 9), bool))
  with pytest.raises(UserError, match='use bool, True where'):
    pretrained.masked_logits(images(), np.zeros((3, 16), np.int64))
  with pytest.raises(UserError, match=r'lie in \[0, 1\]'):
    tokenizer.tokens(np.full((1, 32, 32, 3), np.nan, np.float32))
  with pytest.raises(UserError, match='takes floats that are normalised'):
    tokenizer.tokens(images(), normalize=False)
  for nothing in (None, 'image.jpg', [[1], [2, 3]], np.zeros((0, 32, 32, 3), np.uint8)):
    with pytest.raises(UserError):
      tokenizer.tokens(nothing)
  with pytest.raises(UserError, match='no config.json'):
    beitv2_jax.load(tmp_path)
