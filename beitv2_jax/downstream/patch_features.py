"""What the features of patches have in common: principal components as colours, and similarity to one patch."""

import numpy as np


def principal_colors(features: np.ndarray, components: int = 3) -> np.ndarray:
  """Features [B, Gh, Gw, D] as colours, uint8 [B, Gh, Gw, components]: their first principal components over all of B.

  Each is stretched so that its 1st percentile is 0 and its 99th is 255. Its sign, which is arbitrary, is the one that makes the largest
  weight positive.
  """
  x = np.asarray(features, np.float64)
  flat = x.reshape(-1, x.shape[-1])
  flat = flat - flat.mean(0)
  _, vectors = np.linalg.eigh(flat.T @ flat / len(flat))  # eigenvalues rise
  vectors = vectors[:, ::-1][:, :components]
  vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
  projected = flat @ vectors
  low, high = np.percentile(projected, [1, 99], axis=0)
  stretched = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
  return np.rint(255 * stretched).astype(np.uint8).reshape(*x.shape[:-1], -1)


def similarity(features: np.ndarray, row: int, column: int) -> np.ndarray:
  """Cosine of each patch of an image to the one at (row, column): features [Gh, Gw, D] → [Gh, Gw] in [-1, 1]."""
  x = np.asarray(features, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return x @ x[row, column]
