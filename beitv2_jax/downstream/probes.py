"""What frozen features are worth: probes on [CLS] and the mean of the patches after every block (downstream/features.py).

Linear probes of all blocks at once, as BEiT's own protocol trains them; logistic regression on few labels; k-NN; and, on the last
block's tokens, a pooling that is learned. Features may lie on disk (numpy.memmap): no probe reads all of them at once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from beitv2_jax.progress import bar

POOLINGS = ('[CLS]', 'mean', 'both')
CHUNK = 65_536  # images whose features are in memory at once


def standard_error(percent: float, count: int) -> float:
  """Of an accuracy in % over `count` images: how far chance alone moves it (one standard deviation)."""
  return (percent * (100 - percent) / max(count, 1)) ** 0.5


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both [n, D] to the mean 0 and deviation 1 of the training features."""
  mean, std = moments(train)
  return (train - mean) / std, (test - mean) / std


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean, deviation + 1e-6) [D] of features [n, D], some rows at a time."""
  total, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
  for i in range(0, len(x), CHUNK):
    part = np.asarray(x[i : i + CHUNK], np.float64)
    total, squares = total + part.sum(0), squares + np.square(part).sum(0)
  mean = total / len(x)
  std = np.sqrt(np.maximum(squares / len(x) - mean * mean, 0))
  return mean.astype(np.float32), (std + 1e-6).astype(np.float32)


def fit_linear(x: np.ndarray, y: np.ndarray, classes: int, decay: float = 1e-3, steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
  """Multinomial logistic regression by L-BFGS: minimises mean cross-entropy + decay/2·‖W‖². Returns (W [D, k], b [k]).

  scipy walks, XLA computes value and gradient: a solver inside the program would take seconds to compile for every shape.
  """
  features, labels, width = jnp.asarray(x, jnp.float32), jnp.asarray(y), x.shape[1]

  def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = _logistic(jnp.asarray(flat.reshape(width + 1, classes), jnp.float32), features, labels, decay)
    return float(value), np.asarray(grad, np.float64).ravel()

  best = optimize.minimize(objective, np.zeros((width + 1) * classes), jac=True, method='L-BFGS-B', options=dict(maxiter=steps)).x
  weights = best.reshape(width + 1, classes).astype(np.float32)
  return weights[:-1], weights[-1]


@jax.jit
@jax.value_and_grad
def _logistic(weights, x, y, decay):
  """Loss of weights [D + 1, k], whose last row is the bias."""
  logits = jnp.dot(x, weights[:-1], precision='highest') + weights[-1]
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + decay / 2 * (weights[:-1] ** 2).sum()


def linear_probe(train, train_labels, test, test_labels, decay: float = 1e-3) -> float:
  """% test accuracy of a linear classifier on frozen features."""
  w, b = fit_linear(train, train_labels, int(train_labels.max()) + 1, decay)
  return 100 * float(((np.asarray(test, np.float32) @ w + b).argmax(-1) == test_labels).mean())


def few_label_probe(train, train_labels, test, test_labels, labels: int = 5, draws: int = 3, mean=0.0, std=1.0) -> float:
  """Mean % test accuracy over `draws` random choices of `labels` training images a class.

  `mean` and `std` standardise the chosen ones, where `train` is not standardised already; `test` always is.
  """
  accuracies = []
  for draw in range(draws):
    rng = np.random.default_rng(draw)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(train_labels == c))[:labels] for c in np.unique(train_labels)])
    some = (np.asarray(train[chosen], np.float32) - mean) / std
    accuracies.append(linear_probe(some, train_labels[chosen], test, test_labels, decay=1e-2))
  return float(np.mean(accuracies))


def knn(train, train_labels, test, test_labels, k: int = 20, temperature: float = 0.07) -> float:
  """% test accuracy of the k nearest training images by cosine, votes weighted by exp(cosine / temperature) (DINO's protocol).

  Of training images as near as each other the first counts, of classes with as many votes the first.
  """
  classes, k = int(train_labels.max()) + 1, min(k, len(train))
  test = _unit(test)
  similar = np.full((len(test), k), -np.inf, np.float32)
  labels = np.zeros((len(test), k), np.int32)
  for start in range(0, len(train), CHUNK):
    some, some_labels = _unit(train[start : start + CHUNK]), jnp.asarray(train_labels[start : start + CHUNK], jnp.int32)
    for i in range(0, len(test), 1024):
      rows = slice(i, i + 1024)
      similar[rows], labels[rows] = _nearest(some, some_labels, test[rows], similar[rows], labels[rows])
  return 100 * float((np.asarray(_vote(similar, labels, temperature, classes)) == test_labels).mean())


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit
def _nearest(train, train_labels, test, similar, labels):
  """The k best, [n, k], of those found before and some more training images; the earlier of equals."""
  found = jnp.concatenate([similar, jnp.dot(test, train.T, precision='highest')], 1)
  names = jnp.concatenate([labels, jnp.broadcast_to(train_labels, (len(test), len(train_labels)))], 1)
  best, where = jax.lax.top_k(found, similar.shape[1])
  return best, jnp.take_along_axis(names, where, 1)


@jax.jit(static_argnames='classes')
def _vote(similar, labels, temperature, classes):
  add = lambda votes, one: (votes + jnp.exp(one[0] / temperature)[:, None] * jax.nn.one_hot(one[1], classes), None)
  return jax.lax.scan(add, jnp.zeros((len(similar), classes)), (similar.T, labels.T))[0].argmax(1)


def scores(train, train_labels, test, test_labels) -> dict[str, float]:
  """`probe`, `probe5` (5 labels a class, mean of 3 draws) and `knn`, in % test accuracy."""
  data = (*standardize(train, test),)
  args = (data[0], train_labels, data[1], test_labels)
  return dict(probe=linear_probe(*args), probe5=few_label_probe(*args), knn=knn(*args))


def _batches(count: int, batch: int, rng: np.random.Generator):
  """Rows of random batches, in order within one: features on disk are read forwards."""
  order = rng.permutation(count)
  for i in range(0, count - batch + 1, batch):
    yield np.sort(order[i : i + batch])


def layer_probes(train, train_labels, test, test_labels, epochs: int = 100, batch: int = 1024, lr: float | None = None, seed: int = 0):
  """Linear probes of every block and pooling, all at once: % test accuracy [blocks, 3], columns as POOLINGS.

  BEiT's protocol: raw features, weights from N(0, 0.01²), the sum of the cross-entropies, AdamW with decay 1e-4, lr 1e-3·batch/256
  falling by a cosine an epoch. train is a list of views [n, blocks, 2, D], of which an epoch takes one; test is [n, blocks, 2, D].
  """
  (count, blocks, _, width), views = train[0].shape, len(train)
  batch, classes = min(batch, count), int(train_labels.max()) + 1
  lr = 1e-3 * batch / 256 if lr is None else lr
  rng = np.random.default_rng(seed)
  weights = jnp.asarray(rng.normal(0, 0.01, (3, blocks, 2 * width, classes)), jnp.float32)
  params = dict(w=weights, b=jnp.zeros((3, blocks, 1, classes)))
  tx = optax.inject_hyperparams(optax.adamw)(lr, weight_decay=1e-4)
  state: Any = tx.init(params)
  for epoch in bar(range(epochs), 'epochs', title='linear probes'):
    state.hyperparams['learning_rate'] = jnp.asarray(0.5 * lr * (1 + math.cos(math.pi * epoch / epochs)))
    for rows in _batches(count, batch, rng):
      params, state = _probe_step(tx.update, params, state, train[epoch % views][rows], train_labels[rows])
  best = [np.asarray(_probe_logits(params, test[i : i + 1024]).argmax(-1)) for i in range(0, len(test), 1024)]
  return 100 * (np.concatenate(best, 2) == test_labels).mean(2).T


def _probe_logits(params, x):
  """[3, blocks, n, classes] from features [n, blocks, 2, D]: a pooling sees the other one's half as zeros."""
  x = jnp.asarray(x, jnp.float32).transpose(1, 0, 2, 3)
  use = jnp.array([[1, 0], [0, 1], [1, 1]], jnp.float32)[:, None, None, :, None]
  x = (x[None] * use).reshape(3, *x.shape[:2], -1)
  return jnp.einsum('pbnf,pbfk->pbnk', x, params['w']) + params['b']


@functools.partial(jax.jit, static_argnums=0)
def _probe_step(update, params, state, x, labels):
  def loss(params):
    logits = _probe_logits(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels, logits.shape[:-1])).mean(-1).sum()

  updates, state = update(jax.grad(loss)(params), state, params)
  return optax.apply_updates(params, updates), state


