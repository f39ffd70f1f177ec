"""BEiT v2 in JAX: VQ-KD tokenizer, masked image modelling on its codes, and what comes after."""

__version__ = '0.1.0'


def load(directory, ema=False):
  """Opens anything trained here: see beitv2_jax.downstream.trained.load."""
  from beitv2_jax.downstream import trained  # jax is imported only when it is needed

  return trained.load(directory, ema)
