"""Settings: each has a range, and what is outside of it is one line before anything starts."""

import math

import numpy as np
import pytest

from beitv2_jax import config as config_lib
from beitv2_jax import recipes, settings
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop
from benchmarks.campaign import settings as attack
from tests.conftest import smoke

SHIPPED = sorted(p.name for p in recipes.shipped().glob('*_?16.py')) + ['demo.py:stage=teacher', 'demo.py:stage=pretrain']


@pytest.mark.parametrize('recipe', SHIPPED)
def test_every_setting_of_a_shipped_recipe_has_a_range_and_is_in_it(recipe):
  config = recipes.from_arguments([f'--config=configs/{recipe}'])
  assert not [path for path, _ in settings.leaves(config) if settings.rule(path) is None]
  settings.check(config)


@pytest.mark.parametrize(
  'path, value',
  [
    ('checkpoint.every', 0),
    ('checkpoint.keep', 0),
    ('checkpoint.keep', -1),
    ('log_every', 0),
    ('seed', -1),
    ('epochs', math.nan),
    ('steps', -5),
    ('optim.b2', 2.0),
    ('optim.no_decay', ('(',)),
    ('mesh.data', 0),
    ('mesh.rules', (('heads', 'nowhere'),)),
    ('data.crop_scale', (0.0, 1.0)),
    ('data.crop_ratio', (2.0, 1.0)),
    ('data.crop_ratio', (5e-324, 5e-324)),
    ('data.crop_pct', 5e-324),
    ('mask.min_aspect', 1e-9),
    ('data.image_size', {'a': 1}),
    ('mask.min_aspect', 0.0),
    ('model.init_scheme', 'anything'),
    ('model.heads', 3),
    ('model.early_layer', 3),
  ],
)
def test_a_value_out_of_range_is_named(tmp_path, path, value):
  config = smoke('pretrain').unlock()
  *parents, last = path.split('.')
  section = config
  for parent in parents:
    section = section[parent]
  with section.ignore_type():
    section[last] = value
  with pytest.raises(UserError, match=path):
    loop.run(config.lock(), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_segmenter_of_one_patch_is_refused(tmp_path):
  with pytest.raises(UserError, match='data.image_size=8: a segmenter needs at least two patches'):
    loop.run(smoke('segmenter', data__image_size=8), tmp_path)


def test_a_kernel_that_does_not_fit_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'layers.attention=tpu cannot take \d+ images of 17 tokens in heads of 16'):
    loop.run(smoke('tokenizer', layers__attention='tpu', steps=1), tmp_path)


def test_no_momentum_is_a_sensible_setting(tmp_path):
  assert np.isfinite(loop.run(smoke('pretrain', optim__b1=0.0, steps=2), tmp_path)['loss_1'])


def test_random_settings_run_or_are_refused_in_words():
  """A short round of benchmarks/campaign; whether accepted ones train is for the campaign itself."""
  outcomes = set()
  for seed in range(300):
    rng, config = np.random.default_rng(seed), smoke(('tokenizer', 'pretrain', 'classifier', 'segmenter')[seed % 4]).unlock()
    attack.change(config, rng)
    try:
      config_lib.check(config.lock())
      outcomes.add('accepted')
    except UserError as e:
      assert '\n' not in str(e)
      outcomes.add('refused')
  assert outcomes == {'accepted', 'refused'}
