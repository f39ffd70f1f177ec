"""The family of commands: what they share, their help, their errors, and all of a host's devices in each of them."""

import importlib
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from beitv2_jax import __main__, commands
from beitv2_jax.commands import arguments, convert
from beitv2_jax.downstream import features, trained
from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.weights import official
from tests.conftest import ROOT, main_env, smoke, untrained


def test_the_list_names_every_command(capsys):
  assert __main__.main([]) == 0
  listed = re.findall(r'^  (\w+)  +\S', capsys.readouterr().out, re.M)
  assert listed == list(commands.COMMANDS)
  files = {p.stem for p in (ROOT / 'beitv2_jax' / 'commands').glob('*.py')} - {'__init__', 'arguments'}
  assert files == set(listed)


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_help_has_an_example_and_shared_words(name, capsys):
  assert commands.run(name, ['--help']) == 0
  text = capsys.readouterr().out
  example = re.search(rf'^  python -m beitv2_jax {name}(.*)$', text, re.M)
  assert example, text
  module = importlib.import_module(f'beitv2_jax.commands.{name}')
  if name == 'convert':
    assert commands.run(name, ['import', '--help']) == commands.run(name, ['export', '--help']) == 0
    text += capsys.readouterr().out
  for flag in re.findall(r'(?<= )--[\w-]+', example[1]):
    assert flag in text.replace(example[0], '') or flag.startswith('--config') or flag == '--workdir', (name, flag)
  for word in ('--tokenizer', '--save', '--source', '--output'):
    assert word not in text
  assert module.main.__wrapped__  # goes through arguments.command


@pytest.mark.parametrize(
  'argv, words',
  [
    (['probee'], "no command 'probee'. Did you mean probe?"),
    (['tokenize', '--from', '/nowhere', '.'], 'there is no folder /nowhere'),
    (['predict', '--from', '/nowhere', '.', '--crop-pct', '2'], '--crop-pct 2.0'),
    (['bench', '--images', '100'], 'give --config=FILE'),
    (['bench', '--config=configs/nothing.py'], 'no config file configs/nothing.py, here or among the shipped recipes'),
    (['aot', '--config=configs/beitv2_b16.py', '--config.optim.learning=1'], 'unknown config key in --config.optim.learning=1'),
    (['aot', '--config=configs/beitv2_b16.py', '--tpology=v5e:2x2'], 'Unknown command line flag'),
    (['robustness', '--from', '/nowhere', '--data', 'x'], '--data x: give a name and a source'),
    (['convert', 'import', '--kind', 'tokenizer', '--from', 'x.pth'], 'give --out DIR'),
    (['prepare', 'imagenet2012', '--from', '/nowhere'], 'give --out DIR'),
    (['demo', '--data', 'folder:/nowhere'], 'no folder /nowhere'),
    (['train', '--config=configs/vqkd_b16.py:smoke'], 'give --workdir=DIR'),
  ],
)
def test_errors_are_one_line_and_exit_with_2(argv, words, capsys, monkeypatch):
  assert __main__.main(argv) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ') and words in message and message.count('\n') == 1


@pytest.mark.parametrize('argv', [['probe'], ['tokenize', '--batch', '0', '--from', 'x', 'y'], ['predict', '--nothing']])
def test_wrong_words_exit_with_2(argv, capsys):
  assert __main__.main(argv) == 2
  assert f'usage: python -m beitv2_jax {argv[0]}' in capsys.readouterr().err


@pytest.mark.parametrize('word, meant', [('--form', '--from'), ('--josn=x', '--json')])
def test_a_mistyped_option_gets_a_suggestion(word, meant, capsys):
  assert commands.run('predict', [word, 'run', 'photo.jpg']) == 2
  assert f'{word.partition("=")[0]}: did you mean {meant}?' in capsys.readouterr().err


