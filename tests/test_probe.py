import numpy as np
import pytest
from scipy.optimize import minimize

from beitv2_jax import probe


def blobs(n, seed, spread=0.5):
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  return (np.eye(3, 5)[labels] * 2 + spread * rng.normal(size=(n, 5))).astype(np.float32), labels


def test_linear_probe_finds_the_optimum():
  x, y = blobs(60, 0)
  w, b = probe.fit_linear(x, y, 3, decay=0.1)

  def loss(flat):
    logits = x @ flat[:15].reshape(5, 3) + flat[15:]
    logits = logits - logits.max(1, keepdims=True)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(60), y]
    return nll.mean() + 0.05 * (flat[:15] ** 2).sum()

  best = minimize(loss, np.zeros(18), tol=1e-10)
  assert loss(np.concatenate([np.ravel(w), np.ravel(b)])) == pytest.approx(best.fun, rel=1e-4)


def test_scores_separate_signal_from_noise():
  x, y = blobs(90, 0)
  test, test_y = blobs(60, 1)
  good = probe.scores(x, y, test, test_y)
  noise = probe.scores(np.random.default_rng(2).normal(size=x.shape), y, test, test_y)
  assert all(v > 90 for v in good.values()) and all(v < 60 for v in noise.values())


def test_knn_by_hand():
  train = np.array([[1, 0.0], [0.9, 0.1], [0, 1.0], [0.1, 0.9], [0, -1]])
  labels = np.array([0, 0, 1, 1, 2])
  test = np.array([[2, 0.1], [0.1, 3], [0.0, -5]])
  assert probe.knn(train, labels, test, np.array([0, 1, 2]), k=1) == 100
  assert probe.knn(train, labels, test, np.array([0, 1, 0]), k=1) == pytest.approx(200 / 3)
