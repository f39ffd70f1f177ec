"""Outputs, losses and gradients of the official PyTorch models, computed once with weights that a formula defines.

Tensor n (in the sorted list of official parameter names) holds 0.3·sin(1 + 0.7n + 0.3k + 0.01k²) at flat index k, plus 1 for norm
weights and plus 0.5 for layer scale. The weights go through the same map as imported checkpoints.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beitv2_jax.models import quantizer
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MIM
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.training import sharding
from beitv2_jax.weights import official, trees

HEADS = dict(encoder=2, decoder=2)
TOLERANCE = 2e-5


def images():
  a = np.arange(2 * 3 * 32 * 32, dtype=np.float64)
  x = (0.5 + 0.5 * np.sin(0.05 * a + 0.0007 * a * a)).reshape(2, 3, 32, 32)
  return jnp.asarray(2 * x - 1, jnp.float32).transpose(0, 2, 3, 1)


def formula_weights(kind, module, *args, count):
  """Our variables with the formula's values, by way of the official names and layouts."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
  blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), sharding.unbox(shapes))
  names = {k: v.shape for k, v in official.from_ours(kind, {'params': blank['params']}).items()}
  assert len(names) == count
  state = {}
  for n, key in enumerate(sorted(names)):
    k = np.arange(np.prod(names[key]), dtype=np.float64)
    v = 0.3 * np.sin(1 + 0.7 * n + 0.3 * k + 0.01 * k * k)
    v += (key.endswith('weight') and len(names[key]) == 1) + 0.5 * ('gamma_' in key)
    state[key] = v.reshape(names[key]).astype(np.float32)
  return official.to_ours(kind, state, HEADS)


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision('highest'):
    yield


def test_fine_tuning_model():
  module = Classifier(16, 2, 2, 8, (4, 4), 5)
  variables = formula_weights('classifier', module, images(), count=39)
  logits = jax.jit(module.apply)(variables, images())
  expected = [[1.2110699, -0.8403643, -0.7184128, -0.2004551, 1.1194260], [2.3370855, -1.2437056, 0.1728210, 0.4017719, 0.7423964]]
  np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
  pooled = module.apply(variables, images(), method='pooled')[0, :6]
  np.testing.assert_allclose(pooled, [-1.706024, 0.922069, -0.179878, 0.972735, 0.599134, -1.067792], atol=TOLERANCE)


def test_pretraining_model():
  module = MIM(16, 4, 2, 8, (4, 4), 24, early_layer=3)
  variables = formula_weights('pretrain', module, images(), count=99)
  index = jnp.array([[0, 1, 4, 5, 10, 15], [2, 3, 6, 7, 8, 13]])
  labels = (7 * (index + jnp.array([[0], [16]]))) % 24
  assert labels.ravel().tolist() == [0, 7, 4, 11, 22, 9, 6, 13, 10, 17, 0, 11]

  def losses(params):
    logits = module.apply({'params': params}, images(), index=index)
    each = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in logits]
    return sum(each), (each, logits)

  (_, (each, logits)), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(variables['params'])
  np.testing.assert_allclose(each, [3.2993109, 3.4250975], atol=TOLERANCE)
  first = [[1.156748, -0.764332, 0.521649, 0.503571, 0.595320, 0.559588], [0.403024, -0.570211, 0.301187, 0.548193, 0.453767, -0.156092]]
  for x, six, total, size in zip(logits, first, (14.529319, -4.111137), (170.195468, 154.828318)):
    np.testing.assert_allclose(x[0, 0, :6], six, atol=TOLERANCE)
    np.testing.assert_allclose([x.sum(), jnp.abs(x).sum()], [total, size], atol=5e-4)
  np.testing.assert_allclose(optax.global_norm(grads), 4.2138631, rtol=1e-5)
  norms = {k: np.linalg.norm(v) for k, v in official.from_ours('pretrain', {'params': grads}).items()}
  expected = {
    'mask_token': 0.7509604,
    'cls_token': 0.0955789,
    'rel_pos_bias.relative_position_bias_table': 0.1079425,
    'patch_embed.proj.weight': 0.6324979,
    'cls_pt_layers.1.mlp.fc2.weight': 0.3802680,
    'blocks.3.attn.qkv.weight': 0.2587745,
    'lm_head.weight': 2.1116711,
  }
  for key, value in expected.items():
    np.testing.assert_allclose(norms[key], value, rtol=1e-4, err_msg=key)


