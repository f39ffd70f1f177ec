"""The fine-tuning model: a ViT with a relative position table in every block and a linear head on pooled patches."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from beitv2_jax.models.layers import Execution, Init, LayerNorm, Linear
from beitv2_jax.models.vit import ViT


class Classifier(nn.Module):
  """Normalised images [B, h, w, 3] → logits [B, classes].

  `mean_pooling` averages the patch tokens and norms the average (`fc_norm`); otherwise the normed [CLS] token is classified.
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  grid: tuple[int, int]
  classes: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.1
  drop_path: float = 0.0
  abs_pos: bool = False
  rel_pos: str = 'per_block'
  mean_pooling: bool = True
  head_scale: float = 0.001
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  def setup(self):
    self.backbone = ViT(
      self.width, self.depth, self.heads, self.patch_size, self.grid, self.mlp_ratio, self.abs_pos, self.rel_pos,
      self.layer_scale, self.drop_path, execution=self.execution, dtype=self.dtype,
    )  # fmt: skip
    if self.mean_pooling:
      self.fc_norm = LayerNorm(self.dtype)
    else:
      self.norm = LayerNorm(self.dtype)
    self.head = Linear(self.classes, Init(), ('embed', 'vocab'), self.head_scale, self.dtype)

  def tokens(self, images, taps=(), train: bool = False):
    """Raw block outputs, as ViT returns them."""
    return self.backbone(images, taps=tuple(taps), train=train)

  def pooled(self, images, train: bool = False):
    """What the head sees, [B, D]."""
    x, _, _ = self.tokens(images, train=train)
    return self.fc_norm(x[:, 1:].mean(1)) if self.mean_pooling else self.norm(x[:, 0])

  def __call__(self, images, train: bool = False):
    return self.head(self.pooled(images, train))
