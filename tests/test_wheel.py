"""The built wheel, outside of the repository: recipes, commands and types come with it."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """A folder with nothing but what the wheel installs."""
  root = tmp_path_factory.mktemp('wheel')
  source = root / 'source'
  tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
  wanted = ('beitv2_jax/', 'configs/', 'setup.cfg', 'pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE')
  files = tracked or [str(p.relative_to(ROOT)) for p in ROOT.rglob('*') if p.is_file()]
  for name in files:
    if name.startswith(wanted) and (ROOT / name).is_file():
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes((ROOT / name).read_bytes())
  subprocess.run(
    [sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', root, source], check=True, capture_output=True, timeout=300
  )
  (wheel,) = root.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(root / 'site')
  return root / 'site'


def python(site, folder, *args):
  """Python that finds the wheel's files, and not the checkout, in `folder`."""
  env = os.environ | dict(PYTHONPATH=str(site), JAX_PLATFORMS='cpu')
  # -S drops the editable install's finder with site-packages, which come back by hand.
  packages = [p for p in sys.path if p.endswith('site-packages')]
  env['PYTHONPATH'] = os.pathsep.join([str(site), *packages])
  return subprocess.run([sys.executable, '-S', *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_what_is_in_it(site):
  package = site / 'beitv2_jax'
  for name in (
    'py.typed',
    'configs/vqkd_b16.py',
    'configs/demo.py',
    'commands/probe.py',
    'kernels/attention_tpu.py',
    'pictures/site/explorer.js',
    'reports/site/charts.js',
  ):
    assert (package / name).is_file(), name
  shipped = {p.relative_to(package) for p in package.rglob('*.py')}
  here = {p.relative_to(ROOT / 'beitv2_jax') for p in (ROOT / 'beitv2_jax').rglob('*.py')}
  assert here <= shipped
  assert {p.name for p in (ROOT / 'configs').glob('*.py')} == {p.name for p in (package / 'configs').glob('*.py')}
  assert sorted(p.name for p in site.iterdir() if not p.name.endswith('.dist-info')) == ['beitv2_jax']  # no other names at the top


def test_a_shipped_recipe_trains_in_an_empty_folder(site, tmp_path):
  done = python(site, tmp_path, '-m', 'beitv2_jax.main', '--config=configs/vqkd_b16.py:smoke', '--workdir=run', '--config.steps=1')
  assert done.returncode == 0, done.stderr[-2000:]
  assert (tmp_path / 'run' / 'checkpoints' / '1').is_dir()
  where = python(site, tmp_path, '-c', 'import beitv2_jax; print(beitv2_jax.__file__)').stdout
  assert where.startswith(str(site))
  (tmp_path / 'image.ppm').write_bytes(b'P6 40 40 255 ' + bytes(4800))
  codes = python(site, tmp_path, '-m', 'beitv2_jax', 'tokenize', '--from', 'run', 'image.ppm')
  assert codes.returncode == 0 and len(codes.stdout.splitlines()) == 5, codes.stderr[-2000:]


RECIPE = """
from beitv2_jax.configs import beitv2_b16

def get_config(arg=None):
  config = beitv2_b16.get_config(arg).unlock()
  config.optim.lr = 0.125
  return config.lock()
"""


def test_a_recipe_of_ones_own_may_import_a_shipped_one_and_goes_first(site, tmp_path):
  show = 'import sys; from beitv2_jax import recipes; c = recipes.from_arguments(sys.argv[1:]); print(c.task, c.optim.lr)'
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'mine.py').write_text(RECIPE)
  assert python(site, tmp_path, '-c', show, '--config=configs/mine.py:smoke').stdout.split() == ['pretrain', '0.125']
  assert python(site, tmp_path, '-c', show, '--config=configs/vqkd_b16.py').stdout.split() == ['tokenizer', '0.0002']
  (tmp_path / 'configs' / 'vqkd_b16.py').write_text(RECIPE)
  assert python(site, tmp_path, '-c', show, '--config', 'configs/vqkd_b16.py').stdout.split() == ['pretrain', '0.125']
  (tmp_path / 'configs' / 'broken.py').write_text('import nothing_of_this_name')
  done = python(site, tmp_path, '-m', 'beitv2_jax.main', '--config=configs/broken.py', '--workdir=x')
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'nothing_of_this_name' in done.stderr


def test_every_command_says_what_it_does(site, tmp_path):
  listed = python(site, tmp_path, '-m', 'beitv2_jax').stdout
  for name in ('train', 'demo', 'probe', 'convert', 'aot'):
    assert name in listed
    done = python(site, tmp_path, '-m', 'beitv2_jax', name, '--help')
    assert done.returncode == 0 and 'python -m beitv2_jax' in done.stdout, done.stderr[-2000:]
