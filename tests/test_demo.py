"""The whole chain through the shipped demo recipes, at a few steps a stage, on a folder of images of one's own."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from beitv2_jax import commands, config, recipes
from beitv2_jax.reports import draw as pictures
from tests.conftest import ROOT, main_env, run_main


def test_the_chain_on_a_folder_of_images(tmp_path):
  digits = load_digits()
  for i in range(120):
    folder = tmp_path / 'images' / f'class {digits.target[i] % 3}'
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((40, 36)).save(folder / f'{i}.png')
  out = tmp_path / 'out'
  command = [sys.executable, '-m', 'beitv2_jax', 'demo', f'--data=folder:{tmp_path}/images', '--steps=0.01', f'--out={out}']
  done = subprocess.run(command, env=main_env(), cwd=ROOT, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr[-3000:]
  summary = json.loads((out / 'summary.json').read_text())
  for key in ('pretrained', 'random_init', 'teacher', 'pixels'):
    assert summary[key].keys() == {'probe', 'probe5', 'knn'} and all(0 <= v <= 100 for v in summary[key].values())
  assert summary['codes_total'] == 64 and 0 < summary['codes_used'] <= 64 and 1 <= summary['perplexity'] <= 64
  assert 0 <= summary['mim_acc'] <= 100 and 0 < summary['mim_acc_floor'] <= 100
  page = (out / 'report.html').read_text().split('<script>')[0]
  assert (out / 'explorer' / 'data' / 'summary.js').is_file()
  assert page.count('<img src="data:image/png;base64,') == 5 and page.count('<figure class="chart"') == 4 and 'k-NN' in page
  assert 'linear probe %' in done.stdout and '--config=configs/demo.py:stage=vqkd' in done.stdout


RECIPES = ['ade20k_b16.py:smoke']
MORE = [
  'beitv2_l16.py:smoke',
  'vqkd_b16.py:smoke,teacher=dino,decoder=1',
  'beitv2_b16.py:smoke',
  'vqkd_b16.py:smoke',
  'finetune_b16.py:smoke',
  'finetune_l16.py:smoke',
  'ade20k_l16.py:smoke',
]


@pytest.mark.parametrize('recipe', [*RECIPES, *(pytest.param(r, marks=pytest.mark.slow) for r in MORE)])
def test_smoke_recipes_train(tmp_path, recipe):
  done = run_main(f'--config=configs/{recipe}', f'--workdir={tmp_path}')
  assert done.returncode == 0, done.stderr[-3000:]
  assert (tmp_path / 'checkpoints' / '6').is_dir()


def test_gallery_rows_hold_patches_of_their_code():
  codes = np.array([[[0, 1], [1, 1]], [[1, 0], [0, 0]]])
  images = (codes.repeat(4, 1).repeat(4, 2)[..., None] * 200 + np.zeros(3, int)).astype(np.uint8)
  sheet = np.asarray(pictures.gallery(images, codes, size=5, columns=3, across=1, scale=1))
  assert sheet.shape == (14, 15, 3)
  for line, value in ((0, 0), (7, 200)):  # four patches each; ties keep the order of codes
    assert (np.concatenate([sheet[line : line + 4, c * 5 : c * 5 + 4] for c in range(3)]) == value).all()
  predicted = codes.copy()
  predicted[0, 0, 0] = 3
  strip = np.asarray(pictures.masked_predictions(images, np.ones_like(codes, bool), codes, predicted, 5))
  assert strip.shape == (4 * 12 * 12, 2 * 12 * 12, 3)
  assert (strip[144:240, :96] == 128).all()  # everything was hidden


def test_a_demo_of_other_images_is_not_taken_for_this_one(tmp_path, capsys):
  (tmp_path / 'vqkd').mkdir()
  config.save(recipes.from_arguments(['--config=configs/demo.py:stage=vqkd', '--config.steps=600']), tmp_path / 'vqkd')
  (tmp_path / 'photos' / 'cat').mkdir(parents=True)
  Image.new('RGB', (40, 40)).save(tmp_path / 'photos' / 'cat' / '0.png')
  Image.new('RGB', (40, 40)).save(tmp_path / 'photos' / 'cat' / '1.png')
  assert commands.run('demo', ['--data', f'folder:{tmp_path}/photos', '--out', str(tmp_path)]) == 2
  assert f'{tmp_path}/vqkd was made from digits, not folder:{tmp_path}/photos; give another folder with --out' in capsys.readouterr().err
  assert commands.run('demo', ['--steps', '0.1', '--out', str(tmp_path)]) == 2
  assert f'{tmp_path}/vqkd has 600 steps, not 60; give the same --steps, or another folder with --out' in capsys.readouterr().err
  assert commands.run('demo', ['--steps', '20', '--out', str(tmp_path)]) == 2
  assert 'a share of the usual steps, such as 0.1' in capsys.readouterr().err
