"""Schedules and parameter groups against the official utils.cosine_scheduler and optim_factory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beitv2_jax.configs import beitv2_b16, beitv2_l16, vqkd_b16

from beitv2_jax import tasks
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.training import optim, sharding
from beitv2_jax.weights import trees
from tests.conftest import smoke

# (lr, min_lr, warmup epochs, epochs, steps an epoch) and official values at some steps.
SCHEDULES = {
  'vqkd': ((2e-4, 1e-5, 10, 100, 2502), {0: 0, 1: 7.993925e-9, 25019: 2e-4, 25020: 2e-4, 125100: 1.214965e-4}),
  'pretrain 300': (
    (1.5e-3, 1e-5, 10, 300, 625),
    {0: 0, 1: 2.400384e-7, 3125: 7.5012e-4, 6249: 1.5e-3, 6250: 1.5e-3, 96875: 7.55e-4, 187499: 1.00000000112e-5},
  ),
  'pretrain 1600': ((1.5e-3, 1e-5, 10, 1600, 625), {500000: 7.623599e-4, 999999: 1e-5}),
  'finetune': ((5e-4, 1e-6, 20, 100, 1251), {1: 1.998481e-8, 25019: 5e-4, 62550: 3.459795e-4}),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedule(name):
  (lr, min_lr, warmup, epochs, per_epoch), values = SCHEDULES[name]
  schedule = optim.cosine_schedule(lr, min_lr, warmup * per_epoch, epochs * per_epoch)
  for step, value in values.items():
    np.testing.assert_allclose(float(schedule(step)), value, rtol=2e-5, atol=1e-12)


def decayed(task):
  c = smoke(task)
  model, _ = tasks.make(c)
  params = jax.eval_shape(lambda: sharding.unbox(model.init(jax.random.key(0))))['params']
  flags = trees.flatten(optim.decay_mask(params, c.optim.no_decay))
  return {k for k, v in flags.items() if v}


def test_what_decays_in_pretraining():
  blocks = [f'backbone/block_{i}' for i in range(3)] + ['aggregation_0', 'aggregation_1']
  expected = {f'{b}/{w}' for b in blocks for w in ('attn/qkv', 'attn/proj', 'fc1/kernel', 'fc2/kernel')}
  expected |= {'backbone/mask_token', 'backbone/patch_embed/kernel', 'backbone/rel_pos_bias/table', 'lm_head/kernel'}
  assert decayed('pretrain') == expected


def test_what_decays_in_the_tokenizer():
  expected = {f'{side}/vit/patch_embed/kernel' for side in ('encoder', 'decoder')}
  expected |= {f'{h}_head/{fc}/kernel' for h in ('encode', 'decode') for fc in ('fc1', 'fc2')}
  for block in ('encoder/vit/block_0', 'encoder/vit/block_1', 'decoder/vit/block_0'):
    expected |= {f'{block}/{w}' for w in ('attn/qkv', 'attn/proj', 'fc1/kernel', 'fc2/kernel')}
  assert decayed('tokenizer') == expected


def test_layer_wise_decay():
  """Official values of the patch embedding, and every group of a base model."""
  params = sharding.unbox(jax.eval_shape(Classifier(768, 12, 12, 16, (14, 14), 10).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
  for decay, first in ((0.6, 0.00130607), (0.65, 0.00369721), (0.75, 0.02375726)):
    scales = trees.flatten(optim.layer_scales(params['params'], decay))
    np.testing.assert_allclose(scales['backbone/patch_embed/kernel'], first, rtol=3e-6)
    assert scales['backbone/cls_token'] == scales['backbone/patch_embed/kernel']
    for block in range(12):
      mine = {v for k, v in scales.items() if k.startswith(f'backbone/block_{block}/')}
      assert mine == {decay ** (12 - block)}
    assert scales['fc_norm/scale'] == scales['head/kernel'] == 1
  shared = {'backbone': {'rel_pos_bias': {'table': 0}, 'mask_token': 0, 'block_0': {'gamma1': 0}}}
  assert optim.layer_scales(shared, 0.5) == {'backbone': {'rel_pos_bias': {'table': 1.0}, 'mask_token': 0.25, 'block_0': {'gamma1': 0.5}}}


def test_layer_wise_decay_scales_the_step_and_the_weight_decay():
  c = vqkd_b16.get_config().optim.copy_and_resolve_references().unlock()
  c.update(lr=0.1, min_lr=0.1, weight_decay=0.5, layer_decay=0.5)
  tx, _ = optim.make(c, 10, 0)
  params = {'backbone': {'block_0': {'fc1': {'kernel': jnp.ones((2, 2))}}}, 'head': {'kernel': jnp.ones((2, 2))}}
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates['head']['kernel'], -0.1 * (1 + 0.5), rtol=1e-5)
  np.testing.assert_allclose(updates['backbone']['block_0']['fc1']['kernel'], -0.05 * (1 + 0.5), rtol=1e-5)


def test_adamw_step_by_hand():
  """Two steps of p ← p(1 - lr·wd) - lr·m̂/(√v̂ + eps), clipped with torch's 1e-6 in the denominator."""
  c = vqkd_b16.get_config().optim.copy_and_resolve_references().unlock()
  c.update(lr=0.1, min_lr=0.1, clip_norm=1.0, weight_decay=0.5, b1=0.9, b2=0.99)
  tx, schedule = optim.make(c, 10, 0)
  params = {'w': {'kernel': jnp.array([[1.0, -2.0]]), 'bias': jnp.array([0.5])}}
  grads = {'w': {'kernel': jnp.array([[3.0, 4.0]]), 'bias': jnp.array([0.0])}}
  state, p, m, v = tx.init(params), np.array([1.0, -2.0]), 0, 0
  for t in (1, 2):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    g = np.array([3.0, 4.0]) / (5 + 1e-6)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    p = p * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + c.eps)
  np.testing.assert_allclose(params['w']['kernel'][0], p, rtol=1e-5)
  assert params['w']['bias'][0] == 0.5 and float(schedule(3)) == pytest.approx(0.1)


