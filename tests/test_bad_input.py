"""Bad input is one line, early, and leaves nothing behind."""

import pytest
from beitv2_jax.configs import demo

from beitv2_jax import recipes
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop
from tests.conftest import run_main, smoke

BAD = {
  'unknown config key': (['--config=configs/vqkd_b16.py:smoke', '--config.optim.learning_rate=1'], 'learning_rate'),
  'missing config': (['--config=configs/nothing.py'], 'configs/nothing.py'),
  'wrong tokenizer path': (['--config=configs/beitv2_b16.py:smoke', '--config.tokenizer_from=/nowhere'], 'there is no folder /nowhere'),
  'batch does not divide': (['--config=configs/vqkd_b16.py:smoke', '--config.batch_size=15'], 'batch_size=15 does not divide'),
  'image size': (['--config=configs/vqkd_b16.py:smoke', '--config.data.image_size=30'], 'not a multiple of model.patch_size=8'),
  'no teacher': (['--config=configs/demo.py:stage=vqkd', '--config.teacher.name=/tmp'], 'no teacher in /tmp'),
  'recipe argument': (['--config=configs/vqkd_b16.py:smok'], 'unknown recipe argument'),
  'nearly a config key': (['--config=configs/vqkd_b16.py:smoke', '--config.step=3'], 'Did you mean steps?'),
  'a folder by its name': (['--config=configs/vqkd_b16.py:smoke', '--config.data.source=/tmp'], 'Did you mean folder:/tmp?'),
  'recipe teacher': (['--config=configs/vqkd_b16.py:teacher=clap'], 'recipe argument teacher=clap: one of clip'),
  'recipe stage': (['--config=configs/demo.py:stage=tokenizer'], 'recipe argument stage=tokenizer: one of teacher, vqkd'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_found_before_anything_is_written(tmp_path, name):
  args, words = BAD[name]
  with pytest.raises(UserError) as error:
    loop.run(recipes.from_arguments(args + ['--config.mesh.data=1'] * ('divide' not in words)), tmp_path / 'run')
  assert words in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_sides_of_an_image_where_only_squares_or_equal_patches_will_do(tmp_path):
  clip = demo.get_config('stage=teacher').unlock()
  patches = smoke('pretrain', tokenizer_from='untrained', model__patch_size=16).unlock()
  for config in (clip, patches):
    with config.data.ignore_type():
      config.data.image_size = (32, 64)
  with pytest.raises(UserError, match=r'data.image_size=\(32, 64\): a CLIP takes squares'):
    loop.run(clip, tmp_path / 'run')
  with pytest.raises(UserError, match='has patches of 8 px, this model of 16'):
    loop.run(patches, tmp_path / 'run')


def test_bad_input_is_one_line(tmp_path):
  for args, words in (BAD['unknown config key'], BAD['wrong tokenizer path']):
    done = run_main(*args, f'--workdir={tmp_path}/run')
    assert done.returncode == 2, done.stderr[-2000:]
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith('error: ') and not (tmp_path / 'run').exists()


def test_missing_workdir_is_one_line():
  done = run_main('--config=configs/vqkd_b16.py:smoke')
  assert done.returncode == 2 and done.stderr.startswith('error: give --workdir=DIR')
  done = run_main('--config=configs/vqkd_b16.py:smoke', '--workdir=s3://bucket/run')
  assert done.returncode == 2 and done.stderr.startswith('error: s3://bucket/run: give a directory')
