"""The l2-normalised codebook with EMA updates (paper section 2.1; official norm_ema_quantizer), and three remedies for dead codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.kernels.functions import exact


def l2norm(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """x / max(‖x‖, eps) over the last axis, with a zero rather than a NaN gradient at x = 0."""
  square = jnp.sum(x * x, -1, keepdims=True)
  return x / jnp.maximum(jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0), eps)


def nearest(z: jax.Array, codebook: jax.Array) -> jax.Array:
  """Index of the nearest code: z [..., C], codebook [K, C] → int32 [...]. fp32 always: lower precision moves codes."""
  d = jnp.sum(z * z, -1, keepdims=True) + jnp.sum(codebook * codebook, -1) - 2 * jnp.dot(z, codebook.T, precision=exact())
  return jnp.argmin(d, -1).astype(jnp.int32)


def cluster_sums(z: jax.Array, codes: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Tokens per code [K] and their sum [K, C]. Under jit on a mesh these are sums over the global batch."""
  member = jax.nn.one_hot(codes.reshape(-1), size, dtype=jnp.float32)
  return member.sum(0), jnp.einsum('nk,nc->kc', member, z.reshape(-1, z.shape[-1]), precision=exact())


def ema_update(codebook: jax.Array, counts: jax.Array, sums: jax.Array, decay: float) -> jax.Array:
  """Moves used codes towards the direction of their tokens' mean; unused codes stay exactly where they are."""
  mean = l2norm(sums / jnp.maximum(counts, 1)[:, None])
  moved = l2norm(decay * codebook + (1 - decay) * mean)
  return jnp.where(counts[:, None] > 0, moved, codebook)


def kmeans(samples: jax.Array, means: jax.Array, iterations: int = 10) -> tuple[jax.Array, jax.Array]:
  """Cosine k-means of unit vectors [S, C] from initial means [K, C]: (means, counts of the last assignment)."""

  def step(carry, _):
    means, _ = carry
    codes = jnp.argmax(jnp.dot(samples, means.T, precision=exact()), -1)
    counts, sums = cluster_sums(samples, codes, len(means))
    new = l2norm(sums / jnp.maximum(counts, 1)[:, None])
    return (jnp.where(counts[:, None] > 0, new, means), counts), None

  return jax.lax.scan(step, (means, jnp.zeros(len(means))), None, iterations)[0]


def kmeans_start(key: jax.Array, samples: jax.Array, size: int, max_samples: int = 0) -> tuple[jax.Array, jax.Array]:
  """k-means from `size` random samples; `max_samples` > 0 looks only at that many (the official code sees one
  device's 12,544). With fewer samples than codes, rows are drawn with replacement."""
  count = len(samples)
  if max_samples and max_samples < count:
    key, sub = jax.random.split(key)
    samples = samples[jax.random.permutation(sub, count)[:max_samples]]
    count = max_samples
  rows = jax.random.permutation(key, count)[:size] if count >= size else jax.random.randint(key, (size,), 0, count)
  return kmeans(samples, samples[rows])


def dead(usage: jax.Array, share: float = 0.01) -> jax.Array:
  """Codes [K] that get less than `share` of the average code's tokens, by the EMA of the last few hundred steps."""
  return usage < share * usage.mean()


def revive(key: jax.Array, embedding: jax.Array, usage: jax.Array, z: jax.Array, chance: float) -> tuple[jax.Array, jax.Array]:
  """Dead codes move onto random tokens of this batch, each with probability `chance` a step; their usage restarts at the mean.

  Not in the paper or the official code: for data sets too small to feed 8192 codes.
  """
  which, where = jax.random.split(key)
  chosen = dead(usage) & jax.random.bernoulli(which, chance, usage.shape)
  tokens = z.reshape(-1, z.shape[-1])
  fresh = tokens[jax.random.randint(where, usage.shape, 0, len(tokens))]
  return jnp.where(chosen[:, None], fresh, embedding), jnp.where(chosen, usage.mean(), usage)


def update(
  book: dict[str, jax.Array], counts: jax.Array, sums: jax.Array, decay: float, projection: jax.Array | None = None
) -> dict[str, jax.Array]:
  """The codebook after a training step that assigned `counts` [K] tokens of sum `sums` [K, C] (to the codebook before it).

  Of a `simvq` codebook, that its `projection` after the step gives; a `fsq` one stays as it is (its `sums` are not looked at).
  """
  book = book | dict(usage=decay * book['usage'] + (1 - decay) * counts)
  if projection is not None:
    return book | dict(embedding=projected(book['base'], projection))
  return book if 'levels' in book else book | dict(embedding=ema_update(book['embedding'], counts, sums, decay))


