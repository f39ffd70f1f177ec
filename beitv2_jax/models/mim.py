"""The masked image modelling model with patch aggregation (paper sections 2.2 and 2.3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beitv2_jax.models.layers import Block, Execution, Init, Linear, apply_blocks, layer_norm
from beitv2_jax.models.vit import ViT, drop_path_rates


def mask_from_index(index: jax.Array, patches: int) -> jax.Array:
  """Indices of masked patches [B, M] → bool [B, N]."""
  return (index[:, :, None] == jnp.arange(patches)).any(1)


class MIM(nn.Module):
  """Predicts codes at masked patches from the last block, and again from (last [CLS], patches of an earlier block).

  `early_layer` l counts blocks from 1; `head_layers` 0 switches patch aggregation off.
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  grid: tuple[int, int]
  vocab: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.1
  drop_path: float = 0.0
  early_layer: int = 9
  head_layers: int = 2
  shared_head: bool = True
  abs_pos: bool = False
  rel_pos: str = 'shared'
  init_scheme: str = 'truncated'
  # The official code builds the aggregation blocks after its init pass, so they keep torch's default.
  aggregation_init: str = 'torch'
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  def setup(self):
    init = Init(self.init_scheme)
    self.backbone = ViT(
        self.width, self.depth, self.heads, self.patch_size, self.grid, self.mlp_ratio, self.abs_pos,
        self.rel_pos, self.layer_scale, self.drop_path, True, init, self.execution, self.dtype,
    )  # fmt: skip
    # The rescale of the output matrices follows the block's place, and is applied whatever the init was.
    self.aggregation = [self._block(k) for k in range(self.head_layers)]
    self.norm = layer_norm(None, self.dtype)
    self.lm_head = Linear(self.vocab, init, ('embed', 'vocab'), dtype=self.dtype)
    if self.head_layers and not self.shared_head:
      self.aggregation_norm = layer_norm(None, self.dtype)
      self.aggregation_lm_head = Linear(self.vocab, init, ('embed', 'vocab'), dtype=self.dtype)

  def _block(self, k, **kwargs):
    return Block(
      self.heads,
      self.early_layer + k,
      self.mlp_ratio,
      Init(self.aggregation_init),
      self.layer_scale,
      attention=self.execution.attention,
      dtype=self.dtype,
      **kwargs,
    )

  def tokens(self, images, mask=None, taps=(), train: bool = False):
    """Raw block outputs: (last [B, T, D], {block: [B, T, D]}, [last, aggregated] branch outputs)."""
    taps = tuple(taps)
    early = (self.early_layer,) if self.head_layers else ()
    x, states, bias = self.backbone(images, mask, taps + early, train)
    branches = [x]
    if self.head_layers and self.is_initializing():
      for block in self.aggregation:
        x = block(x, bias)
      branches.append(x)
    elif self.head_layers:
      y = jnp.concatenate([x[:, :1], states[self.early_layer][:, 1:]], 1)
      rates = drop_path_rates(self.drop_path, max(self.depth, self.early_layer + self.head_layers))
      rates = rates[self.early_layer : self.early_layer + self.head_layers]
      key = self.make_rng('drop_path') if train and any(rates) else None
      params = [self.variables['params'][f'aggregation_{k}'] for k in range(self.head_layers)]
      branches.append(apply_blocks(self._block(0, parent=None), params, y, bias, rates, key, self.execution))
    return branches[0], {k: states[k] for k in taps if k in states}, branches

  def __call__(self, images, mask=None, index=None, train: bool = False):
    """Normalised images [B, h, w, 3] → one array of logits a branch.

    Args:
      mask: [B, N] bool, patches to hide. Derived from `index` when only that is given.
      index: [B, M] int, patches to score; logits are [B, M, K]. Without it every patch is scored: [B, N, K].
    """
    if mask is None and index is not None:
      mask = mask_from_index(index, self.grid[0] * self.grid[1])
    norms, heads = [self.norm] * 2, [self.lm_head] * 2
    if self.head_layers and not self.shared_head:
      norms[1], heads[1] = self.aggregation_norm, self.aggregation_lm_head
    logits = []
    for y, norm, head in zip(self.tokens(images, mask, train=train)[2], norms, heads):
      y = y[:, 1:]
      if index is not None:
        y = jnp.take_along_axis(y, index[:, :, None], 1)
      logits.append(head(norm(y)))
    return logits
