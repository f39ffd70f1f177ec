"""The formulas against XLA's own count of what the modules do."""

import jax
import jax.numpy as jnp
import pytest
from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, vqkd_b16

from beitv2_jax import config as config_lib
from beitv2_jax.models import flops, from_config, upernet
from tests.test_models import convolve_as_published


def counted(module, *args, size=224, **kwargs):
  """Operations of one forward pass of the module, by XLA, for one image."""
  x = jnp.zeros((1, size, size, 3))
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  run = lambda v, x, *a: module.apply(v, x, *a, **kwargs)
  return jax.jit(run).lower(variables, x, *args).cost_analysis()['flops']


@pytest.mark.parametrize('stage', ['tokenizer', 'pretrain'])
def test_formulas_are_what_xla_counts(stage):
  c = {'tokenizer': vqkd_b16, 'pretrain': beitv2_b16}[stage].get_config().unlock()
  c.dtype = 'float32'
  if stage == 'tokenizer':
    c.model.teacher_width = 512
    formula = flops.tokenizer_codes(c.model, 196) + flops.tokenizer_decoder(c.model, 196)
    measured = counted(from_config.build(c))
  else:
    c.model.vocab = 8192
    formula = flops.pretraining_model(c.model, 196, 196)
    measured = counted(from_config.build(c))  # every patch is scored
  assert formula < measured < 1.04 * formula  # the rest is norms, softmax, GELU


def test_a_classifier():
  c = finetune_b16.get_config().unlock()
  c.dtype, c.model.classes = 'float32', 1000
  formula = flops.classifier(c.model, 196)
  assert formula < counted(from_config.build(c)) < 1.04 * formula


def test_a_segmenter_does_fewer(monkeypatch):
  c = ade20k_b16.get_config().unlock()
  c.dtype = 'float32'
  formula = flops.segmenter(c.model, 32**2)
  assert counted(from_config.build(c), size=512) < 0.65 * formula
  monkeypatch.setattr(upernet, 'convolve', convolve_as_published)
  # Resizing comes on top, and XLA does not count the zeros around a map.
  assert 0.997 * formula < counted(from_config.build(c), size=512) < 1.001 * formula


def test_pretraining_does_fewer():
  """In the last block of each branch only [CLS] and masked patches go through the output matrix and the MLP, 9 D² of its 12 D²."""
  c = beitv2_b16.get_config().unlock()
  c.dtype, c.model.vocab = 'float32', 8192
  formula = flops.pretraining_model(c.model, 196, 75)
  less = 2 * 9 * flops.linear(197 - 76, 768, 768)
  measured = counted(from_config.build(c), None, jnp.zeros((1, 75), jnp.int32))
  assert formula - less < measured < 1.04 * (formula - less)


def test_a_step():
  c = beitv2_b16.get_config()
  parts = flops.per_image(c)
  assert parts['tokenizer'] == flops.tokenizer_codes(config_lib.tokenizer_model(), 196)
  assert parts['student'] == pytest.approx(
    3 * 2 * 19.4e9 * (14 / 12), rel=0.08
  )  # ViT-B/16 has 17.6 G multiply-adds in 12 blocks, plus two heads
