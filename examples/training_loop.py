"""A training loop of one's own around our modules: masked image modelling on the codes of a frozen tokenizer.

python examples/training_loop.py TOKENIZER FOLDER
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import beitv2_jax
from beitv2_jax.downstream import image_files
from beitv2_jax.models import images as scaling
from beitv2_jax.models import mim


def main(tokenizer: str, folder: str, steps: int = 20) -> None:
  frozen = beitv2_jax.load(tokenizer)
  if frozen.kind != 'tokenizer':
    sys.exit(f'{tokenizer} is a {frozen.kind}; give a tokenizer')
  model = mim.MIM(64, 4, 4, frozen.config.model.patch_size, frozen.grid, vocab=frozen.config.model.codes, early_layer=3)
  files, patches = image_files.find_images([folder]), frozen.grid[0] * frozen.grid[1]
  batches = [images for _, images in image_files.prepared(files, frozen.config.data.image_size, batch=16)]
  params = model.init(jax.random.key(0), jnp.zeros((1, *batches[0].shape[1:])), jnp.ones((1, patches), bool))['params']
  optimizer = optax.adamw(1e-3)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, images, codes, mask):
    def loss_of(params):  # of both branches, at the hidden patches
      pixels = scaling.normalize(scaling.unit_images(images), scaling.IMAGENET_MEAN, scaling.IMAGENET_STD)
      branches = model.apply({'params': params}, pixels, mask)
      return sum(optax.losses.softmax_cross_entropy_with_integer_labels(b, codes).mean(where=mask) for b in branches)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss

  for number in range(steps):
    images = batches[number % len(batches)]
    mask = np.random.default_rng(number).random((len(images), patches)) < 0.4
    params, state, loss = step(params, state, images, frozen.tokens(images).reshape(len(images), -1), mask)
    print(f'step {number + 1}: loss {loss:.3f}')


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