def projected(base: jax.Array, projection: jax.Array) -> jax.Array:
  """The codes of SimVQ [K, C]: a frozen random codebook through one learned matrix, so that all codes move with those in use."""
  return l2norm(jnp.dot(base, projection, precision=exact()))


def fsq_bounds(levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(half widths, offsets, divisors) of FSQ's dimensions: `tanh(x + shift) * half - offset` rounds to the integers of a dimension."""
  count = np.array(levels, np.float32)
  return (count - 1) * 1.001 / 2, np.where(count % 2 == 0, 0.5, 0.0).astype(np.float32), count // 2


def fsq_bound(x: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """Encoder outputs [..., C] → the box in which codes are a grid of `levels` points a dimension, from -1 to about 1 (arXiv 2309.15505)."""
  half, offset, divisor = fsq_bounds(levels)
  return (jnp.tanh(x + np.arctanh(offset / half)) * half - offset) / divisor


def fsq_codes(z: jax.Array, levels: tuple[int, ...]) -> jax.Array:
  """The nearest grid point's number [...], the first dimension counting fastest."""
  digits = jnp.round(z * (np.array(levels) // 2)) + np.array(levels) // 2
  return (digits * np.cumprod([1, *levels[:-1]])).sum(-1).astype(jnp.int32)


def fsq_grid(levels: tuple[int, ...]) -> np.ndarray:
  """All points of the grid, [K, C], in the order of `fsq_codes`."""
  digits = np.arange(np.prod(levels))[:, None] // np.cumprod([1, *levels[:-1]]) % np.array(levels)
  return ((digits - np.array(levels) // 2) / (np.array(levels) // 2)).astype(np.float32)


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
  """`quantized`, whose gradient is passed on to z as it is."""
  return z + jax.lax.stop_gradient(quantized - z)


def rotation(z: jax.Array, quantized: jax.Array) -> jax.Array:
  """`quantized`, whose gradient is turned back by the rotation (and scale) that takes z there (the rotation trick, arXiv 2410.06424)."""
  z_unit, q_unit = jax.lax.stop_gradient((l2norm(z), l2norm(quantized)))
  middle = l2norm(z_unit + q_unit)
  scale = jax.lax.stop_gradient(
    jnp.linalg.norm(quantized, axis=-1, keepdims=True) / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
  )
  along = lambda direction: (z * direction).sum(-1, keepdims=True)
  return scale * (z - 2 * along(middle) * middle + 2 * along(z_unit) * q_unit)


GRADIENTS = dict(straight_through=straight_through, rotation=rotation)


class Quantizer(nn.Module):
  """z [B, N, C] → (codes with a gradient [B, N, C], indices [B, N], commitment loss, counts [K], sums [K, C]).

  | kind    | codes                                               | z                  |
  |---------|-----------------------------------------------------|--------------------|
  | `ema`   | unit vectors that follow their tokens (the paper's) | unit vectors       |
  | `simvq` | a frozen codebook through a learned matrix (arXiv 2411.02038) | unit vectors |
  | `fsq`   | a fixed grid of `levels` points a dimension (arXiv 2309.15505); no commitment loss | `fsq_bound`'s box |

  The `codebook` collection holds `embedding` [K, C], `usage` [K] (EMA of tokens per code, as in the official checkpoints) and `cluster_size`
  [K] (k-means counts); of `simvq` also `base`, of `fsq` also `levels`. A call only reads it; `update` moves it, by what the call returned.
  """

  size: int
  dim: int
  kind: str = 'ema'
  gradient: str = 'straight_through'
  levels: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, z):
    def start():
      return l2norm(jax.random.normal(self.make_rng('params'), (self.size, self.dim)))

    grid = self.kind == 'fsq'
    embedding = self.variable('codebook', 'embedding', (lambda: jnp.asarray(fsq_grid(self.levels))) if grid else start).value
    self.variable('codebook', 'usage', jnp.zeros, (self.size,))
    self.variable('codebook', 'cluster_size', jnp.zeros, (self.size,))
    if grid:
      self.variable('codebook', 'levels', lambda: jnp.array(self.levels, jnp.int32))
    if self.kind == 'simvq':
      base = self.variable('codebook', 'base', lambda: embedding).value
      embedding = projected(base, self.param('projection', lambda _: jnp.eye(self.dim)))
    codes = fsq_codes(z, self.levels) if grid else nearest(z, embedding)
    quantized = embedding[codes]
    commitment = jnp.mean((jax.lax.stop_gradient(quantized) - z) ** 2)
    if self.kind == 'simvq':
      commitment += jnp.mean((quantized - jax.lax.stop_gradient(z)) ** 2)
    counts, sums = cluster_sums(jax.lax.stop_gradient(z), codes, self.size)
    quantized = GRADIENTS[self.gradient](z, jax.lax.stop_gradient(quantized))
    return quantized, codes, 0.0 * commitment if grid else commitment, counts, sums
