"""The masked image modelling model with patch aggregation (paper sections 2.2 and 2.3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from beitv2_jax.kernels import chip
from beitv2_jax.kernels.functions import sum_rows
from beitv2_jax.models.layers import Block, Execution, Init, LayerNorm, Linear, apply_blocks, pick
from beitv2_jax.models.vit import ViT, drop_path_rates


def mask_from_index(index: jax.Array, patches: int) -> jax.Array:
  """Indices of masked patches [B, M] → bool [B, N]."""
  return (index[:, :, None] == jnp.arange(patches)).any(1)


@jax.custom_vjp
def code_loss(products: jax.Array, bias: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cross-entropy, whether the first best code is the right one), fp32, of logits = products + bias.

  products [..., K] (features times the head's matrix), bias [K], labels [...] int. Logits are never written out in fp32, and the
  backward pass makes its slopes inside the products that use them.
  """
  return _code_loss_forward(products, bias, labels)[0]


def _code_loss_forward(products, bias, labels):
  z = products.astype(jnp.float32) + bias
  code = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
  largest = z.max(-1, keepdims=True)
  right = code == labels[..., None]
  before = (z == largest) & (code < labels[..., None])  # as good, and found first
  terms = jnp.exp(z - largest), jnp.where(right, z, 0), before.astype(jnp.float32)
  # One reduction of three: one pass.
  total, right, before = jax.lax.reduce(terms, (0.0,) * 3, lambda a, b: tuple(x + y for x, y in zip(a, b)), (z.ndim - 1,))
  lse = largest[..., 0] + jnp.log(total)
  hit = (right == largest[..., 0]) & (before == 0)
  return (lse - right, hit.astype(jnp.float32)), (products, bias, labels, lse)


def _code_loss_backward(saved, cotangents):
  products, bias, labels, lse = saved

  def slopes(products):
    code = jax.lax.broadcasted_iota(jnp.int32, products.shape, products.ndim - 1)
    p = jnp.exp(products.astype(jnp.float32) + bias - lse[..., None]) - (code == labels[..., None])
    return (p * cotangents[0][..., None]).astype(products.dtype)

  again = slopes(chip.made_anew(products))  # or the compiler would write them out to use them three times
  return slopes(products), sum_rows(again), None


code_loss.defvjp(_code_loss_forward, _code_loss_backward)


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
    self.norm = LayerNorm(self.dtype)
    self.lm_head = Linear(self.vocab, init, ('embed', 'vocab'), dtype=self.dtype)
    if self.head_layers and not self.shared_head:
      self.aggregation_norm = LayerNorm(self.dtype)
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

  def tokens(self, images, mask=None, taps=(), train: bool = False, index=None):
    """Raw block outputs: (last [B, T, D], {block: [B, T, D]}, [last, aggregated] branch outputs).

    With `index` [B, M] the last block of each branch makes only what the loss is about: branch outputs are [CLS] and those patches,
    [B, 1 + M, D].
    """
    taps = tuple(taps)
    early = (self.early_layer,) if self.head_layers else ()
    rows = None if index is None else jnp.pad(index + 1, ((0, 0), (1, 0)))  # [CLS] is 0
    both_here = self.head_layers and self.is_initializing()  # the aggregation blocks follow the last one then
    x, states, bias = self.backbone(images, mask, taps + early, train, None if both_here else rows)
    branches = [x]
    if both_here:
      for block in self.aggregation:
        x = block(x, bias)
      branches = [pick(rows, y) for y in (*branches, x)]
    elif self.head_layers:
      y = states[self.early_layer]
      y = jnp.where(jnp.arange(y.shape[1])[:, None] == 0, x[:, :1], y)
      rates = drop_path_rates(self.drop_path, max(self.depth, self.early_layer + self.head_layers))
      rates = rates[self.early_layer : self.early_layer + self.head_layers]
      key = self.make_rng('drop_path') if train and any(rates) else None
      params = [self.variables['params'][f'aggregation_{k}'] for k in range(self.head_layers)]
      branches.append(apply_blocks(self._block(0, parent=None), params, y, bias, rates, key, self.execution, rows))
    return branches[0], {k: states[k] for k in taps if k in states}, branches

  def __call__(self, images, mask=None, index=None, labels=None, train: bool = False):
    """Normalised images [B, h, w, 3], or patches of them (layers.cut_pixels), → logits, one array a branch: [branches, B, M, K]; or their loss.

    Args:
      mask: [B, N] bool, patches to hide. Derived from `index` when only that is given.
      index: [B, M] int, patches to score. Without it every patch is scored, and M is N.
      labels: [B, M] int, the codes there. With them, `code_loss` is what is returned: two arrays [branches, B, M].
    """
    if mask is None and index is not None:
      mask = mask_from_index(index, self.grid[0] * self.grid[1])
    branches = [y[:, 1:] for y in self.tokens(images, mask, train=train, index=index)[2]]
    if self.head_layers and not self.shared_head:
      return jax.tree.map(
        lambda *x: jnp.stack(x),
        self._score(self.lm_head, self.norm(branches[0]), labels),
        self._score(self.aggregation_lm_head, self.aggregation_norm(branches[1]), labels),
      )
    return self._score(self.lm_head, jnp.stack([self.norm(y) for y in branches]), labels)  # one product for both

  def _score(self, head, x, labels):
    if labels is None:
      return head(x)
    products, bias = head(x, apart=True)
    return code_loss(products, bias, jnp.broadcast_to(labels, products.shape[:-1]))
