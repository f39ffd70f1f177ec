"""The examples, run as a reader would, on small models; each is short."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import beitv2_jax
from beitv2_jax.data import decode
from tests.conftest import smoke, untrained

EXAMPLES = Path(__file__).parents[1] / 'examples'


def example(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Class folders, and models of no skill."""
  root = tmp_path_factory.mktemp('examples')
  rng = np.random.default_rng(0)
  for split, count in (('train', 10), ('val', 4)):
    for name, brightness in (('dark', 40), ('light', 200)):
      (root / 'photos' / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = np.clip(rng.normal(brightness, 30, (40, 50, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / 'photos' / split / name / f'{i}.png')
  untrained(smoke('tokenizer', model__teacher_width=24), root / 'tokenizer')
  untrained(smoke('pretrain', model__vocab=32), root / 'pretrained')
  untrained(smoke('segmenter', model__classes=4), root / 'segmenter')
  return root


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.py')), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_run(path):
  lines = path.read_text().splitlines()
  code = [line for line in lines[lines.index('"""', 1) + 1 :] if line.strip()]
  assert len(code) <= 40 and f'examples/{path.name}' in path.read_text()


def test_codes_to_parquet(folder, tmp_path):
  example('codes_to_parquet')(str(folder / 'tokenizer'), str(folder / 'photos'), str(tmp_path / 'codes.parquet'))
  table = parquet.read_table(tmp_path / 'codes.parquet').to_pydict()
  assert len(table['file']) == 28 and 'train/dark/0.png' in table['file']
  for codes, most, share in zip(table['codes'], table['most_frequent'], table['share']):
    assert len(codes) == 16 and codes.count(most) / 16 == share == max(np.bincount(codes)) / 16


def test_nearest_patches(folder, tmp_path, capsys):
  photo = folder / 'photos' / 'train' / 'dark' / '0.png'
  example('nearest_patches')(str(folder / 'tokenizer'), str(folder / 'photos'), str(photo), '1', '2', str(tmp_path / 'patches.png'))
  model = beitv2_jax.load(folder / 'tokenizer')
  from beitv2_jax.downstream import image_files

  ((_, image),) = image_files.prepared([photo], 32, 1)
  assert f'code {int(model.tokens(image)[0, 1, 2])}:' in capsys.readouterr().out
  sheet = np.asarray(Image.open(tmp_path / 'patches.png'))
  np.testing.assert_array_equal(sheet[::4, ::4][:8, :8], image[0, 8:16, 16:24])  # the photo's patch is the first


@pytest.mark.parametrize(
  'name, arguments, said',
  [
    ('nearest_patches', ('tokenizer', 'photos', 'broken.jpg', '1', '2', 'x.png'), 'does not decode'),
    ('nearest_patches', ('tokenizer', 'photos', 'broken.jpg', '4', '2', 'x.png'), 'rows and columns 0 to 3'),
    ('nearest_patches', ('pretrained', 'photos', 'broken.jpg', '1', '2', 'x.png'), 'is a pretrain'),
    ('codes_to_parquet', ('tokenizer', 'broken.jpg', 'x.parquet'), 'is no folder'),
    ('finetune', ('tokenizer', 'photos', 'run', 'broken.jpg'), 'give a pretrained model'),
    ('training_loop', ('pretrained', 'photos'), 'give a tokenizer'),
  ],
)
def test_what_does_not_fit_is_said(folder, name, arguments, said):
  (folder / 'broken.jpg').write_bytes(b'no image')
  with pytest.raises(SystemExit, match=said):
    example(name)(*(str(folder / a) if not a.isdigit() else a for a in arguments))


def test_finetune(folder, tmp_path, capsys):
  image = folder / 'photos' / 'val' / 'light' / '0.png'
  example('finetune')(str(folder / 'pretrained'), str(folder / 'photos'), str(tmp_path / 'run'), str(image))
  out = capsys.readouterr().out
  assert '% of the evaluation images are named right' in out and "'name': 'light'" in out
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['model']['width'] == 32


def test_segment_photo(folder, tmp_path, capsys):
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(tmp_path / 'photo.jpg')
  example('segment_photo')(str(folder / 'segmenter'), str(tmp_path / 'photo.jpg'), str(tmp_path / 'overlay.png'))
  assert decode.image((tmp_path / 'overlay.png').read_bytes()).shape == (50, 90, 3)
  shares = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines() if line.endswith('%')]
  assert sum(shares) == pytest.approx(100, abs=0.3)


def test_training_loop(folder, capsys):
  example('training_loop')(str(folder / 'tokenizer'), str(folder / 'photos'))
  losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
  assert len(losses) == 20 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3


def test_recipe_takes_changes_by_name():
  config = beitv2_jax.recipe('configs/vqkd_b16.py:small_data', {'optim.lr': 1e-3, 'data.source': 'folder:photos'})
  assert config.optim.lr == 1e-3 and config.codebook.revive > 0 and config.data.source == 'folder:photos'
  from beitv2_jax.errors import UserError

  with pytest.raises(UserError, match='unknown config key'):
    beitv2_jax.recipe('configs/vqkd_b16.py', {'optim.rate': 1})
  with pytest.raises(UserError, match='no config file'):
    beitv2_jax.recipe('configs/vqkd.py')
