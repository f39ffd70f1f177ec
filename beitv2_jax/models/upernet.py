"""UperNet on a BEiT backbone: semantic segmentation as the paper does it (section 3.3; heads as mmsegmentation builds them).

Shape letters as in layers.py; feature maps are [B, h, w, C]. Level 1 has stride 4 (at 16 px patches), level 4 stride 32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.kernels import chip
from beitv2_jax.kernels.functions import gelu
from beitv2_jax.models.initializers import Draw, uniform
from beitv2_jax.models.layers import Execution
from beitv2_jax.models.vit import ViT


def linear_weights(source: int, target: int) -> np.ndarray:
  """[target, source] matrix of linear interpolation, half-pixel centres, border clamped, no antialias (torch's 'bilinear')."""
  x = np.maximum((np.arange(target) + 0.5) * source / target - 0.5, 0)
  left = np.minimum(np.floor(x).astype(int), source - 1)
  weights = np.zeros((target, source))
  np.add.at(weights, (np.arange(target), left), 1 - (x - left))
  np.add.at(weights, (np.arange(target), np.minimum(left + 1, source - 1)), x - left)
  return weights.astype(np.float32)


def pool_weights(source: int, target: int) -> np.ndarray:
  """[target, source] matrix of adaptive average pooling: bins from floor(i·s/t) to ceil((i+1)·s/t)."""
  weights = np.zeros((target, source), np.float32)
  for i in range(target):
    first, last = i * source // target, -(-(i + 1) * source // target)
    weights[i, first:last] = 1 / (last - first)
  return weights


def resample(x: jax.Array, size: tuple[int, int], weights: Any = linear_weights) -> jax.Array:
  """[B, h, w, C] → [B, *size, C], one matrix an axis."""
  if x.shape[1:3] == tuple(size):
    return x
  rows, cols = (jnp.asarray(weights(s, t), x.dtype) for s, t in zip(x.shape[1:3], size))
  return jnp.einsum('jw,bhwc->bhjc', cols, jnp.einsum('ih,bhwc->biwc', rows, x))


def convolve(x: jax.Array, kernel: jax.Array, *more: jax.Array) -> jax.Array:
  """Convolution of stride 1, zeros around it, of x [B, H, W, C] and `more` maps, each resampled to x's size, as joined: [B, H, W, F].

  Args:
    kernel: [K, K, C of all maps together, F], K odd.

  A smaller map is multiplied by the kernel as it is, and what each of the K·K matrices gives is resampled and moved to its place. That
  is the same sum, for resampling does not mix channels. With 768 channels it takes a third of the multiplications for a map of half
  the side, fewer for smaller ones.
  """
  own, *others = jnp.split(kernel, np.cumsum([m.shape[-1] for m in (x, *more)])[:-1], axis=2)
  y = jax.lax.conv_general_dilated(x, own, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  for small, part in zip(more, others):
    rows, cols = (jnp.asarray(_moved(linear_weights(s, t), len(kernel)), x.dtype) for s, t in zip(small.shape[1:3], x.shape[1:3]))
    taps = jnp.einsum('bhwc,yxcf->byhxwf', small, part)
    y = y + jnp.einsum('xjw,bixwf->bijf', cols, jnp.einsum('yih,byhxwf->bixwf', rows, taps))
  return y


def _moved(weights: np.ndarray, taps: int) -> np.ndarray:
  """[taps, target, source] of [target, source]: each tap of a kernel reads the target that many rows off the middle; none is beyond its end."""
  target, around = len(weights), taps // 2
  weights = np.pad(weights, ((around, around), (0, 0)))
  return np.stack([weights[t : t + target] for t in range(taps)])


class BatchNorm(nn.Module):
  """Batch norm over all images of the global batch, eps 1e-5, momentum 0.1, fp32.

  As in torch, the batch's biased variance normalises and the unbiased one goes into the running average. As in `normalize_layer`, it takes
  a second pass unless products are rounded anyway.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    shape = (x.shape[-1],)
    scale, bias = self.param('scale', nn.initializers.ones, shape), self.param('bias', nn.initializers.zeros, shape)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    var = self.variable('batch_stats', 'var', jnp.ones, shape)
    rounded = x.dtype != jnp.float32 or chip.rounded_products()
    x = x.astype(jnp.float32)
    m, v = mean.value, var.value
    if train:
      m = x.mean((0, 1, 2))
      v = jnp.maximum(jnp.square(x).mean((0, 1, 2)) - m * m, 0) if rounded else jnp.square(x - m).mean((0, 1, 2))
      if not self.is_initializing():
        count = x.size // x.shape[-1]
        mean.value = 0.9 * mean.value + 0.1 * m
        var.value = 0.9 * var.value + 0.1 * v * (count / max(count - 1, 1))
    return ((x - m) * (jax.lax.rsqrt(v + 1e-5) * scale) + bias).astype(self.dtype)


class Convolution(nn.Module):
  """`convolve` with a kernel of its own, drawn by its fan-out."""

  features: int
  size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, *maps):
    init = Draw('normal', (2 / (self.features * self.size**2)) ** 0.5)
    shape = (self.size, self.size, sum(m.shape[-1] for m in maps), self.features)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, (None, None, 'embed', None)), shape).astype(self.dtype)
    x, *more = (m.astype(self.dtype) for m in maps)
    return convolve(x, kernel, *more)


class ConvModule(nn.Module):
  """Convolution without bias (of one map, or of `more`, resampled to its size and joined to it), batch norm, ReLU."""

  features: int
  size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool, *more):
    x = Convolution(self.features, self.size, self.dtype, name='conv')(x, *more)
    return nn.relu(BatchNorm(self.dtype, name='bn')(x, train))


class Deconv(nn.Module):
  """Transposed convolution 2x2 of stride 2, width kept: every pixel becomes four, each by its own matrix."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    init = uniform((4 * c) ** -0.5)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, (None, None, 'embed', None)), (2, 2, c, c)).astype(self.dtype)
    bias = self.param('bias', init, (c,)).astype(self.dtype)
    return jnp.einsum('bijc,yxco->biyjxo', x.astype(self.dtype), kernel).reshape(b, 2 * h, 2 * w, c) + bias


class Segmenter(nn.Module):
  """Normalised images [B, h, w, 3] → (logits [B, 4Gh, 4Gw, classes], auxiliary logits [B, Gh, Gw, classes] or None).

  `out_indices` names the four blocks that are read, counted from 0. Training mode needs a 'dropout' and a 'drop_path' key and
  changes the collection 'batch_stats'.
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  grid: tuple[int, int]
  classes: int
  out_indices: tuple[int, ...] = (3, 5, 7, 11)
  channels: int = 768
  aux_channels: int = 256  # 0: no auxiliary head
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  mlp_ratio: float = 4.0
  layer_scale: float = 0.1
  drop_path: float = 0.0
  dropout: float = 0.1
  abs_pos: bool = False
  rel_pos: str = 'per_block'
  execution: Execution = Execution()
  dtype: Any = jnp.float32

  def setup(self):
    self.backbone = ViT(
      self.width, self.depth, self.heads, self.patch_size, self.grid, self.mlp_ratio, self.abs_pos, self.rel_pos,
      self.layer_scale, self.drop_path, execution=self.execution, dtype=self.dtype,
    )  # fmt: skip
    conv = lambda features, size: ConvModule(features, size, self.dtype)
    last = lambda: nn.Conv(self.classes, (1, 1), dtype=self.dtype, kernel_init=Draw('normal', 0.01))
    self.fpn1_up1, self.fpn1_norm, self.fpn1_up2 = Deconv(self.dtype), BatchNorm(self.dtype), Deconv(self.dtype)
    self.fpn2_up = Deconv(self.dtype)
    self.psp = [conv(self.channels, 1) for _ in self.pool_scales]
    self.psp_bottleneck = conv(self.channels, 3)
    self.lateral = [conv(self.channels, 1) for _ in range(3)]
    self.fpn_conv = [conv(self.channels, 3) for _ in range(3)]
    self.fpn_bottleneck = conv(self.channels, 3)
    self.classifier = last()
    if self.aux_channels:
      self.aux_conv, self.aux_classifier = conv(self.aux_channels, 3), last()
    self.drop = nn.Dropout(self.dropout, broadcast_dims=(1, 2))  # whole channels

  def tokens(self, images, taps=(), train: bool = False):
    """Raw block outputs, as ViT returns them."""
    return self.backbone(images, taps=tuple(taps), train=train)

  def pyramid(self, images, train: bool = False):
    """The four feature maps, of strides 4, 8, 16 and 32."""
    taps = tuple(i + 1 for i in self.out_indices)
    last, states, _ = self.tokens(images, taps, train)
    states = states or dict.fromkeys(taps, last)  # while initializing
    one, two, three, four = (states[t][:, 1:].reshape(len(images), *self.grid, self.width) for t in taps)
    one = self.fpn1_up2(gelu(self.fpn1_norm(self.fpn1_up1(one), train)))
    return one, self.fpn2_up(two), three, nn.max_pool(four, (2, 2), (2, 2))

  def __call__(self, images, train: bool = False):
    levels = self.pyramid(images, train)
    sizes = [x.shape[1:3] for x in levels]
    top = levels[-1]
    pooled = [conv(resample(top, (s, s), pool_weights), train) for s, conv in zip(self.pool_scales, self.psp)]
    top = self.psp_bottleneck(top, train, *pooled)
    maps = [conv(x, train) for conv, x in zip(self.lateral, levels)] + [top]
    for i in (2, 1, 0):
      maps[i] = maps[i] + resample(maps[i + 1], sizes[i])
    maps[:3] = [conv(x, train) for conv, x in zip(self.fpn_conv, maps)]
    x = self.fpn_bottleneck(maps[0], train, *maps[1:])
    logits = self.classifier(self.drop(x, deterministic=not train))
    if not self.aux_channels:
      return logits, None
    return logits, self.aux_classifier(self.drop(self.aux_conv(levels[2], train), deterministic=not train))