RECIPES = {
  'vqkd': (vqkd_b16, '', dict(batch_size=512, epochs=100, lr=2e-4, min_lr=1e-5, b2=0.99, weight_decay=1e-4, clip_norm=0, warmup_epochs=10)),
  'b1600': (
    beitv2_b16,
    '',
    dict(batch_size=2048, epochs=1600, lr=1.5e-3, min_lr=1e-5, b2=0.999, weight_decay=0.05, clip_norm=3, warmup_epochs=10),
  ),
  'b300': (
    beitv2_b16,
    'epochs=300',
    dict(batch_size=2048, epochs=300, lr=1.5e-3, b2=0.98, weight_decay=0.05, clip_norm=3, drop_path=0, layer_scale=0.1, early_layer=9),
  ),
  'l1600': (
    beitv2_l16,
    '',
    dict(epochs=1600, drop_path=0.1, layer_scale=1e-5, width=1024, depth=24, heads=16, early_layer=21, head_layers=2, b2=0.999),
  ),
  'l300': (beitv2_l16, 'epochs=300', dict(epochs=300, drop_path=0, layer_scale=1e-5, depth=24, b2=0.98, count=75, min_block=16)),
}


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_the_official_ones(name):
  module, arg, fields = RECIPES[name]
  c = module.get_config(arg)
  flat = {}
  for part in (c, c.optim, c.model, c.get('mask', {})):
    flat |= dict(part)
  for key, value in fields.items():
    assert flat[key] == pytest.approx(value), key
  assert c.data.crop_scale == ((0.08, 1.0) if name == 'vqkd' else (0.2, 1.0)) and c.optim.eps == 1e-8 and c.optim.b1 == 0.9


def test_the_first_moment_in_bf16_follows_the_exact_one():
  params = dict(w=jnp.ones((4, 8)))
  paths = []
  for kind in ('float32', 'bfloat16'):
    tx = optim.scale_by_adam(0.9, 0.999, 1e-8, jnp.dtype(kind))
    state, updates = tx.init(params), []
    for i in range(20):
      grads = dict(w=jax.random.normal(jax.random.key(i), (4, 8)))
      update, state = tx.update(grads, state)
      updates.append(update['w'])
    assert state.mu['w'].dtype == kind and state.nu['w'].dtype == jnp.float32
    paths.append(np.stack(updates))
  np.testing.assert_allclose(paths[1], paths[0], atol=0.02)
  assert np.abs(paths[1] - paths[0]).max() > 0


def test_the_norm_of_all_arrays():
  rng = np.random.default_rng(0)
  tree = {str(i): jnp.asarray(rng.normal(size=shape), jnp.float32) for i, shape in enumerate([(3, 4), (4, 3), (3, 4), (5,), (5,), (), ()])}
  np.testing.assert_allclose(optim.global_norm(tree), optax.global_norm(tree), rtol=1e-6)