def attentive_probe(
  train, train_labels, test, test_labels, heads: int = 8, epochs: int = 20, batch: int = 256, lr: float = 1e-3, seed: int = 0
):
  """% test accuracy of a classifier on tokens [n, T, D] that `heads` learned queries pool, each over its share of the channels."""
  (count, _, width), classes, rng = train.shape, int(train_labels.max()) + 1, np.random.default_rng(seed)
  heads, batch = math.gcd(heads, width), min(batch, count)
  draw = lambda *shape: jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)
  params = dict(
    query=draw(heads, width // heads), key=draw(width, width), value=draw(width, width), w=draw(width, classes), b=jnp.zeros(classes)
  )
  steps = epochs * (count // batch)
  tx = optax.adamw(optax.cosine_decay_schedule(lr, steps), weight_decay=0.05)

  def logits(params, x):
    x = jnp.asarray(x, jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    scores = jnp.einsum('nthe,he->nht', split(x @ params['key']), params['query']) * (width // heads) ** -0.5
    pooled = jnp.einsum('nht,nthe->nhe', jax.nn.softmax(scores), split(x @ params['value']))
    return pooled.reshape(len(x), -1) @ params['w'] + params['b']

  @jax.jit
  def step(params, state, x, y):
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in bar(range(epochs), 'epochs', title='attentive probe'):
    for rows in _batches(count, batch, rng):
      params, state = step(params, state, train[rows], train_labels[rows])
  score = jax.jit(logits)
  best = np.concatenate([np.asarray(score(params, test[i : i + batch])).argmax(-1) for i in range(0, len(test), batch)])
  return 100 * float((best == test_labels).mean())
