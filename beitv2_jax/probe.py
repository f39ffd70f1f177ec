"""What frozen features are worth: linear probe, few-label probe and k-NN on pooled features.

Features [n, D] are standardised with the training set's statistics first. Everything is exact and full-batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  mean, std = train.mean(0), train.std(0)
  return (train - mean) / (std + 1e-6), (test - mean) / (std + 1e-6)


def fit_linear(x: np.ndarray, y: np.ndarray, classes: int, decay: float = 1e-3, steps: int = 200) -> tuple[jax.Array, jax.Array]:
  """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + decay/2·‖W‖². Returns (W [D, k], b [k])."""
  x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
  return _fit(x, y, jnp.zeros((x.shape[1], classes)), decay, steps)


@jax.jit(static_argnames='steps')
def _fit(x, y, weights, decay, steps):
  def loss(params):
    w, b = params
    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b, y).mean() + decay / 2 * (w * w).sum()

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    params, state = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    return (optax.apply_updates(params, updates), state), None

  params = (weights, jnp.zeros(weights.shape[1]))
  return jax.lax.scan(step, (params, solver.init(params)), None, steps)[0][0]


def linear_probe(train, train_labels, test, test_labels, decay: float = 1e-3) -> float:
  """% test accuracy of a linear classifier on frozen features."""
  w, b = fit_linear(train, train_labels, int(train_labels.max()) + 1, decay)
  return 100 * float((np.asarray(jnp.asarray(test) @ w + b).argmax(-1) == test_labels).mean())


def few_label_probe(train, train_labels, test, test_labels, labels: int = 5, draws: int = 3) -> float:
  """Mean % test accuracy over `draws` random choices of `labels` training images a class."""
  scores = []
  for draw in range(draws):
    rng = np.random.default_rng(draw)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(train_labels == c))[:labels] for c in np.unique(train_labels)])
    scores.append(linear_probe(train[chosen], train_labels[chosen], test, test_labels, decay=1e-2))
  return float(np.mean(scores))


def knn(train, train_labels, test, test_labels, k: int = 20, temperature: float = 0.07) -> float:
  """% test accuracy of the k nearest training images by cosine, votes weighted by exp(cosine / temperature)."""
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  similar = unit(test) @ unit(train).T
  nearest = np.argsort(-similar, 1, kind='stable')[:, :k]
  weights = np.exp(np.take_along_axis(similar, nearest, 1) / temperature)
  votes = np.zeros((len(test), int(train_labels.max()) + 1))
  np.add.at(votes, (np.arange(len(test))[:, None], train_labels[nearest]), weights)
  return 100 * float((votes.argmax(1) == test_labels).mean())


def scores(train, train_labels, test, test_labels) -> dict[str, float]:
  """`probe`, `probe5` (5 labels a class, mean of 3 draws) and `knn`, in % test accuracy."""
  data = (*standardize(train, test),)
  args = (data[0], train_labels, data[1], test_labels)
  return dict(probe=linear_probe(*args), probe5=few_label_probe(*args), knn=knn(*args))
