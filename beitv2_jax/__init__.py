"""BEiT v2 in JAX: VQ-KD tokenizer, masked image modelling on its codes, and what comes after."""

from pathlib import Path

__version__ = '0.1.0'

if (
  Path(__file__).parents[1] / 'configs' / 'vqkd_b16.py'
).is_file():  # a checkout, perhaps not installed: its configs/ is beitv2_jax.configs
  __path__.append(str(Path(__file__).parents[1]))


def load(directory, ema=False):
  """Opens anything trained here: see beitv2_jax.downstream.trained.load."""
  from beitv2_jax.downstream import trained  # jax is imported only when it is needed

  return trained.load(directory, ema)
