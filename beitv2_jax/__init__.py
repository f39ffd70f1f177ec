"""BEiT v2 in JAX: VQ-KD tokenizer, masked image modelling on its codes, and what comes after."""

__version__ = '0.1.0'


def load(directory, ema=False):
  """Opens anything trained here: see beitv2_jax.api.load."""
  from beitv2_jax import api  # jax is imported only when it is needed

  return api.load(directory, ema)
