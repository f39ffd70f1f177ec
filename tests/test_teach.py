"""A teacher's features on disk: written once, read in any order by any number of workers, refused for other images."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beitv2_jax import commands
from beitv2_jax.data import sources, taught
from beitv2_jax.downstream import teach
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, metrics
from tests.conftest import smoke


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Images in a folder, and features of the untrained teacher."""
  root, rng = tmp_path_factory.mktemp('teach'), np.random.default_rng(0)
  for i in range(40):
    (root / 'images').mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)).save(root / 'images' / f'{i:02d}.png')
  arguments = ['--config=configs/vqkd_b16.py:smoke', '--data', f'folder:{root}/images', '--out', f'{root}/features', '--batch', '8']
  assert commands.run('teach', arguments) == 0
  return root


def disk(folder, **changes):
  return smoke('tokenizer', data__source=f'folder:{folder}/images', teacher__kind='disk', teacher__name=f'{folder}/features', **changes)


def test_a_tokenizer_learns_the_same_from_disk_as_from_the_teacher(folder, tmp_path):
  """With crops that are the centre, and no flips: the targets differ by bfloat16 alone."""
  losses = []
  for name, config in (
    ('disk', disk(folder, steps=4)),
    ('live', smoke('tokenizer', data__source=f'folder:{folder}/images', steps=4)),
  ):
    with pytest.MonkeyPatch.context() as patch:
      if name == 'live':  # the same pictures
        from beitv2_jax.data.transforms import image_transforms
        from beitv2_jax.tasks.tokenizer import TokenizerTask

        patch.setattr(TokenizerTask, 'transforms', staticmethod(lambda config, train, source: image_transforms(config.data, False)))
      loop.run(config, tmp_path / name)
    losses.append([row['rec_loss'] for kind in ('train', 'eval') for row in metrics.read(tmp_path / name, kind)])
  np.testing.assert_allclose(*losses, atol=2e-3)
  assert json.loads((tmp_path / 'disk' / 'config.json').read_text())['model']['teacher_width'] == 24


def test_each_image_has_its_own_features(folder):
  config = smoke('tokenizer', data__source=f'folder:{folder}/images')
  opened = sources.make(config.data.source, 'train')
  from beitv2_jax.data.decode import image
  from beitv2_jax.data.transforms import CenterCrop
  from beitv2_jax.models.images import unit_images
  from beitv2_jax.tasks import teachers

  teacher, frozen = teachers.opened(config, 'float32')
  source = taught.Taught(opened, folder / 'features', 'train')
  assert len(source) == len(opened) == 36
  for i in (35, 0, 17):
    crop = CenterCrop((32, 32), 0.875)(dict(image=image(opened[i]['image'])), None)['image']
    expected = teacher.apply(frozen, unit_images(jnp.asarray(crop)[None]))[0]
    np.testing.assert_allclose(source[i]['teacher'].view(jnp.bfloat16.dtype).astype(np.float32), expected, rtol=0.01, atol=1e-3)


def test_workers_read_them_too(folder, tmp_path):
  runs = [
    metrics.read(tmp_path / name)
    for name, workers in (('threads', 0), ('workers', 1))
    if loop.run(disk(folder, steps=3, data__workers=workers), tmp_path / name)
  ]
  assert [row['loss'] for row in runs[0]] == [row['loss'] for row in runs[1]]


def test_other_images_another_order_and_damage_are_refused(folder, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(folder, copy)
  (copy / 'images' / '07.png').rename(copy / 'images' / '99.png')
  with pytest.raises(UserError, match='was made from other images, or in another order'):
    loop.run(disk(copy), tmp_path / 'run')
  (copy / 'images' / '99.png').rename(copy / 'images' / '07.png')
  with (copy / 'features' / 'eval.bf16').open('r+b') as file:
    file.truncate(100)
  with pytest.raises(UserError, match='eval.bf16 is not whole'):
    loop.run(disk(copy), tmp_path / 'run')
  (copy / 'features' / 'teaching.json').unlink()
  with pytest.raises(UserError, match='no features of a teacher in'):
    loop.run(disk(copy), tmp_path / 'run')
  with pytest.raises(UserError, match=r'on a grid of \[4, 4\], this tokenizer has \(8, 8\)'):
    loop.run(disk(folder, data__image_size=64), tmp_path / 'run')
  with pytest.raises(UserError, match='a centre crop with data.crop_pct=0.875, this tokenizer sees 0.5'):
    loop.run(disk(folder, data__crop_pct=0.5), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config=configs/beitv2_b16.py:smoke'], 'give the recipe of a tokenizer'),
    (['--config=configs/vqkd_b16.py:smoke', '--set', 'x'], 'give KEY=VALUE'),
  ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
  assert commands.run('teach', [*arguments, '--data', 'fake:8', '--out', str(tmp_path / 'out')]) == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_an_image_that_does_not_decode_keeps_its_place(folder, tmp_path):
  shutil.copytree(folder / 'images', tmp_path / 'images')
  names = sorted((tmp_path / 'images').iterdir())
  names[3].write_bytes(b'nothing')
  config = smoke('tokenizer', data__source=f'folder:{tmp_path}/images', data__max_bad=1.0)
  opened = {split: sources.make(config.data.source, split) for split in ('train', 'eval')}
  assert teach.write(config, opened, tmp_path / 'features', batch=8) == dict(train=36, eval=4)
  assert len(taught.Taught(opened['train'], tmp_path / 'features', 'train')) == 36
