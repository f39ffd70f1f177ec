"""Teachers come through transformers' save_pretrained, as real ones do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.errors import UserError
from beitv2_jax.kernels import chip
from beitv2_jax.models import images as images_lib
from beitv2_jax.models import teacher
from beitv2_jax.models.vit import resize_pos_embed


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  model = teacher.new_clip(width=32, depth=2, heads=2, patch_size=8, image_size=32, projection=24, vocab=8, text_length=4)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: teacher.fresh_clip_params(model, jax.random.key(0)))
  params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape) + (x.ndim == 1), jnp.float32), shapes)
  model.save_pretrained(folder, params=params)
  return folder, model, params


def images(size=32):
  return jnp.asarray(np.random.default_rng(0).uniform(size=(2, size, size, 3)), jnp.float32)


def test_dense_clip_target(clip):
  """Post layer norm and projection on every patch token; on [CLS] the same two give CLIP's own image embedding."""
  folder, model, params = clip
  ours, weights = teacher.load('clip', str(folder), (4, 4))
  target = jax.jit(ours.apply)(weights, images())
  assert target.shape == (2, 16, 24) and ours.width == 24
  x = images_lib.normalize(images(), images_lib.CLIP_MEAN, images_lib.CLIP_STD)
  out = jax.jit(model.module.apply)(
    {'params': params}, jnp.zeros((2, 4), jnp.int32), x, jnp.ones((2, 4), jnp.int32), jnp.tile(jnp.arange(4), (2, 1))
  )
  hidden = np.asarray(out.vision_model_output.last_hidden_state)
  norm = params['vision_model']['post_layernorm']
  unit = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
  dense = (unit * np.asarray(norm['scale']) + np.asarray(norm['bias'])) @ np.asarray(params['visual_projection']['kernel'])
  np.testing.assert_allclose(target, dense[:, 1:], atol=2e-5)
  np.testing.assert_allclose(out.image_embeds, dense[:, 0] / np.linalg.norm(dense[:, 0], axis=-1, keepdims=True), atol=2e-5)


@pytest.mark.parametrize('grid', [(6, 6), (3, 5)])
def test_input_and_positions_follow_the_students_grid(clip, grid):
  folder, model, params = clip
  ours, weights = teacher.load('clip', str(folder), grid)
  x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8 * grid[0], 8 * grid[1], 3)), jnp.float32)
  target = jax.jit(ours.apply)(weights, x)
  assert target.shape == (2, grid[0] * grid[1], 24)
  assert jax.jit(ours.apply)(weights, images(64)).shape == target.shape  # resized first
  # A teacher that was trained on this very grid, with the positions that ours were resized to.
  table = params['vision_model']['embeddings']['position_embedding']['embedding']
  resized = resize_pos_embed(table[None], (4, 4), grid)[0]
  if grid[0] == grid[1]:
    native = teacher.new_clip(width=32, depth=2, heads=2, patch_size=8, image_size=48, projection=24, vocab=8, text_length=4)
    vision = params['vision_model'] | {'embeddings': params['vision_model']['embeddings'] | {'position_embedding': {'embedding': resized}}}
    x = images_lib.normalize(x, images_lib.CLIP_MEAN, images_lib.CLIP_STD)
    text = jnp.zeros((2, 4), jnp.int32)
    out = jax.jit(native.module.apply)(
      {'params': params | {'vision_model': vision}}, text, x, jnp.ones_like(text), text
    ).vision_model_output
    norm = params['vision_model']['post_layernorm']
    hidden = np.asarray(out.last_hidden_state[:, 1:])
    unit = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    dense = (unit * np.asarray(norm['scale']) + np.asarray(norm['bias'])) @ np.asarray(params['visual_projection']['kernel'])
    np.testing.assert_allclose(target, dense, atol=2e-5)


