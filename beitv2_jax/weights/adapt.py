"""A pretraining checkpoint made into the start of a fine-tuning model (official run_class_finetuning.py)."""

from typing import Any

import numpy as np
from scipy.interpolate import RectBivariateSpline

from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import table_size
from beitv2_jax.models.vit import cubic_weights
from beitv2_jax.weights import trees

Grid = tuple[int, int]


def geometric_positions(source: int, target: int) -> np.ndarray:
  """Where the `source` (odd) rows of a bias table lie on an axis of `target` unit steps: spacings grow geometrically
  from the centre so that the outermost row lands on the border. The ratio comes from the official bisection."""
  low, high, count = 1.01, 1.5, source // 2
  while high - low > 1e-6:
    ratio = (low + high) / 2
    if (1 - ratio**count) / (1 - ratio) > target // 2:
      high = ratio
    else:
      low = ratio
  half = np.cumsum(ratio ** np.arange(count))
  return np.concatenate([-half[::-1], [0], half])


def resize_table(table: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
  """Relative position table [rows, H] for another patch grid: bicubic splines over geometric positions; the three [CLS] rows stay."""
  if source == target:
    return table
  if table.shape[0] != table_size(source):
    raise UserError(f'a bias table of {table.shape[0]} rows does not belong to a {source} grid.')
  sizes, wanted = ([2 * g - 1 for g in grid] for grid in (source, target))
  axes = [geometric_positions(s, d) if s != d else np.arange(s) - s // 2 for s, d in zip(sizes, wanted)]
  new = [np.clip(np.arange(d) - d // 2, a[0], a[-1]) for d, a in zip(wanted, axes)]
  body, cls = table[:-3].astype(np.float64).reshape(*sizes, -1), table[-3:]
  maps = [RectBivariateSpline(*axes, body[..., h], kx=3, ky=3, s=0)(*new) for h in range(table.shape[1])]
  return np.concatenate([np.stack(maps, -1).reshape(-1, table.shape[1]).astype(table.dtype), cls])


def resize_positions(table: np.ndarray, source: Grid, target: Grid) -> np.ndarray:
  """Absolute position embedding [1, 1+N, D] for another grid: bicubic at exact size ratios, [CLS] kept."""
  if source == target:
    return table
  rows, cols = (cubic_weights(s, t, t / s) for s, t in zip(source, target))
  body = np.einsum('is,jt,std->ijd', rows, cols, table[0, 1:].reshape(*source, -1))
  return np.concatenate([table[:, :1], body.reshape(1, -1, table.shape[-1]).astype(table.dtype)], 1)


def fit_grid(params: dict[str, Any], source: Grid, target: Grid) -> dict[str, Any]:
  """All position tables of a model, relative and absolute, for another patch grid."""
  resize = {'table': resize_table, 'pos_embed': resize_positions}
  flat = trees.flatten(params)
  return trees.unflatten({k: resize[n](np.asarray(v), source, target) if (n := k.split('/')[-1]) in resize else v for k, v in flat.items()})


def pretrain_to_classifier(params: dict[str, Any], source: Grid, target: Grid) -> dict[str, Any]:
  """Backbone parameters of a pretraining model → those of a Classifier on `target`'s grid.

  The shared bias table is copied into every block and resampled. Mask token, final norm, code head and aggregation blocks
  are left behind: a classifier's `fc_norm` and `head` start fresh, as in the official code.
  """
  backbone = {k: v for k, v in params['backbone'].items() if k not in ('mask_token', 'rel_pos_bias')}
  shared = params['backbone'].get('rel_pos_bias')
  if shared:
    for name in [k for k in backbone if k.startswith('block_')]:
      backbone[name] = backbone[name] | dict(attn=backbone[name]['attn'] | dict(rel_pos_bias=shared))
  return fit_grid({'backbone': backbone}, source, target)
