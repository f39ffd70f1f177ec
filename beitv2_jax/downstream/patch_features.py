"""What the features of patches have in common: principal components as colours, and similarity to one patch."""

import numpy as np


def principal_colors(features: np.ndarray, components: int = 3) -> np.ndarray:
  """Features [B, Gh, Gw, D] as colours, uint8 [B, Gh, Gw, components]: their first principal components over all of B.

  Each is stretched so that its 1st percentile is 0 and its 99th is 255. Its sign, which is arbitrary, is the one that makes the largest
  weight positive.
  """
  x = np.asarray(features, np.float64)
  flat = x.reshape(-1, x.shape[-1])
  return colored(flat, *principal_components(flat, components)).reshape(*x.shape[:-1], -1)


def principal_components(x: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(mean [D], directions [D, count], 1st and 99th percentile along them [2, count]) of features [n, D]."""
  mean = x.mean(0)
  x = x - mean
  _, vectors = np.linalg.eigh(x.T @ x / len(x))  # eigenvalues rise
  vectors = vectors[:, ::-1][:, :count]
  vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
  return mean, vectors, np.percentile(x @ vectors, [1, 99], axis=0)


def colored(x: np.ndarray, mean: np.ndarray, vectors: np.ndarray, span: np.ndarray) -> np.ndarray:
  """Features [n, D] as uint8 [n, count], by what `principal_components` gave."""
  low, high = span
  return np.rint(255 * np.clip(((x - mean) @ vectors - low) / np.maximum(high - low, 1e-12), 0, 1)).astype(np.uint8)


def similarity(features: np.ndarray, row: int, column: int) -> np.ndarray:
  """Cosine of each patch of an image to the one at (row, column): features [Gh, Gw, D] → [Gh, Gw] in [-1, 1]."""
  x = np.asarray(features, np.float64)
  x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return x @ x[row, column]
