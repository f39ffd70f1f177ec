"""VQ-KD, the visual tokenizer: encoder → codebook → shallow decoder that predicts a teacher's features.

Paper section 2.1. Images come in as [-1, 1]; the head that makes codes and the codebook are fp32 even when the blocks are bf16.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from beitv2_jax.models.layers import Execution, Init, LayerNorm, Linear
from beitv2_jax.models.quantizer import Quantizer, fsq_bound, l2norm
from beitv2_jax.models.vit import ViT


class TaskHead(nn.Module):
  """Linear, tanh, Linear. fp32 means fp32, also where products round by default."""

  hidden: int
  features: int
  init: Init = Init()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    kind = dict(init=self.init, dtype=self.dtype, exact=self.dtype == jnp.float32)
    x = Linear(self.hidden, **kind, name='fc1')(x)
    return Linear(self.features, **kind, name='fc2')(jnp.tanh(x))


class PatchEncoder(nn.Module):
  """A ViT with absolute positions whose output is its normed patch tokens [B, N, D], of the patches `index` [B, M] if given."""

  vit: ViT

  @nn.compact
  def __call__(self, x, train: bool = False, index=None):
    tokens, _, _ = self.vit(x, train=train, rows=None if index is None else index + 1)
    return LayerNorm(self.vit.dtype, name='norm')(tokens[:, 1:] if index is None else tokens)


class VQKD(nn.Module):
  """The tokenizer. `teacher_width` V is the width of the features it learns to predict."""

  grid: tuple[int, int]
  patch_size: int
  codes: int
  code_dim: int
  teacher_width: int
  encoder_width: int = 768
  encoder_depth: int = 12
  encoder_heads: int = 12
  decoder_width: int = 768
  decoder_depth: int = 3
  decoder_heads: int = 12
  mlp_ratio: float = 4.0
  quantizer_kind: str = 'ema'  # see Quantizer
  gradient: str = 'straight_through'
  levels: tuple[int, ...] = ()
  init_scheme: str = 'normal'
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  def setup(self):
    init = Init(self.init_scheme)

    def vit(side, patch_size):
      size = {k: getattr(self, f'{side}_{k}') for k in ('width', 'depth', 'heads')}
      return ViT(
        **size,
        patch_size=patch_size,
        grid=self.grid,
        mlp_ratio=self.mlp_ratio,
        init=init,
        execution=self.execution,
        dtype=self.dtype,
        parent=None,
      )

    self.encoder = PatchEncoder(vit('encoder', self.patch_size))
    self.encode_head = TaskHead(self.encoder_width, self.code_dim, init)
    self.quantizer = Quantizer(self.codes, self.code_dim, self.quantizer_kind, self.gradient, self.levels)
    self.decoder = PatchEncoder(vit('decoder', 1))
    self.decode_head = TaskHead(self.decoder_width, self.teacher_width, init, self.dtype)

  def encode(self, images, index=None):
    """[B, h, w, 3] in [-1, 1] → unit vectors [B, N, C]; of an FSQ tokenizer, points of its box. Of the patches `index` [B, M] if given."""
    z = self.encode_head(self.encoder(images, index=index))
    return fsq_bound(z, self.levels) if self.quantizer_kind == 'fsq' else l2norm(z)

  def encoder_states(self, images, taps=()):
    """Raw block outputs of the encoder, as ViT returns them."""
    return self.encoder.vit(images, taps=tuple(taps))

  def decode(self, quantized, grid=None):
    """[B, N, C] → predicted teacher features [B, N, V]."""
    grid = grid or self.grid
    x = quantized.reshape(quantized.shape[0], *grid, self.code_dim)
    return self.decode_head(self.decoder(x)).astype(jnp.float32)

  def tokens(self, images, index=None):
    """[B, h, w, 3] in [-1, 1], or patches of it (layers.cut_pixels), → codes [B, N], row by row; [B, M] of the patches `index` if given."""
    return self.quantizer(self.encode(images, index))[1]

  def __call__(self, images):
    """→ dict of `features` [B, N, V], `codes` [B, N], `commitment` (scalar), `counts` [K], `sums` [K, C], `z` [B, N, C]."""
    z = self.encode(images)
    quantized, codes, commitment, counts, sums = self.quantizer(z)
    grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
    return dict(features=self.decode(quantized, grid), codes=codes, commitment=commitment, counts=counts, sums=sums, z=z)
