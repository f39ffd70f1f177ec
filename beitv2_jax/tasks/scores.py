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


def psnr(drawn: jax.Array, images: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB of images [B, h, w, 3] with values in [0, 1] → [B]. `drawn` is cut to that range."""
  error = jnp.square(jnp.clip(drawn, 0, 1) - images).mean((1, 2, 3))
  return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(drawn: jax.Array, images: jax.Array) -> jax.Array:
  """Structural similarity of images [B, h, w, 3] with values in [0, 1] → [B], as Wang et al. (2004) define it: a Gaussian window of
  11 x 11 (less where an image is smaller) with sigma 1.5, K1 = 0.01, K2 = 0.03, the mean over what the window fits into and over the
  channels."""
  half = min(5, (min(images.shape[1:3]) - 1) // 2)
  x = jnp.arange(-half, half + 1)
  window = jnp.exp(-(x**2) / (2 * 1.5**2))
  window = window / window.sum()

  def blurred(z):  # channels are images of their own
    z = z.transpose(0, 3, 1, 2).reshape(-1, *z.shape[1:3], 1)
    for kernel in (window.reshape(-1, 1, 1, 1), window.reshape(1, -1, 1, 1)):
      z = jax.lax.conv_general_dilated(
        z, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=jax.lax.Precision.HIGHEST
      )
    return z

  a, b = jnp.clip(drawn, 0, 1), images
  mean_a, mean_b = blurred(a), blurred(b)
  var_a, var_b, cov = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2, blurred(a * b) - mean_a * mean_b
  c1, c2 = 0.01**2, 0.03**2
  score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
  return score.reshape(len(images), -1).mean(-1)
