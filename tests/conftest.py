import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# Eight devices, and programs that are compiled quickly: they are small and run a few times.
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import pathlib
import subprocess
import sys

import jax
import pytest
from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, vqkd_b16

from beitv2_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path.home() / '.cache' / 'beitv2_jax' / 'xla'))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def smoke(task: str, **changes):
  """A shipped recipe at smoke size on one device; dots in names are written as two underscores."""
  recipes = dict(tokenizer=vqkd_b16, pretrain=beitv2_b16, classifier=finetune_b16, segmenter=ade20k_b16)
  c = recipes[task].get_config('smoke').unlock()
  c.mesh.data = 1
  c.samples = 0  # test_report.py draws them
  c.layers.scan = True  # compiles faster; test_meshes.py holds it to blocks one by one
  for key, value in changes.items():
    *parents, last = key.split('__')
    node = c
    for p in parents:
      node = node[p]
    node[last] = value
  return c.lock()


def untrained(config, workdir, seed: int = 1) -> None:
  """A directory with fresh weights of a config's model: what loads as a stage, without training one."""
  from beitv2_jax.models import from_config
  from beitv2_jax.weights import stages

  workdir.mkdir()
  config_lib.save(config, workdir)
  stages.write_variables(workdir, 0, from_config.fresh_variables(config, seed))


def run_main(*args: str, devices: int = 1, timeout: int = 300, **kwargs) -> subprocess.CompletedProcess:
  """python -m beitv2_jax.main in a process of its own."""
  return subprocess.run(main_command(*args), env=main_env(devices), cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)


def main_command(*args: str) -> list[str]:
  return [sys.executable, '-m', 'beitv2_jax.main', *map(str, args)]


def main_env(devices: int = 1) -> dict[str, str]:
  return os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
  }
