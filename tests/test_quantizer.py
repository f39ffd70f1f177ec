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


def test_fsq_is_the_nearest_point_of_its_grid():
  """Also the reference's: levels 3 and 4 have the values -1, 0, 1 and -1, -1/2, 0, 1/2 (arXiv 2309.15505, appendix A)."""
  levels = (3, 4, 5)
  grid = quantizer.fsq_grid(levels)
  assert grid.shape == (60, 3) and len(np.unique(grid, axis=0)) == 60
  assert [sorted(set(grid[:, i].tolist())) for i in range(3)] == [[-1, 0, 1], [-1, -0.5, 0, 0.5], [-1, -0.5, 0, 0.5, 1]]
  z = quantizer.fsq_bound(3 * jax.random.normal(jax.random.key(0), (500, 3)), levels)
  codes = quantizer.fsq_codes(z, levels)
  np.testing.assert_array_equal(codes, np.argmin(((np.asarray(z)[:, None] - grid) ** 2).sum(-1), 1))
  np.testing.assert_array_equal(quantizer.fsq_codes(jnp.asarray(grid), levels), np.arange(60))
  assert len(np.unique(codes)) > 50
  far = quantizer.fsq_bound(jnp.array([[-1e3] * 3, [1e3] * 3]), levels)
  np.testing.assert_array_equal(quantizer.fsq_codes(far, levels), [0, 59])


def test_fsq_has_no_codebook_to_learn():
  module = Quantizer(60, 3, 'fsq', levels=(3, 4, 5))
  z = quantizer.fsq_bound(jax.random.normal(jax.random.key(0), (2, 7, 3)), (3, 4, 5))
  variables = module.init(jax.random.key(1), z)
  out, codes, commitment, counts, sums = module.apply(variables, z)
  np.testing.assert_allclose(out, quantizer.fsq_grid((3, 4, 5))[codes], atol=1e-6)
  assert commitment == 0 and counts.sum() == 14
  book = quantizer.update(variables['codebook'], counts, sums, 0.9)
  np.testing.assert_array_equal(book['embedding'], variables['codebook']['embedding'])
  np.testing.assert_allclose(book['usage'], 0.1 * counts, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda z: (module.apply(variables, z)[0] * 3).sum())(z), 3)


def test_simvq_moves_every_code_with_those_in_use():
  module = Quantizer(16, 4, 'simvq')
  z = l2norm(jax.random.normal(jax.random.key(0), (2, 6, 4)))
  variables = module.init(jax.random.key(1), z)
  slope = jax.grad(lambda p: module.apply(variables | dict(params=p), z)[2])(variables['params'])['projection']
  moved = variables['params']['projection'] - 0.3 * slope
  _, _, before, counts, sums = module.apply(variables, z)
  after = module.apply(variables | dict(params=dict(projection=moved)), z)[2]
  assert float(after) < float(before)
  book = quantizer.update(variables['codebook'], counts, sums, 0.9, moved)
  unused = np.asarray(counts) == 0
  assert unused.any() and (np.abs(book['embedding'] - variables['codebook']['embedding']).max(1) > 1e-4).all()
  np.testing.assert_array_equal(book['base'], variables['codebook']['base'])
  np.testing.assert_allclose(np.linalg.norm(book['embedding'], axis=1), 1, atol=1e-6)
  # Codes and the gradient of the encoder's side are those of the projected codebook.
  np.testing.assert_array_equal(
    module.apply(variables | dict(params=dict(projection=moved)), z)[1], quantizer.nearest(z, book['embedding'])
  )


def test_the_rotation_trick_turns_the_gradient():
  """Forward the code; backward the gradient is turned with the rotation that takes z to its code, so their angle is kept."""
  rng = np.random.default_rng(0)
  z, q, g = (rng.normal(size=(20, 5)).astype(np.float32) for _ in range(3))
  z, q = np.asarray(l2norm(z)), np.asarray(l2norm(q))
  out, back = jax.vjp(lambda z: quantizer.rotation(z, jnp.asarray(q)), jnp.asarray(z))
  np.testing.assert_allclose(out, q, atol=1e-5)
  (slope,) = back(jnp.asarray(g))
  np.testing.assert_allclose((slope * z).sum(1), (g * q).sum(1), atol=1e-5)  # what lay along the code lies along z
  np.testing.assert_allclose(np.linalg.norm(slope, axis=1), np.linalg.norm(g, axis=1), rtol=1e-4)
  for i in range(20):  # what is at right angles to both is left alone
    basis = np.linalg.qr(np.stack([z[i], q[i]]).T)[0]
    rest = np.eye(5) - basis @ basis.T
    np.testing.assert_allclose(rest @ slope[i], rest @ g[i], atol=1e-5)
  straight = jax.grad(lambda z: (quantizer.straight_through(z, q) * g).sum())(z)
  np.testing.assert_allclose(straight, g)


@pytest.mark.parametrize('name', ['rotation', 'simvq', 'fsq'])
def test_every_quantizer_trains_and_its_codes_are_read_back(name, tmp_path):
  from beitv2_jax.configs import vqkd_b16

  import beitv2_jax
  from beitv2_jax.training import loop, metrics

  config = vqkd_b16.get_config(f'smoke,quantizer={name}').unlock()
  config.update(steps=40, samples=0)
  config.mesh.data, config.layers.scan, config.optim.lr, config.optim.warmup_epochs = 1, True, 3e-3, 0.0
  loop.run(config.lock(), tmp_path)
  rows = metrics.read(tmp_path)
  assert rows[-1]['rec_loss'] < 0.8 * rows[0]['rec_loss']
  model = beitv2_jax.load(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  codes, cosine = model.assignments(images)
  np.testing.assert_array_equal(codes, model.tokens(images))  # by the stored codebook, and by the module
  assert len(np.unique(codes)) > 1


def test_quantizers_that_do_not_fit_are_refused(tmp_path):
  from beitv2_jax.errors import UserError
  from beitv2_jax.training import loop
  from tests.conftest import smoke

  with pytest.raises(UserError, match='levels=.* their product'):
    loop.run(smoke('tokenizer', model__quantizer='fsq', model__levels=(8, 8)), tmp_path)
  with pytest.raises(UserError, match='fsq takes straight_through'):
    loop.run(smoke('tokenizer', model__quantizer='fsq', model__levels=(8, 4), model__code_dim=2, model__gradient='rotation'), tmp_path)
  with pytest.raises(UserError, match='codebook.revive moves codes of an ema codebook'):
    loop.run(smoke('tokenizer', model__quantizer='simvq', codebook__revive=0.01), tmp_path)
