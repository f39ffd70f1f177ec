"""Resampled tables against numbers of the official code (scipy's interp2d, which it used, is the same spline)."""

import numpy as np
import pytest

from beitv2_jax.models import layers
from beitv2_jax.weights import adapt


def resized(values, target):
  """A 27 x 27 table (14 x 14 patches) of `values` with CLS rows 7, 8, 9 → [side, side]."""
  table = np.concatenate([values.reshape(-1, 1), [[7], [8], [9]]])
  out = adapt.resize_table(table, (14, 14), (target, target))
  assert out[-3:].ravel().tolist() == [7, 8, 9]
  return out[:-3, 0].reshape(2 * target - 1, -1)


i, j = np.meshgrid(np.arange(27), np.arange(27), indexing='ij')
ROUGH, SMOOTH = ((31 * i + 17 * j) % 29) / 29, np.sin(0.3 * i) + np.cos(0.2 * j)


def test_geometric_resampling():
  to47, to63 = resized(ROUGH, 24), resized(ROUGH, 32)
  at = lambda x, *cells: [x[c] for c in cells]
  np.testing.assert_allclose(
    at(to47, (0, 1), (1, 0), (23, 23), (23, 28), (5, 15), (46, 46)), [0.604181, 0.023767, 0.517241, 0.879214, 0.284346, 0.034483], atol=2e-6
  )
  np.testing.assert_allclose(to47.sum(), 1066.8921, atol=2e-3)
  np.testing.assert_allclose(
    at(to63, (0, 0), (0, 1), (1, 0), (31, 31), (31, 36), (5, 21)), [0.000114, 0.472591, 0.014513, 0.517241, 0.886870, 0.491795], atol=2e-6
  )
  np.testing.assert_allclose(to63.sum(), 1917.5194, atol=2e-3)
  smooth = resized(SMOOTH, 24)
  np.testing.assert_allclose(at(smooth, (0, 1), (1, 0), (23, 23)), [0.997598, 1.102798, -1.544655], atol=2e-6)
  np.testing.assert_allclose([smooth.sum(), resized(SMOOTH, 32).sum()], [633.9162, 1638.3965], atol=2e-3)


@pytest.mark.parametrize(
  'side, ratio', [(12, 1.0100009), (16, 1.0234928), (24, 1.0903074), (30, 1.1250559), (32, 1.1349178), (40, 1.1685036)]
)
def test_ratio(side, ratio):
  x = adapt.geometric_positions(27, 2 * side - 1)
  assert len(x) == 27 and x[13] == 0 and x[14] == 1 and (x == -x[::-1]).all()
  assert (x[15] - x[14]) == pytest.approx(ratio, abs=1e-7)


def test_grids_that_are_not_square_and_the_same_grid():
  table = np.random.default_rng(0).normal(size=(layers.table_size((4, 6)), 2))
  assert adapt.resize_table(table, (4, 6), (4, 6)) is table
  out = adapt.resize_table(table, (4, 6), (4, 9))
  assert out.shape == (layers.table_size((4, 9)), 2)
  kept = out[:-3].reshape(7, 17, 2)[:, 8]  # no horizontal offset: the centre column stays where it is
  np.testing.assert_allclose(kept, table[:-3].reshape(7, 11, 2)[:, 5], atol=1e-9)


def test_pretraining_becomes_a_classifier():
  table = np.random.default_rng(0).normal(size=(layers.table_size((2, 2)), 2))
  block = dict(attn=dict(qkv=1), gamma1=2)
  params = dict(backbone=dict(cls_token=0, mask_token=0, rel_pos_bias=dict(table=table), block_0=block, block_1=block), norm=3, lm_head=4)
  out = adapt.pretrain_to_classifier(params, (2, 2), (2, 2))
  assert out.keys() == {'backbone'} and out['backbone'].keys() == {'cls_token', 'block_0', 'block_1'}
  for name in ('block_0', 'block_1'):
    np.testing.assert_array_equal(out['backbone'][name]['attn']['rel_pos_bias']['table'], table)
  assert 'rel_pos_bias' not in params['backbone']['block_0']['attn']  # the source is not changed
