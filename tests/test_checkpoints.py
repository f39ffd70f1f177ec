"""Checkpoints are believed only when they are whole."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from beitv2_jax import commands
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, metrics
from beitv2_jax.weights import checkpoint_files, checksums, stages, trees
from benchmarks.campaign.damages import damage
from tests.conftest import smoke


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Six steps, with checkpoints after three and six."""
  workdir = tmp_path_factory.mktemp('trained')
  loop.run(smoke('pretrain'), workdir)
  return workdir


@pytest.fixture
def run(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'run')


def arrays(workdir):
  return trees.flatten(stages.load_variables(workdir)[1])


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
def test_a_checksum_sees_every_bit_and_does_not_depend_on_the_layout(dtype):
  x = np.maximum(np.random.default_rng(0).normal(size=(16, 12)) * 100, 0)
  x = np.asarray(jnp.asarray(x).astype(dtype))
  mesh = jax.make_mesh((4, 2), ('data', 'model'))
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data', 'model')))
  expected = checksums.of_tree({'x': x})
  assert checksums.of_tree({'x': split}) == checksums.of_tree({'x': jnp.asarray(x)}) == expected
  changed = x.copy().view(np.uint8)
  for byte in range(0, changed.size, 7):
    bit = np.uint8(1 if dtype == 'bool' else 1 << byte % 8)
    changed.reshape(-1)[byte] ^= bit
    assert checksums.of_tree({'x': changed.view(x.dtype)}) != expected
    changed.reshape(-1)[byte] ^= bit
  assert checksums.of_tree({'x': np.roll(x, 1, 0)}) != expected
  assert checksums.of_tree({'x': np.float64(0.1)}) != checksums.of_tree({'x': np.float64(0.2)})


def flip_a_bit_in_the_largest_file(folder):
  file = max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize('item', ['variables', 'optimizer'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(trained, run, capfd, item):
  flip_a_bit_in_the_largest_file(run / 'checkpoints' / '6' / item)
  loop.run(smoke('pretrain'), run)
  said = capfd.readouterr().err
  assert 'checkpoint 6 is damaged' in said and 'Going on from step 3: 3 steps are done again' in said
  assert (run / 'checkpoints' / 'damaged-6' / item).is_dir()
  assert same(arrays(run), arrays(trained))
  numbers = lambda workdir: [(r['step'], r['loss']) for r in metrics.read(workdir)]
  assert numbers(run) == numbers(trained)


def test_hand_over_takes_a_whole_one_and_says_so(run, capfd):
  flip_a_bit_in_the_largest_file(run / 'checkpoints' / '6' / 'variables')
  assert stages.load_variables(run)[2] == 3
  assert 'is damaged' in capfd.readouterr().err
  assert (run / 'checkpoints' / '6').is_dir()  # somebody else's folder is not touched


def test_an_empty_checkpoint_and_none_that_is_whole(run):
  (run / 'checkpoints' / '99').mkdir()
  assert stages.load_variables(run)[2] == 6
  for step in '36':
    flip_a_bit_in_the_largest_file(run / 'checkpoints' / step / 'variables')
  before = sorted(p.name for p in (run / 'checkpoints').iterdir())
  for read in (stages.load_variables, lambda workdir: loop.run(smoke('pretrain'), workdir)):
    with pytest.raises(UserError, match=r'no checkpoint in .* is whole \(99: .*; 6: .*; 3: .*Nothing was changed'):
      read(run)
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == before


@pytest.mark.parametrize('seed', range(6))
def test_no_damage_ends_in_wrong_numbers(trained, run, seed):
  """A short round of benchmarks/campaign."""
  damage(run / 'checkpoints' / '6', np.random.default_rng(seed))
  expected = {6: arrays(trained), 3: None}
  _, variables, step = stages.load_variables(run)
  assert step in expected and (step == 3 or same(trees.flatten(variables), expected[6]))
  loop.run(smoke('pretrain'), run)
  assert same(arrays(run), expected[6])


def test_an_optimizer_moment_of_another_type_is_converted(run):
  loop.run(smoke('pretrain', optim__first_moment='bfloat16', steps=7), run)
  assert stages.load_variables(run)[2] == 7


def test_the_command_lists_verifies_prunes_and_trusts(run, capsys):
  flip_a_bit_in_the_largest_file(run / 'checkpoints' / '6' / 'variables')
  assert commands.run('checkpoints', ['--from', str(run)]) == 0
  assert commands.run('checkpoints', ['--from', str(run), '--verify']) == 1
  out = capsys.readouterr().out
  assert 'pretrain' in out and 'do not agree with their checksums' in out and out.count('whole') == 1
  assert commands.run('checkpoints', ['--from', str(run), '--prune', '1']) == 0
  assert checkpoint_files.steps(run / 'checkpoints') == [3]
  shutil.rmtree(run / 'checkpoints' / '3' / 'checksums')
  with pytest.raises(UserError, match='checksums are missing.*--trust'):
    stages.load_variables(run)
  assert commands.run('checkpoints', ['--from', str(run), '--trust']) == 0
  loop.run(smoke('pretrain'), run)
  assert stages.load_variables(run)[2] == 6


def test_a_step_that_is_not_the_newest_can_be_opened(tmp_path):
  import beitv2_jax

  loop.run(smoke('tokenizer', checkpoint__every=2, checkpoint__keep=3), tmp_path / 'run')
  newest, early = beitv2_jax.load(tmp_path / 'run'), beitv2_jax.load(f'{tmp_path}/run@2')
  same = lambda a, b: np.array_equal(a.variables['codebook']['quantizer']['embedding'], b.variables['codebook']['quantizer']['embedding'])
  assert not same(newest, early) and same(newest, beitv2_jax.load(f'{tmp_path}/run@6'))
  with pytest.raises(UserError, match='has no checkpoint of step 3; it has 2, 4, 6'):
    beitv2_jax.load(f'{tmp_path}/run@3')
