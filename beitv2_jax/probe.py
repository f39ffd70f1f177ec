"""What frozen features are worth: python -m beitv2_jax.probe --from DIR --data folder:PATH

One pass over the images gives [CLS] and the mean of the patches after every block. On these: linear probes of all blocks at once, as BEiT's
own protocol trains them; logistic regression on few labels; k-NN. --attentive adds a pooling that is learned, on the last block's tokens.
--untrained probes the same model with fresh weights: the control.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from beitv2_jax.errors import UserError, one_line

POOLINGS = ('[CLS]', 'mean', 'both')
TOKENS_GIB = 8  # how much of the host's memory the attentive probe's tokens may take


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
  """% test accuracy of the k nearest training images by cosine, votes weighted by exp(cosine / temperature) (DINO's protocol).

  Of training images as near as each other the first counts, of classes with as many votes the first.
  """
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  train, test = unit(np.asarray(train, np.float32)), unit(np.asarray(test, np.float32))
  classes = int(train_labels.max()) + 1
  best = [
    _vote(train, jnp.asarray(train_labels), test[i : i + 1024], min(k, len(train)), temperature, classes) for i in range(0, len(test), 1024)
  ]
  return 100 * float((np.concatenate(best) == test_labels).mean())


@jax.jit(static_argnames=('k', 'classes'))
def _vote(train, labels, test, k, temperature, classes):
  similar, nearest = jax.lax.top_k(jnp.dot(test, train.T, precision='highest'), k)
  votes = jnp.exp(similar / temperature)[..., None] * jax.nn.one_hot(labels[nearest], classes)
  return votes.sum(1).argmax(1)


def scores(train, train_labels, test, test_labels) -> dict[str, float]:
  """`probe`, `probe5` (5 labels a class, mean of 3 draws) and `knn`, in % test accuracy."""
  data = (*standardize(train, test),)
  args = (data[0], train_labels, data[1], test_labels)
  return dict(probe=linear_probe(*args), probe5=few_label_probe(*args), knn=knn(*args))


def _batches(count: int, batch: int, rng: np.random.Generator):
  order = rng.permutation(count)
  for i in range(0, count - batch + 1, batch):
    yield order[i : i + batch]


def layer_probes(train, train_labels, test, test_labels, epochs: int = 100, batch: int = 1024, lr: float | None = None, seed: int = 0):
  """Linear probes of every block and pooling, all at once: % test accuracy [blocks, 3], columns as POOLINGS.

  BEiT's protocol: raw features, weights from N(0, 0.01²), the sum of the cross-entropies, AdamW with decay 1e-4, lr 1e-3·batch/256
  falling by a cosine an epoch. train is [views, n, blocks, 2, D], of which an epoch takes one view; test is [n, blocks, 2, D].
  """
  views, count, blocks, _, width = train.shape
  batch, classes = min(batch, count), int(train_labels.max()) + 1
  lr = 1e-3 * batch / 256 if lr is None else lr
  rng = np.random.default_rng(seed)
  weights = jnp.asarray(rng.normal(0, 0.01, (3, blocks, 2 * width, classes)), jnp.float32)
  params = dict(w=weights, b=jnp.zeros((3, blocks, 1, classes)))
  tx = optax.inject_hyperparams(optax.adamw)(lr, weight_decay=1e-4)
  state = tx.init(params)
  for epoch in tqdm(range(epochs), desc='linear probes', unit=' epochs', leave=False):
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
  for _ in tqdm(range(epochs), desc='attentive probe', unit=' epochs', leave=False):
    for rows in _batches(count, batch, rng):
      params, state = step(params, state, train[rows], train_labels[rows])
  score = jax.jit(logits)
  best = np.concatenate([np.asarray(score(params, test[i : i + batch])).argmax(-1) for i in range(0, len(test), batch)])
  return 100 * float((best == test_labels).mean())


def extract(model: Any, source: Any, view: int | None = None, tokens: bool = False, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, blocks, 2, D], labels [n]) of a labelled source; with `tokens` the last block's, [n, T, D], instead. Half precision.

  The centre crop of every image, or its random crop and flip number `view`. Raises UserError for a source without labels.
  """
  from beitv2_jax.data import pipeline, transforms

  if not source.classes:
    raise UserError('probes need labels: class folders, or a list with labels.')
  d = model.config.data
  size = d.image_size if isinstance(d.image_size, int) else tuple(d.image_size)
  steps = [transforms.CenterCrop(size, 0.875)] if view is None else [transforms.RandomResizedCrop(size), transforms.Flip()]
  features, labels = [], []
  rows = pipeline.eval_batches(source, steps, seed=view or 0, batch=batch, max_bad=0.0)
  for part in tqdm(rows, total=-(-len(source) // batch), unit=' batches', leave=False):
    valid = part['valid']
    if tokens:
      out = model.features(part['image'])
      out = np.concatenate([np.asarray(out['cls'])[:, None], out['patches']], 1)
    else:
      out = np.asarray(model.pooled_layers(part['image']))
    features.append(out[valid].astype(np.float16))
    labels.append(part['label'][valid])
  return np.concatenate(features), np.concatenate(labels)


def table(model: Any, sources: dict, views: int = 0, epochs: int = 100, shots=(1, 5, 10), attentive: bool = False) -> dict[str, Any]:
  """All probes of a model on sources['train'] and sources['eval']: `layers` [blocks, 3] and single figures, in % accuracy."""
  train, train_labels = extract(model, sources['train'])
  test, test_labels = extract(model, sources['eval'])
  seen = np.stack([extract(model, sources['train'], v)[0] for v in range(views)]) if views else train[None]
  layers = layer_probes(seen, train_labels, test, test_labels, epochs)
  last = standardize(train[:, -1, 1].astype(np.float32), test[:, -1, 1].astype(np.float32))
  out = dict(
    layers=layers,
    probe=float(layers.max()),
    probe_layer=int(layers.max(1).argmax()) + 1,
    knn=knn(train[:, -1, 1], train_labels, test[:, -1, 1], test_labels),
  )
  out |= {f'shots_{s}': few_label_probe(last[0], train_labels, last[1], test_labels, labels=s) for s in shots}
  if attentive:
    grid, width = model.grid, train.shape[-1]
    need = (len(train) + len(test)) * (1 + grid[0] * grid[1]) * width * 2 / 2**30
    if need > TOKENS_GIB:
      raise UserError(
        f'the attentive probe would hold {need:.0f} GiB of tokens; it is for sets of up to {TOKENS_GIB} GiB. Use fewer images.'
      )
    tokens = [extract(model, sources[s], tokens=True)[0] for s in ('train', 'eval')]
    out['attentive'] = attentive_probe(tokens[0], train_labels, tokens[1], test_labels)
  return out


@one_line
def main(argv: list[str] | None = None) -> None:
  from beitv2_jax import api
  from beitv2_jax.data import sources
  from beitv2_jax.main import use_compilation_cache

  parser = argparse.ArgumentParser(
    prog='python -m beitv2_jax.probe', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--from', dest='source', required=True, help='a workdir, or a directory made by beitv2_jax.convert')
  parser.add_argument('--data', required=True, help='a labelled source, such as folder:PATH or tfds:imagenet2012')
  parser.add_argument('--data-dir', default='', help='where tfds keeps prepared data sets')
  parser.add_argument('--holdout', type=float, default=0.1, help='share held out where the source has no evaluation split')
  parser.add_argument('--views', type=int, default=0, help='random crops of each training image for the linear probes; 0: its centre crop')
  parser.add_argument('--epochs', type=int, default=100)
  parser.add_argument('--shots', type=int, nargs='*', default=[1, 5, 10], help='labelled images a class')
  parser.add_argument('--attentive', action='store_true')
  parser.add_argument('--untrained', action='store_true', help='the same model with fresh weights')
  parser.add_argument('--json', type=Path, help='also write the figures there')
  args = parser.parse_args(argv)
  use_compilation_cache()
  opened = {s: sources.make(args.data, s, args.data_dir, args.holdout) for s in ('train', 'eval')}
  model = api.load(args.source)
  model = api.Model(model.config) if args.untrained else model
  r = table(model, opened, args.views, args.epochs, args.shots, args.attentive)
  print('linear probe, % top-1\nblock ' + ''.join(f'{p:>9s}' for p in POOLINGS))
  for i, row in enumerate(r['layers'], 1):
    print(f'{i:5d} ' + ''.join(f'{x:9.2f}' for x in row))
  print(f'\nbest linear probe {r["probe"]:.2f} (block {r["probe_layer"]})   k-NN {r["knn"]:.2f}', end='')
  print(
    ''.join(f'   {s} a class {r[f"shots_{s}"]:.2f}' for s in args.shots) + (f'   attentive {r["attentive"]:.2f}' if args.attentive else '')
  )
  if args.json:
    args.json.write_text(json.dumps(r | dict(layers=r['layers'].tolist()), indent=2))


if __name__ == '__main__':
  sys.exit(main())
