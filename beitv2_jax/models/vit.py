"""The one vision transformer behind every stage: VQ-KD encoder and decoder, pretraining, fine-tuning, segmentation.

What each role switches on (everything else is equal):

| role               | abs_pos | rel_pos   | layer_scale | init      |
|--------------------|---------|-----------|-------------|-----------|
| VQ-KD enc/decoder  | yes     | none      | none        | normal    |
| pretraining        | no      | shared    | 0.1 / 1e-5  | truncated |
| fine-tuning        | no      | per_block | 0.1 / 1e-5  | normal    |
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.kernels.functions import add_positions
from beitv2_jax.models.layers import Block, Execution, Init, PatchEmbed, RelPosBias, apply_blocks


def drop_path_rates(rate: float, depth: int) -> list[float]:
  return [float(x) for x in np.linspace(0, rate, depth)]


def resize_pos_embed(table: jax.Array, stored: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
  """[1, 1+N, D] → another grid, as the official forward does it: bicubic (a=-0.75, no antialias) whose coordinates
  step by stored/(grid + 0.1). The 0.1 there guards a floor, but it also moves every sample a little.
  """
  if stored == grid:
    return table
  cls, patches = table[:, :1], table[0, 1:].reshape(*stored, -1)
  rows, cols = (cubic_weights(s, g, (g + 0.1) / s) for s, g in zip(stored, grid))
  patches = jnp.einsum('is,jt,std->ijd', rows, cols, patches, precision='highest')
  return jnp.concatenate([cls, patches.reshape(1, -1, table.shape[-1])], 1)


def cubic_weights(source: int, target: int, scale: float) -> np.ndarray:
  """[target, source] matrix of bicubic interpolation, a = -0.75, half-pixel centres, border clamped."""
  a = -0.75
  x = (np.arange(target) + 0.5) / scale - 0.5
  left = np.floor(x).astype(int)
  weights = np.zeros((target, source))
  for tap in range(-1, 3):
    d = np.abs(x - (left + tap))
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    np.add.at(weights, (np.arange(target), np.clip(left + tap, 0, source - 1)), np.where(d <= 1, near, far))
  return weights.astype(np.float32)


class ViT(nn.Module):
  """Images (or a feature map) → tokens.

  Call: images [B, h, w, C] float, already normalised, or patches of them (layers.cut_pixels); `mask` [B, N] bool puts the mask token in place of patches.
  Returns `(tokens [B, T, D], states, bias)`: the last block's raw output (no norm), the raw outputs of the blocks
  named in `taps` (1 is the first block), and the shared position bias [H, T, T] or None. With `rows` [B, R] the last block makes
  only those tokens, [B, R, D], and cannot be among the taps.
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  grid: tuple[int, int]
  mlp_ratio: float = 4.0
  abs_pos: bool = True
  rel_pos: str = 'none'  # or 'shared' (one table for all blocks) or 'per_block'
  layer_scale: float = 0.0
  drop_path: tuple[float, ...] | float = 0.0
  mask_token: bool = False
  init: Init = Init()
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images, mask=None, taps: tuple[int, ...] = (), train: bool = False, rows=None):
    x = PatchEmbed(self.width, self.patch_size, self.init, self.dtype, name='patch_embed')(images)
    here = x.shape[1:3]
    if here != self.grid and self.rel_pos != 'none':
      raise ValueError(f'this model has relative positions for a {self.grid} grid; the image gives {here}. Resize the image or the tables.')
    if rows is not None and self.depth in taps:
      raise ValueError(f'block {self.depth} of {self.depth} makes only the tokens of `rows`; it cannot be tapped.')
    x = x.reshape(len(x), -1, self.width)
    token = nn.with_logical_partitioning(self.init.token, (None, None, 'embed'))
    if self.mask_token:
      mask_token = self.param('mask_token', token, (1, 1, self.width)).astype(self.dtype)
      if mask is not None:
        x = jnp.where(mask[:, :, None], mask_token, x)
    cls = self.param('cls_token', token, (1, 1, self.width)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x], 1)
    if self.abs_pos:
      pos = self.param('pos_embed', token, (1, 1 + self.grid[0] * self.grid[1], self.width))
      x = add_positions(x, resize_pos_embed(pos, self.grid, here)[0])
    bias = RelPosBias(self.grid, self.heads, name='rel_pos_bias')() if self.rel_pos == 'shared' else None
    rates = self.drop_path if isinstance(self.drop_path, tuple) else drop_path_rates(self.drop_path, self.depth)
    own_table = self.grid if self.rel_pos == 'per_block' else None

    def block(i, **kwargs):
      return Block(self.heads, i, self.mlp_ratio, self.init, self.layer_scale, own_table, self.execution.attention, self.dtype, **kwargs)

    if self.is_initializing():
      for i in range(self.depth):
        x = block(i, name=f'block_{i}')(x, bias, rows=rows if i == self.depth - 1 else None)
      return x, {}, bias
    key = self.make_rng('drop_path') if train and any(rates) else None
    params, states, done = self.variables['params'], {}, 0
    for stop in sorted({*taps, self.depth}):
      here = range(done, stop)
      part_key = key if key is None else jax.random.fold_in(key, done)
      here_params, here_rates = [params[f'block_{i}'] for i in here], [rates[i] for i in here]
      chosen = rows if stop == self.depth else None
      x = apply_blocks(block(0, parent=None), here_params, x, bias, here_rates, part_key, self.execution, chosen)
      states, done = states | {stop: x}, stop
    return x, {t: states[t] for t in taps}, bias
