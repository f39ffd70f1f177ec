import numpy as np
import pytest
from scipy.optimize import minimize

from beitv2_jax.downstream import probes


def blobs(n, seed, spread=0.5):
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  return (np.eye(3, 5)[labels] * 2 + spread * rng.normal(size=(n, 5))).astype(np.float32), labels


def test_linear_probe_finds_the_optimum():
  x, y = blobs(60, 0)
  w, b = probes.fit_linear(x, y, 3, decay=0.1)

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
  good = probes.scores(x, y, test, test_y)
  noise = probes.scores(np.random.default_rng(2).normal(size=x.shape), y, test, test_y)
  assert all(v > 90 for v in good.values()) and all(v < 60 for v in noise.values())


def test_knn_by_hand():
  train = np.array([[1, 0.0], [0.9, 0.1], [0, 1.0], [0.1, 0.9], [0, -1]])
  labels = np.array([0, 0, 1, 1, 2])
  test = np.array([[2, 0.1], [0.1, 3], [0.0, -5]])
  assert probes.knn(train, labels, test, np.array([0, 1, 2]), k=1) == 100
  assert probes.knn(train, labels, test, np.array([0, 1, 0]), k=1) == pytest.approx(200 / 3)


def test_knn_ties():
  """Of images as near as each other the first counts; of classes with as many votes the first wins."""
  train = np.array([[1.0, 0], [1.0, 0], [1.0, 0], [0, 1.0]])
  test = np.array([[2.0, 0]])
  for labels, k, winner in (([1, 0, 0, 2], 1, 1), ([1, 0, 0, 2], 2, 0), ([2, 1, 0, 0], 3, 0), ([1, 0, 0, 2], 3, 0)):
    assert probes.knn(train, np.array(labels), test, np.array([winner]), k=k) == 100


def test_layer_probes_find_the_block_and_the_pooling_that_knows():
  x, y = blobs(300, 0)
  test, test_y = blobs(120, 1)

  def features(x, seed):
    """Noise everywhere but in the second block's mean."""
    f = np.random.default_rng(seed).normal(size=(len(x), 3, 2, 5)).astype(np.float32)
    f[:, 1, 1] = x
    return f

  scores = probes.layer_probes([features(x, 5)], y, features(test, 6), test_y, epochs=60, batch=100, lr=0.05)
  assert scores.shape == (3, 3) and scores[1, 1] > 90 and scores[1, 2] > 85
  noise = np.delete(scores.ravel(), [4, 5])
  assert noise.max() < 60


def test_attentive_probe_finds_the_token_that_knows():
  """The class stands in one token, at another place in every image; the mean over tokens drowns it in noise."""
  x, y = blobs(400, 0, spread=0.2)
  test, test_y = blobs(100, 1, spread=0.2)

  def tokens(x, seed):
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(len(x), 12, 6)).astype(np.float32) * 0.7
    out[..., 5] = 0
    place = rng.integers(0, 12, len(x))
    out[np.arange(len(x)), place, :5] = 2 * x
    out[np.arange(len(x)), place, 5] = 5  # a mark to find it by
    return out

  score = probes.attentive_probe(tokens(x, 2), y, tokens(test, 3), test_y, heads=1, epochs=60, batch=100, lr=0.02)
  assert score > 85
