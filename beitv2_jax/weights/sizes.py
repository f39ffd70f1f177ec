"""A config read off the arrays of an official state dict: nothing about width, depth, grid or codebook is asked for."""

import math
import re
from typing import Any

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import table_size

State = dict[str, np.ndarray]


def depth(state: State, prefix: str) -> int:
  """How many numbered parts there are under `prefix`. Raises UserError if one before the last is missing."""
  found = {int(number[1]) for key in state if (number := re.match(re.escape(prefix) + r'(\d+)\.', key))}
  missing = next((i for i in range(len(found)) if i not in found), None)
  if missing is not None:
    raise UserError(f'there is a {prefix}{max(found)}, but no {prefix}{missing}: the file is not whole, or of another model.')
  return len(found)


def _need(state: State, key: str, kind: str, axes: int) -> np.ndarray:
  """An array that has so many axes, none of them empty."""
  if key not in state:
    raise UserError(
      f'no {key} among the {len(state)} keys: this is not a {kind} checkpoint (its first keys: {", ".join(sorted(state)[:4])}).'
    )
  shape = state[key].shape
  if len(shape) != axes or 0 in shape:
    raise UserError(f'{key} has the shape {shape}; in a {kind} it has {axes} axes, none of them empty.')
  return state[key]


def grid_of(patches: int | None, rows: int | None, given: tuple[int, int] | None) -> tuple[int, int]:
  """The patch grid from a position embedding's length or a bias table's rows; square unless `given`."""
  if given is None:
    side = math.isqrt(patches) if patches is not None else (math.isqrt(max((rows or 3) - 3, 0)) + 1) // 2
    given = (side, side)
  fits = given[0] * given[1] == patches if patches is not None else table_size(given) == rows
  if not fits:
    raise UserError(
      f'{f"{patches} patches" if patches is not None else f"a bias table of {rows} rows"} does not make a {given[0]}x{given[1]} grid; say which with --grid HxW.'
    )
  return given


def vit(state: State, prefix: str, kind: str, heads: int | None) -> dict[str, Any]:
  """width, depth, heads, mlp_ratio, patch_size, layer_scale, tables of a ViT whose keys begin with `prefix`."""
  patch = _need(state, f'{prefix}patch_embed.proj.weight', kind, 4)
  width = patch.shape[0]
  tables = [k for k in state if k.startswith(prefix) and k.endswith('relative_position_bias_table')]
  columns = _need(state, tables[0], kind, 2).shape[1] if tables else None
  if heads is not None and heads < 1:
    raise UserError(f'--num-heads {heads}: at least 1.')
  if heads and columns and heads != columns:
    raise UserError(f'--num-heads {heads}, but the bias table has {columns} columns.')
  heads = columns or heads or width // 64
  if not heads or width % heads:
    raise UserError(f'a width of {width} does not divide into {heads} heads; say how many with --num-heads.')
  return dict(
    width=width,
    depth=depth(state, f'{prefix}blocks.'),
    heads=heads,
    mlp_ratio=_need(state, f'{prefix}blocks.0.mlp.fc1.weight', kind, 2).shape[0] / width,
    patch_size=patch.shape[-1],
    # The value only matters for fresh weights; what counts here is whether there are any.
    layer_scale=(0.1 if width < 1024 else 1e-5) if f'{prefix}blocks.0.gamma_1' in state else 0.0,
    rel_pos='shared' if f'{prefix}rel_pos_bias.relative_position_bias_table' in state else 'per_block' if tables else 'none',
    abs_pos=f'{prefix}pos_embed' in state,
    table_rows=state[tables[0]].shape[0] if tables else None,
    patches=_need(state, f'{prefix}pos_embed', kind, 3).shape[1] - 1 if f'{prefix}pos_embed' in state else None,
  )


def config_of(
  kind: str,
  state: State,
  heads: int | None = None,
  decoder_heads: int | None = None,
  grid: tuple[int, int] | None = None,
  early: int | None = None,
  out_indices: tuple[int, ...] | None = None,
) -> Any:
  """The config of a checkpoint of this kind. Raises UserError if it is another kind."""
  config = config_lib.base(kind).unlock()
  config.dtype = 'float32'
  backbone = vit(state, dict(tokenizer='encoder.', segmenter='backbone.').get(kind, ''), kind, heads)
  grid = grid_of(backbone.pop('patches'), backbone.pop('table_rows'), grid)
  with config.data.ignore_type():  # one number, or (h, w)
    config.data.image_size = grid[0] * backbone['patch_size'] if grid[0] == grid[1] else tuple(g * backbone['patch_size'] for g in grid)
  if kind == 'tokenizer':
    decoder = vit(state, 'decoder.', kind, decoder_heads)
    codes, dim = _need(state, 'quantize.embedding.weight', kind, 2).shape
    side = lambda x: {k: x[k] for k in ('width', 'depth', 'heads')}
    config.model = config_lib.tokenizer_model(
      patch_size=backbone['patch_size'], encoder=side(backbone), decoder=side(decoder), mlp_ratio=backbone['mlp_ratio'], codes=codes, code_dim=dim,
      teacher_width=_need(state, 'decode_task_layer.2.weight', kind, 2).shape[0],
    )  # fmt: skip
  elif kind == 'pretrain':
    layers = depth(state, 'cls_pt_layers.')
    early = max(backbone['depth'] - 3, 1) if early is None else early  # 9 of 12 and 21 of 24 in the official models
    if not 0 < early < max(backbone['depth'], 2):
      raise UserError(f'--early-layer {early}: a block before the last of {backbone["depth"]}, counted from 1.')
    vocab = _need(state, 'lm_head.weight', kind, 2).shape[0] if 'lm_head.weight' in state else 0
    config.model = config_lib.ConfigDict(
      backbone | dict(early_layer=early, head_layers=layers, shared_head='cls_pt_norm.weight' not in state, vocab=vocab)
    )
    _need(state, 'mask_token', kind, 3)
  elif kind == 'segmenter':
    classes, channels = _need(state, 'decode_head.conv_seg.weight', kind, 4).shape[:2]
    has_aux, pools = 'auxiliary_head.conv_seg.weight' in state, depth(state, 'decode_head.psp_modules.')
    if out_indices is None:  # 3 5 7 11 of 12, 7 11 15 23 of 24
      out_indices = tuple(round(backbone['depth'] * part) - 1 for part in (1 / 3, 1 / 2, 2 / 3, 1))
    if len(out_indices) != 4 or not 0 <= min(out_indices) <= max(out_indices) < backbone['depth']:
      raise UserError(f'--out-indices {out_indices}: four of the {backbone["depth"]} blocks, counted from 0.')
    config.model = config_lib.ConfigDict(
      backbone | dict(
        classes=classes, channels=channels, out_indices=tuple(out_indices), aux_channels=_need(state, 'auxiliary_head.conv_seg.weight', kind, 4).shape[1] if has_aux else 0,
        pool_scales=(1, 2, 3, 6)[:pools] if pools <= 4 else tuple(range(1, pools + 1)),
      )
    )  # fmt: skip
  else:
    _need(state, 'head.weight', kind, 2)
    config.model = config_lib.ConfigDict(backbone | dict(classes=state['head.weight'].shape[0], mean_pooling='fc_norm.weight' in state))
  return config.lock()
