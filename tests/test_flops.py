"""The formulas against XLA's own count of what the modules do."""

import jax
import jax.numpy as jnp
import pytest
from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, vqkd_b16

from beitv2_jax import config as config_lib
from beitv2_jax.models import flops, from_config


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
    formula = flops.pretraining_model(c.model, 196, 75)
    measured = counted(from_config.build(c), None, jnp.zeros((1, 75), jnp.int32))
  assert formula < measured < 1.04 * formula  # the rest is norms, softmax, GELU


@pytest.mark.parametrize(
  'recipe, size, formula, slack', [(finetune_b16, 224, flops.classifier, 1.04), (ade20k_b16, 512, flops.segmenter, 1.1)]
)
def test_downstream_formulas_too(recipe, size, formula, slack):
  c = recipe.get_config().unlock()
  c.dtype = 'float32'
  c.model.classes = c.model.classes or 1000
  needed = formula(c.model, (size // 16) ** 2)
  measured = counted(from_config.build(c), size=size)
  assert needed < measured < slack * needed  # resizing by matrices is most of the rest in a segmenter


def test_a_step():
  c = beitv2_b16.get_config()
  parts = flops.per_image(c)
  assert parts['tokenizer'] == flops.tokenizer_codes(config_lib.tokenizer_model(), 196)
  assert parts['student'] == pytest.approx(
    3 * 2 * 19.4e9 * (14 / 12), rel=0.08
  )  # ViT-B/16 has 17.6 G multiply-adds in 12 blocks, plus two heads
