"""Codes of image files from the command line."""

import os

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import beitv2_jax
from beitv2_jax import commands
from beitv2_jax.downstream import image_files
from beitv2_jax.downstream.codes import tokenize
from beitv2_jax.downstream.image_files import find_images
from tests.conftest import smoke, untrained


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenize')
  untrained(smoke('tokenizer', model__teacher_width=8), root / 'vqkd')
  (root / 'images').mkdir()
  rng = np.random.default_rng(0)
  for i in range(5):
    Image.fromarray(rng.integers(0, 255, (50, 40 + 9 * i, 3), dtype=np.uint8)).save(root / 'images' / f'{i}.png')
  (root / 'images' / 'broken.jpg').write_bytes(b'nothing')
  return root


def test_saved_and_printed_codes_agree(folder, capsys):
  common = ['--from', f'{folder}/vqkd', '--batch', '2']
  assert commands.run('tokenize', [*common, '--out', f'{folder}/codes.npz', f'{folder}/images']) == 0
  assert 'broken.jpg does not decode' in capsys.readouterr().err
  saved = np.load(folder / 'codes.npz')
  assert saved['codes'].shape == (5, 4, 4) and len(saved['files']) == 5
  assert commands.run('tokenize', [*common, '--out', f'{folder}/codes.parquet', f'{folder}/images']) == 0
  table = parquet.read_table(folder / 'codes.parquet').to_pydict()
  np.testing.assert_array_equal(np.reshape(table['codes'], (5, 4, 4)), saved['codes'])
  capsys.readouterr()
  assert commands.run('tokenize', [*common, f'{folder}/images/3.png']) == 0
  lines = capsys.readouterr().out.splitlines()
  np.testing.assert_array_equal([[int(c) for c in line.split()] for line in lines[1:]], saved['codes'][3])
  image = Image.open(folder / 'images' / '3.png')  # 67 x 50: the shorter side becomes 36
  image = image.resize((48, 36), Image.Resampling.BICUBIC).crop((8, 2, 40, 34))
  np.testing.assert_array_equal(beitv2_jax.load(folder / 'vqkd').tokens(np.asarray(image)[None])[0], saved['codes'][3])


@pytest.mark.parametrize(
  'args, words', [(['/nowhere.jpg'], 'no file or folder'), (['--out', 'x.txt', '.'], 'ends in .npz'), (['EMPTY'], 'no images under')]
)
def test_errors(folder, tmp_path, capsys, args, words):
  args = [str(tmp_path) if a == 'EMPTY' else a for a in args]
  assert commands.run('tokenize', ['--from', f'{folder}/vqkd', *args]) == 2
  assert words in capsys.readouterr().err


DEMO = os.environ.get('BEITV2_VQKD_1X_CLIP'), os.environ.get('BEITV2_DEMO_IMAGE')


@pytest.mark.skipif(
  not all(DEMO), reason='set BEITV2_VQKD_1X_CLIP to the imported official tokenizer and BEITV2_DEMO_IMAGE to its demo image'
)
def test_official_demo_codes():
  """First two rows of the codes that the official README prints for ImageNet val 00031649 (99 different codes in all)."""
  _, codes = tokenize(beitv2_jax.load(DEMO[0]), find_images([DEMO[1]]))
  first = [3812, 7466, 1913, 1913, 1903, 1913, 1903, 1913, 3812, 7820, 6337, 2189, 7466, 7466]
  second = [2492, 3743, 5268, 3481, 5268, 4987, 445, 8009, 3501, 5268, 7820, 7831, 4816, 2189]
  assert codes.shape == (1, 14, 14) and (codes[0, :2].ravel() == first + second).mean() >= 0.95 and abs(len(np.unique(codes)) - 99) <= 3


def test_files_are_decoded_ahead_in_order_and_broken_ones_left_out(tmp_path, capsys):
  paths = []
  for i in range(12):
    paths.append(tmp_path / f'{i:02d}.png')
    Image.new('RGB', (40, 30), (i, 0, 0)).save(paths[-1])
  paths[5].write_bytes(b'no image')
  batches = list(image_files.prepared(paths, 32, batch=4))
  assert [[int(p.stem) for p in names] for names, _ in batches] == [[0, 1, 2, 3], [4, 6, 7, 8], [9, 10, 11]]
  for names, images in batches:
    assert images.shape[1:] == (32, 32, 3) and [int(x) for x in images[:, 0, 0, 0]] == [int(p.stem) for p in names]
  assert '05.png does not decode' in capsys.readouterr().err


def test_no_more_is_worked_on_than_is_allowed():
  """A folder of a million photographs must not be read into memory while the first batch is looked at."""
  started = []
  results = image_files.in_threads(lambda i: started.append(i) or i * i, range(1000), ahead=3)
  assert [next(results) for _ in range(3)] == [0, 1, 4] and len(started) <= 3 + 3 + (os.cpu_count() or 1) + 1
  results.close()
  assert len(started) < 100