def test_tokenizer():
  module = VQKD((4, 4), 8, 24, 4, 8, 16, 2, 2, 16, 1, 2)
  variables = formula_weights('tokenizer', module, images(), count=59)
  book = np.sin(0.9 * np.arange(96) + 0.2).reshape(24, 4)
  book = jnp.asarray(book / np.linalg.norm(book, axis=1, keepdims=True), jnp.float32)
  state = {'codebook': {'quantizer': dict(embedding=book, usage=jnp.zeros(24), cluster_size=jnp.zeros(24))}}
  z = module.apply(variables | state, images(), method='encode')
  np.testing.assert_allclose(z[0, 0], [-0.429581, -0.237822, 0.009654, -0.871096], atol=TOLERANCE)
  target = jnp.cos(0.11 * jnp.arange(256.0)).reshape(2, 16, 8)

  def loss(params):
    out = module.apply({'params': params, **state}, images())
    cosine = (quantizer.l2norm(out['features']) * quantizer.l2norm(target)).sum(-1)
    return (1 - cosine).mean() + out['commitment'], (out, (1 - cosine).mean())

  (_, (out, rec)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])
  codes = [6, 18, 18, 1, 3, 20, 17, 1, 3, 3, 18, 22, 22, 1, 17, 20, 2, 3, 6, 20, 13, 22, 3, 20, 1, 17, 6, 23, 1, 5, 0, 19]
  assert out['codes'].ravel().tolist() == codes
  np.testing.assert_allclose([out['commitment'], rec], [0.22083804, 0.9657004], atol=1e-6)
  features = out['features']
  np.testing.assert_allclose(features[0, 0, :6], [-0.249998, 0.043532, 0.207696, 0.290648, 0.536204, -0.392500], atol=TOLERANCE)
  np.testing.assert_allclose([features.sum(), jnp.abs(features).sum()], [-52.027869, 115.808752], atol=5e-4)
  norms = {k: np.linalg.norm(v) for k, v in official.from_ours('tokenizer', {'params': grads}).items()}
  expected = {
    'encode_task_layer.2.weight': 0.3989534,
    'encoder.patch_embed.proj.weight': 0.2029072,
    'encoder.cls_token': 0.0173917,
    'decoder.pos_embed': 0.2055055,
    'decoder.patch_embed.proj.weight': 0.0652676,
    'decode_task_layer.2.bias': 0.0214577,
    'encoder.fc_norm.weight': 0.0679823,
  }
  for key, value in expected.items():
    np.testing.assert_allclose(norms[key], value, rtol=1e-4, err_msg=key)
  after = quantizer.update(state['codebook']['quantizer'], out['counts'], out['sums'], 0.99)['embedding']
  rows = [[0.144019, 0.684162, 0.692008, 0.179736], [-0.460170, -0.738513, -0.468285, 0.153465], [0.620729, 0.628195, 0.159343, -0.441222]]
  np.testing.assert_allclose(after[:3], rows, atol=2e-6)
  np.testing.assert_allclose([after.sum(), jnp.abs(after).sum()], [0.972824, 43.207771], atol=1e-5)
  unused = np.array([4, 7, 8, 9, 10, 11, 12, 14, 15, 16, 21])
  np.testing.assert_array_equal(after[unused], book[unused])


@pytest.mark.parametrize('kind', official.TABLES)
def test_map_round_trip_is_bit_equal(kind):
  rng = np.random.default_rng(0)
  module = {
    'tokenizer': VQKD((4, 4), 8, 24, 4, 8, 16, 2, 2, 32, 1, 4),
    'pretrain': MIM(16, 2, 2, 8, (4, 4), 24, early_layer=1, shared_head=False),
    'classifier': Classifier(16, 2, 2, 8, (4, 4), 5),
    'segmenter': Segmenter(16, 4, 2, 8, (4, 4), 5, (0, 1, 2, 3), channels=8, aux_channels=4),
  }[kind]
  shapes = sharding.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), images())))
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  heads = dict(encoder=2, decoder=4)
  state = official.from_ours(kind, variables)
  back = official.to_ours(kind, state, heads)
  trees.check_same(back, variables, 'back', 'variables')
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables)):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(Exception, match='1 keys have no place in a .* model: surprise'):
    official.to_ours(kind, state | {'surprise': np.zeros(1)}, heads)
  assert official.home(kind, 'blocks.0.attn.relative_position_index') == ''
