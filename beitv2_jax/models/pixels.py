"""From codes back to pixels: a decoder that only looks. Tokenizer and codebook stay as they are.

The paper's authors describe it (encoder and codebook frozen, an extra decoder) and released none, so this architecture is ours: the code's
vectors, some transformer blocks over the whole map, a linear layer to each patch's pixels, and a 3 x 3 convolution, without which the seams
between patches show.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beitv2_jax.models.layers import Execution, Init, Linear
from beitv2_jax.models.vit import ViT
from beitv2_jax.models.vqkd import PatchEncoder


class PixelDecoder(nn.Module):
  """Codes [B, N] → RGB images [B, h, w, 3], about [0, 1]. The codebook [codes, code_dim] is a constant of the model, in 'codebook'."""

  grid: tuple[int, int]
  patch_size: int
  codes: int
  code_dim: int
  width: int = 768
  depth: int = 4
  heads: int = 12
  mlp_ratio: float = 4.0
  init_scheme: str = 'normal'
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, codes, train: bool = False):
    init = Init(self.init_scheme)
    embedding = self.variable('codebook', 'embedding', jnp.zeros, (self.codes, self.code_dim)).value
    x = embedding[codes].reshape(codes.shape[0], *self.grid, self.code_dim)
    sizes = dict(width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio, patch_size=1)
    vit = ViT(**sizes, grid=self.grid, init=init, execution=self.execution, dtype=self.dtype, parent=None)
    x = PatchEncoder(vit, name='decoder')(x, train)
    x = Linear(self.patch_size**2 * 3, init=init, name='to_pixels')(x.astype(jnp.float32))
    image = unpatchify(x, self.grid, self.patch_size)
    kernel = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None, None, None))
    seams = nn.Conv(3, (3, 3), kernel_init=kernel, name='seams')(image)  # starts as nothing
    return image + seams + 0.5


def unpatchify(x: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
  """[B, N, patch * patch * 3] → [B, h, w, 3]."""
  x = x.reshape(x.shape[0], *grid, patch, patch, 3)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], grid[0] * patch, grid[1] * patch, 3)