def test_errors(clip, tmp_path):
  with pytest.raises(UserError, match=f'no teacher in {tmp_path}.*model.safetensors'):
    teacher.load('clip', str(tmp_path), (4, 4))
  with pytest.raises(UserError, match="is a 'clip' model, but config.teacher.kind is 'dino'"):
    teacher.load('dino', str(clip[0]), (4, 4))
  with pytest.raises(UserError, match='use one of clip, open_clip, siglip, dino'):
    teacher.load('resnet', 'x', (4, 4))
  with pytest.raises(UserError, match='name is empty'):
    teacher.load('clip', '', (4, 4))


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain', 'classifier'])
def test_a_stage_trained_here_can_teach(task, tmp_path):
  """Its features are what `beitv2_jax.load` gives, through the model's last norm; also on another grid."""
  import beitv2_jax
  from beitv2_jax.tasks import teachers
  from beitv2_jax.training import loop
  from tests.conftest import smoke, untrained

  config = smoke(task).unlock()
  config.model.update(dict(tokenizer=dict(teacher_width=8), pretrain=dict(vocab=8), classifier=dict(classes=3))[task])
  untrained(config.lock(), tmp_path / 'stage')
  opened, frozen = teachers.of_stage(str(tmp_path / 'stage'), (4, 4), 'float32')
  x = np.asarray(images())
  model = beitv2_jax.load(tmp_path / 'stage')
  tokens = np.asarray(model.features(x)['patches'])
  expected = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)  # a fresh norm scales by one
  np.testing.assert_allclose(opened.apply(frozen, x), expected, atol=2e-4)
  assert opened.width == 32 and teachers.of_stage(str(tmp_path / 'stage'), (6, 3), 'float32')[0].apply is not None
  larger, theirs = teachers.of_stage(str(tmp_path / 'stage'), (6, 3), 'float32', (1, 2))
  assert larger.apply(theirs, x).shape == (2, 18, 32)
  if task == 'pretrain':
    changes = dict(teacher__kind='stage', teacher__name=str(tmp_path / 'stage'), steps=2)
    assert np.isfinite(loop.run(smoke('tokenizer', **changes), tmp_path / 'taught')['rec_loss'])
    with pytest.raises(UserError, match='has blocks 1 to 3'):
      loop.run(smoke('tokenizer', **changes, teacher__layers=(4,)), tmp_path / 'other')


def test_a_teacher_of_ones_own_in_one_file(tmp_path):
  from beitv2_jax.training import loop, metrics
  from tests.conftest import ROOT, smoke

  mine = dict(teacher__kind='python', teacher__name=str(ROOT / 'examples' / 'teacher_of_your_own.py'))
  loop.run(smoke('tokenizer', steps=30, optim__lr=3e-3, optim__warmup_epochs=0.0, **mine), tmp_path / 'run')
  rows = metrics.read(tmp_path / 'run')
  assert rows[-1]['rec_loss'] < 0.8 * rows[0]['rec_loss']
  for code, message in (
    ('', "module 'teacher_of_the_user' has no attribute 'load'"),
    (
      'def load(grid, dtype):\n  return 3, None, lambda p, x: x.mean((1, 2))',
      r'gives features of shape \(2, 3\) for 2 images; expected \(2, 16, 3\)',
    ),
    ('import nothing_like_it', 'ModuleNotFoundError'),
  ):
    (tmp_path / 'mine.py').write_text(code)
    with pytest.raises(UserError, match=message):
      loop.run(smoke('tokenizer', teacher__kind='python', teacher__name=str(tmp_path / 'mine.py')), tmp_path / 'other')
  with pytest.raises(UserError, match='no such file; teacher.kind=python takes'):
    loop.run(smoke('tokenizer', teacher__kind='python', teacher__name='/nowhere.py'), tmp_path / 'other')


@pytest.mark.parametrize('kind', ['clip', 'dino'])
def test_an_mlps_products_stay_apart_in_every_block(kind, monkeypatch):
  seen = []
  monkeypatch.setattr(chip, 'kept_apart', lambda x: seen.append(x.shape) or x)
  opened, params = teacher.abstract(kind, '', (14, 14))
  jax.eval_shape(opened.apply, params, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  assert seen == [(1, 197, 3072)] * 12
