"""Attention maps and patch features as pictures: the values are the model's own."""

import jax
import numpy as np
import pytest
from PIL import Image

from beitv2_jax import commands
from beitv2_jax.downstream import patch_features, trained
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.pictures import attention as pictures
from tests.conftest import smoke, untrained


def model_of(task, seed=1, **changes):
  config = smoke(task, **changes).unlock()
  if task == 'tokenizer':
    config.model.teacher_width = 8
  if task == 'pretrain':
    config.model.vocab = 16
  config.model.update(dict(classes=5) if task in ('classifier', 'segmenter') else {})
  variables = from_config.fresh_variables(config, seed)
  # Bias tables start at zero, where they could not be missed.
  shake = lambda path, x: x + 0.3 * jax.random.normal(jax.random.key(7), x.shape) if 'table' in jax.tree_util.keystr(path) else x
  return trained.Model(config, jax.tree_util.tree_map_with_path(shake, variables))


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain', 'classifier', 'segmenter'])
def test_the_maps_give_what_the_block_computes(task):
  """Attention's output, made from the maps, is what the block adds to its input before the MLP: the next block's input tells."""
  model = model_of(task, dtype='float32')
  side = model.config.data.image_size
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  depth = model._encoder().depth
  maps = np.asarray(model.attention(images))
  tokens = 1 + model.grid[0] * model.grid[1]
  assert maps.shape == (2, model._encoder().heads, tokens, tokens)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(maps, model.attention(images, depth))
  assert np.abs(maps - np.asarray(model.attention(images, 1))).max() > 1e-4

  # The last block once more, from these maps and its other parameters.
  layers = [np.concatenate([np.asarray(x['cls'])[:, None], x['patches']], 1) for x in model.features(images, layers=True)['layers']]
  params = model.variables['params']
  encoder = params['encoder']['vit'] if task == 'tokenizer' else params['backbone']
  block = jax.tree.map(np.asarray, encoder[f'block_{depth - 1}'])
  x = layers[depth - 2]

  def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']

  attn = block['attn']
  v = np.einsum('btd,dhe->bthe', norm(x, block['norm1']), attn['qkv'][:, 2]) + attn['v_bias']
  y = np.einsum('bhqk,bkhe,hed->bqd', maps, v, attn['proj'].reshape(*v.shape[2:], -1)) + attn['proj_bias']
  x = x + y * block.get('gamma1', 1)
  hidden = norm(x, block['norm2']) @ block['fc1']['kernel'] + block['fc1']['bias']
  hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
  x = x + (hidden @ block['fc2']['kernel'] + block['fc2']['bias']) * block.get('gamma2', 1)
  np.testing.assert_allclose(x, layers[-1], atol=2e-5)


def test_another_image_size_resamples_the_tables():
  model = model_of('classifier')
  side = model.config.data.image_size
  larger = model.at_size(side * 2)
  images = np.random.default_rng(0).integers(0, 256, (1, 2 * side, 2 * side, 3), np.uint8)
  assert larger.attention(images).shape[-1] == 1 + 4 * model.grid[0] * model.grid[1]
  assert model.at_size((side, 2 * side)).grid == (model.grid[0], 2 * model.grid[1])
  assert model.at_size(side) is model and model.config.data.image_size == side
  with pytest.raises(UserError, match='give multiples of'):
    model.at_size(side + 1)
  with pytest.raises(UserError, match='has blocks 1 to'):
    model.attention(images[:, :side, :side], block=99)


def test_principal_colors_separate_what_differs():
  rng = np.random.default_rng(0)
  parts = np.repeat([0, 1, 2], [4, 4, 8]).reshape(1, 4, 4)
  features = rng.normal(size=(3, 20))[parts] * 5 + rng.normal(size=(1, 4, 4, 20)) * 0.01
  colors = patch_features.principal_colors(features).astype(int)
  assert colors.shape == (1, 4, 4, 3)
  for part in range(3):
    assert np.ptp(colors[parts == part][:, :2], axis=0).max() < 10
  means = np.array([colors[parts == part].mean(0) for part in range(3)])
  assert min(np.abs(means[i] - means[j]).max() for i in range(3) for j in range(i)) > 60
  similar = patch_features.similarity(features[0], 0, 0)
  assert similar[0, 0] == pytest.approx(1) and (similar[parts[0] == 0] > 0.99).all() and (similar[parts[0] == 2] < 0.9).all()


def test_heat_is_even_and_bounded():
  colors = pictures.heat(np.linspace(-1, 2, 50)[None], 0, 1)[0].astype(int)
  assert tuple(colors[0]) == (68, 1, 84) and tuple(colors[-1]) == (253, 231, 37)
  assert (np.diff(colors @ [0.2126, 0.7152, 0.0722]) >= 0).all()
  assert pictures.heat(np.zeros((2, 2))).shape == (2, 2, 3)


def test_command(tmp_path, capsys):
  config = smoke('tokenizer').unlock()
  config.model.teacher_width = 8
  untrained(config.lock(), tmp_path / 'vqkd')
  (tmp_path / 'images').mkdir()
  for i in range(3):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / 'images' / f'{i}.png')
  common = ['--from', f'{tmp_path}/vqkd', f'{tmp_path}/images', '--out', f'{tmp_path}/out']
  assert commands.run('attention', [*common, '--patch', '1,1', '--size', '64', '--batch', '2']) == 0
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['0000_0.png', '0001_1.png', '0002_2.png']
  assert np.asarray(Image.open(tmp_path / 'out' / '0000_0.png')).std() > 10
  capsys.readouterr()
  for extra, message in (
    (['--patch', '9,0'], '--patch 9,0: this model has rows 0 to'),
    (['--size', '33'], 'give multiples of'),
    (['--block', '9'], 'has blocks 1 to'),
  ):
    assert commands.run('attention', [*common, *extra]) == 2
    assert message in capsys.readouterr().err