@pytest.mark.parametrize(
  'error, code',
  [(UserError('bad'), 2), (OSError('disk'), 2), (SaveError('full'), 1), (FloatingPointError('nan'), 1), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error, code, capsys):
  @arguments.command
  def main(argv=None):
    raise error

  assert main([]) == code
  assert capsys.readouterr().err.count('\n') == 1


def test_convert_knows_the_kinds_that_there_are():
  assert convert.KINDS == tuple(official.TABLES)


def test_listing_and_help_are_quick_to_import():
  """They start without JAX."""
  code = 'import sys; from beitv2_jax import __main__; __main__.main(["probe", "--help"]); sys.exit("jax" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=main_env())
  assert done.returncode == 0 and 'usage' in done.stdout


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Untrained stages of three kinds, as directories."""
  root = tmp_path_factory.mktemp('models')
  for task in ('tokenizer', 'classifier', 'segmenter'):
    changes = dict(model__teacher_width=8) if task == 'tokenizer' else dict(model__classes=10)
    untrained(smoke(task, **changes), root / task)
  return root


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Labelled images of odd sizes, 21 of three classes, which no number of devices divides."""
  root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
  for i in range(21):
    path = root / f'class {i % 3}' / f'{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), np.uint8)).save(path)
  return root


@pytest.fixture
def one_device(monkeypatch):
  """A switch that leaves the commands a single device."""
  devices = jax.local_devices()
  return lambda on: monkeypatch.setattr(jax, 'local_devices', lambda: devices[:1] if on else devices)


COMMANDS = {
  'tokenize': lambda m, f: ['--from', f'{m}/tokenizer', f'{f}', '--batch', '5'],
  'predict': lambda m, f: ['--from', f'{m}/classifier', f'{f}', '--batch', '5', '--top', '10'],
  'robustness': lambda m, f: ['--from', f'{m}/classifier', '--data', f'a=folder:{f}', '--batch', '6'],
  'probe': lambda m, f: [
    '--from',
    f'{m}/classifier',
    '--data',
    f'folder:{f}',
    '--batch',
    '6',
    '--epochs',
    '2',
    '--shots',
    '1',
    '--holdout',
    '0.3',
  ],
}


@pytest.mark.parametrize('name', COMMANDS)
def test_eight_devices_give_the_numbers_of_one(name, models, folder, tmp_path, one_device, monkeypatch):
  placed, results = [], []
  put = jax.device_put
  monkeypatch.setattr(trained.jax, 'device_put', lambda x, where: placed.append(where.mesh.size) or put(x, where))
  monkeypatch.setattr('beitv2_jax.downstream.robustness.model_classes', lambda config: [f'class {i}' for i in range(10)])
  for on in (True, False):
    one_device(on)
    assert commands.run(name, [*COMMANDS[name](models, folder), '--json', f'{tmp_path}/{on}.json']) == 0
    results.append(json.loads((tmp_path / f'{on}.json').read_text()))
  assert set(placed) == {1, 8}
  numbers = [np.array([float(x) for x in re.findall(r'-?\d+\.?\d*(?:e-?\d+)?', json.dumps(r))]) for r in results]
  np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-3, atol=2e-5)


def test_a_segmenter_on_eight_devices(models, one_device):
  image = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
  outs = []
  for on in (True, False):
    one_device(on)
    outs.append(np.asarray(trained.load(models / 'segmenter').logits(image)))
  assert outs[0].shape == (3, 16, 16, 10)
  np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)


def test_probe_says_how_much_its_figures_mean(models, folder, tmp_path, capsys):
  args = ['--from', f'{models}/classifier', '--epochs', '2', '--shots', '1', '--data']
  assert commands.run('probe', [*args, f'folder:{folder}', '--out', f'{tmp_path}/kept']) == 0
  out = capsys.readouterr()
  assert '2 images of 3 classes were scored; ± is the standard error' in out.out
  assert 'warning: only 2 images of 3 classes were scored' in out.err
  assert (tmp_path / 'kept' / 'train.f16').stat().st_size == 19 * 3 * 2 * 32 * 2  # images, blocks, poolings, width, bytes
  one = tmp_path / 'one' / 'only'
  one.mkdir(parents=True)
  for i in range(4):
    Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(one / f'{i}.png')
  assert commands.run('probe', [*args, f'folder:{one.parent}']) == 2
  assert 'at least two to tell apart' in capsys.readouterr().err


def test_features_that_do_not_fit_the_disk(models, folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(features.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=100)))
  assert commands.run('probe', ['--from', f'{models}/classifier', '--data', f'folder:{folder}', '--out', f'{tmp_path}/f']) == 2
  assert 'give --out a folder on a larger disk' in capsys.readouterr().err


def test_a_log_is_not_filled_with_bars(models, folder, tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'beitv2_jax', 'predict', '--from', f'{models}/classifier', str(folder), '--batch', '1'],
    capture_output=True, text=True, env=main_env(), cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0 and len(done.stdout.splitlines()) == 21 and not done.stderr
