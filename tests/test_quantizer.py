import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models import quantizer
from beitv2_jax.models.quantizer import Quantizer, l2norm


def test_kmeans_reference_numbers():
  """Means and counts as the official k-means gives them for these samples and first means."""
  samples = l2norm(jnp.sin(0.37 * jnp.arange(160.0)).reshape(40, 4))
  means, counts = quantizer.kmeans(samples, samples[:6], 10)
  assert counts.tolist() == [5, 4, 7, 11, 5, 8]
  expected = [
    [0.114551, 0.373886, 0.582616, 0.712493],
    [0.778570, 0.563009, 0.271248, -0.057225],
    [0.222672, -0.159171, -0.519471, -0.809464],
    [-0.570868, -0.567103, -0.486583, -0.340207],
    [-0.591244, -0.150756, 0.310137, 0.729053],
    [0.513399, 0.551507, 0.514971, 0.408737],
  ]
  np.testing.assert_allclose(means, expected, atol=2e-6)


def test_kmeans_start_with_fewer_samples_than_codes_and_with_a_cap():
  samples = l2norm(jax.random.normal(jax.random.key(0), (50, 8)))
  means, counts = quantizer.kmeans_start(jax.random.key(1), samples, 80)
  assert means.shape == (80, 8) and counts.sum() == 50
  np.testing.assert_allclose(jnp.linalg.norm(means, axis=1), 1, atol=1e-6)
  assert quantizer.kmeans_start(jax.random.key(1), samples, 8, max_samples=20)[1].sum() == 20


def test_ema_moves_used_codes_and_leaves_the_others():
  z = l2norm(jax.random.normal(jax.random.key(0), (2, 6, 4)))
  module = Quantizer(16, 4)
  variables = module.init(jax.random.key(1), z)
  before = np.asarray(variables['codebook']['embedding'])
  out, codes, commitment, counts, sums = module.apply(variables, z)
  after = np.asarray(quantizer.update(variables['codebook'], counts, sums, 0.9)['embedding'])
  flat, chosen = np.asarray(z).reshape(-1, 4), np.asarray(codes).ravel()
  np.testing.assert_array_equal(chosen, (flat @ before.T).argmax(1))  # nearest unit vector = largest cosine
  np.testing.assert_allclose(out.reshape(-1, 4), before[chosen], atol=1e-6)  # codes from before the update
  np.testing.assert_allclose(commitment, ((before[chosen] - flat) ** 2).mean(), rtol=1e-5)
  for k in range(16):
    mine = flat[chosen == k]
    if not len(mine):
      np.testing.assert_array_equal(after[k], before[k])
      continue
    direction = mine.mean(0) / np.linalg.norm(mine.mean(0))
    moved = 0.9 * before[k] + 0.1 * direction
    np.testing.assert_allclose(after[k], moved / np.linalg.norm(moved), atol=1e-6)
  assert counts.sum() == 12


def test_straight_through_and_no_gradient_to_the_codebook():
  z = l2norm(jax.random.normal(jax.random.key(0), (1, 3, 4)))
  module = Quantizer(8, 4)
  variables = module.init(jax.random.key(1), z)
  weights = jnp.arange(12.0).reshape(1, 3, 4)
  grad = jax.grad(lambda z: (module.apply(variables, z)[0] * weights).sum())(z)
  np.testing.assert_array_equal(grad, weights)  # as if quantising were the identity
  grads = jax.grad(lambda v: sum(x.sum() for x in module.apply(v, z)[:3:2]))(variables)
  assert not any(g.any() for g in jax.tree.leaves(grads))


def test_l2norm_is_safe_at_zero():
  grad = jax.grad(lambda x: l2norm(x).sum())(jnp.zeros(4))
  assert jnp.isfinite(grad).all()
  np.testing.assert_array_equal(l2norm(jnp.zeros((2, 4))), 0)


@pytest.mark.parametrize('chance', [0.0, 0.05])
def test_a_starved_codebook_recovers_only_with_revival(chance):
  """32 codes, of which 28 point away from all tokens; the tokens have 16 clusters."""
  rng = np.random.default_rng(0)
  centres = np.abs(rng.normal(size=(16, 8)))
  book = np.concatenate([np.abs(rng.normal(size=(4, 8))), -np.abs(rng.normal(size=(28, 8)))])
  embedding, usage = l2norm(jnp.asarray(book, jnp.float32)), jnp.zeros(32)

  @jax.jit
  def step(embedding, usage, z, key):
    codes = quantizer.nearest(z, embedding)
    counts, sums = quantizer.cluster_sums(z, codes, 32)
    usage = 0.9 * usage + 0.1 * counts
    embedding = quantizer.ema_update(embedding, counts, sums, 0.9)
    if chance:
      embedding, usage = quantizer.revive(key, embedding, usage, z, chance)
    return embedding, usage, counts

  for i in range(200):
    z = l2norm(jnp.asarray(centres[rng.integers(0, 16, 256)] + 0.05 * rng.normal(size=(256, 8)), jnp.float32))
    embedding, usage, counts = step(embedding, usage, z, jax.random.key(i))
  alive = 32 - int(quantizer.dead(usage).sum())
  assert alive >= 24 if chance else alive <= 4
  np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=1), 1, atol=1e-5)
