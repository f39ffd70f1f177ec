"""Figures that tasks report while they train and that downstream measures repeat exactly: confusion, IoU, use of a codebook."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.data import scenes


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """int64 [K, K]: pixels of class (row) predicted as (column); label 255 doesn't count."""
  known = label != scenes.IGNORE
  cells = label[known].astype(np.int64) * classes + predicted[known]
  return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def segmentation_scores(matrix: np.ndarray) -> dict[str, Any]:
  """mIoU, mAcc and aAcc in % and the IoU of every class (NaN for one that is nowhere) of a confusion matrix [K, K]."""
  hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
  with np.errstate(invalid='ignore', divide='ignore'):
    iou, acc = 100 * hit / (true + predicted - hit), 100 * hit / true
  return dict(miou=float(np.nanmean(iou)), macc=float(np.nanmean(acc)), aacc=float(100 * hit.sum() / max(matrix.sum(), 1e-9)), iou=iou)


def code_statistics(counts: Any) -> dict[str, Any]:
  """Tokens per code [K] → `codes_used` (share of codes with a token, in %) and `perplexity` (exp of the entropy)."""
  xp = jnp if isinstance(counts, jax.Array) else np
  p = counts / xp.maximum(counts.sum(), 1e-9)
  entropy = -(p * xp.log(xp.maximum(p, 1e-30))).sum()
  return dict(codes_used=100 * (counts > 0).mean(), perplexity=xp.exp(entropy))
