"""The official PyTorch checkpoints: every key, where it goes here, and how its array is laid out. Both directions.

Kinds: tokenizer, pretrain, classifier. A key without a home is an error unless the official code itself drops it.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from beitv2_jax import handoff
from beitv2_jax.errors import UserError

Array = np.ndarray


def _linear(heads: int) -> tuple[Callable, Callable]:
  return np.transpose, np.transpose


def _same(heads):
  return (lambda w: w), (lambda w: w)


def _conv(heads):
  return (lambda w: w.transpose(2, 3, 1, 0)), (lambda w: w.transpose(3, 2, 0, 1))


def _qkv(heads):
  """[3D, D] → [D, 3, H, D/H]."""
  return (
    lambda w: w.reshape(3, heads, -1, w.shape[1]).transpose(3, 0, 1, 2),
    lambda w: w.transpose(1, 2, 3, 0).reshape(-1, w.shape[0]),
  )


def _proj(heads):
  """[D, D] → [H, D/H, D]."""
  return (lambda w: w.T.reshape(heads, -1, w.shape[0])), (lambda w: w.reshape(-1, w.shape[-1]).T)


def _heads(heads):
  return (lambda w: w.reshape(heads, -1)), (lambda w: w.reshape(-1))


_NORM = [('weight', 'scale', _same), ('bias', 'bias', _same)]
_LINEAR = [('weight', 'kernel', _linear), ('bias', 'bias', _same)]
_CONV = [('weight', 'kernel', _conv), ('bias', 'bias', _same)]


def _under(theirs: str, ours: str, rows: list) -> list:
  return [(f'{theirs}.{a}', f'{ours}/{b}', layout) for a, b, layout in rows]


_BLOCK = [
  *_under('norm1', 'norm1', _NORM),
  *_under('norm2', 'norm2', _NORM),
  ('attn.qkv.weight', 'attn/qkv', _qkv),
  ('attn.q_bias', 'attn/q_bias', _heads),
  ('attn.v_bias', 'attn/v_bias', _heads),
  ('attn.proj.weight', 'attn/proj', _proj),
  ('attn.proj.bias', 'attn/proj_bias', _same),
  ('attn.relative_position_bias_table', 'attn/rel_pos_bias/table', _same),
  *_under('mlp.fc1', 'fc1', _LINEAR),
  *_under('mlp.fc2', 'fc2', _LINEAR),
  ('gamma_1', 'gamma1', _same),
  ('gamma_2', 'gamma2', _same),
]
_VIT = [
  ('cls_token', 'cls_token', _same),
  ('mask_token', 'mask_token', _same),
  ('pos_embed', 'pos_embed', _same),
  ('rel_pos_bias.relative_position_bias_table', 'rel_pos_bias/table', _same),
  *_under('patch_embed.proj', 'patch_embed', _CONV),
  *_under('blocks.#', 'block_#', _BLOCK),
]
_PATCH_ENCODER = [*((a, f'vit/{b}', layout) for a, b, layout in _VIT), *_under('fc_norm', 'norm', _NORM)]

# (official key, our path under the variables, layout); # stands for a block's number.
TABLES = {
  'tokenizer': [
    *_under('encoder', 'params/encoder', _PATCH_ENCODER),
    *_under('decoder', 'params/decoder', _PATCH_ENCODER),
    *_under('encode_task_layer.0', 'params/encode_head/fc1', _LINEAR),
    *_under('encode_task_layer.2', 'params/encode_head/fc2', _LINEAR),
    *_under('decode_task_layer.0', 'params/decode_head/fc1', _LINEAR),
    *_under('decode_task_layer.2', 'params/decode_head/fc2', _LINEAR),
    ('quantize.embedding.weight', 'codebook/quantizer/embedding', _same),
    ('quantize.embedding.cluster_size', 'codebook/quantizer/cluster_size', _same),
    ('quantize.cluster_size', 'codebook/quantizer/usage', _same),
  ],
  'pretrain': [
    *((a, f'params/backbone/{b}', layout) for a, b, layout in _VIT),
    *_under('norm', 'params/norm', _NORM),
    *_under('lm_head', 'params/lm_head', _LINEAR),
    *_under('cls_pt_layers.#', 'params/aggregation_#', _BLOCK),
    *_under('cls_pt_norm', 'params/aggregation_norm', _NORM),
    *_under('cls_pt_lm_head', 'params/aggregation_lm_head', _LINEAR),
  ],
  'classifier': [
    *((a, f'params/backbone/{b}', layout) for a, b, layout in _VIT),
    *_under('norm', 'params/norm', _NORM),
    *_under('fc_norm', 'params/fc_norm', _NORM),
    *_under('head', 'params/head', _LINEAR),
  ],
}
# What the official loaders drop: buffers that are computed, the teacher, dead fields of the quantizer.
DROPPED = {
  'tokenizer': r'loss.*|teacher.*|scaling.*|quantize\.embedding\.(embed_avg|initted)|.*relative_position_index',
  'pretrain': r'.*relative_position_index',
  'classifier': r'.*relative_position_index',
}


def _compiled(kind: str, reverse: bool) -> Iterator[tuple[re.Pattern, str, Callable]]:
  for theirs, ours, layout in TABLES[kind]:
    source, target = (ours, theirs) if reverse else (theirs, ours)
    yield re.compile(re.escape(source).replace(r'\#', '#').replace('#', r'(\d+)')), target, layout


def home(kind: str, key: str) -> str | None:
  """Where an official key goes: a path of ours, '' if it is dropped, None if it has no home."""
  if re.fullmatch(DROPPED[kind], key):
    return ''
  for pattern, target, _ in _compiled(kind, reverse=False):
    found = pattern.fullmatch(key)
    if found:
      return target.replace('#', *found.groups()) if found.groups() else target
  return None


def _head_count(name: str, heads: dict[str, int]) -> int:
  return heads['decoder' if name.startswith(('decoder', 'params/decoder')) else 'encoder']


def to_ours(kind: str, state: dict[str, Array], heads: dict[str, int]) -> dict[str, Any]:
  """Official state dict → our variables, a nested dict. `heads`: {'encoder': H, 'decoder': H of the tokenizer's decoder}.

  Raises UserError for keys without a home, all of them named.
  """
  flat, homeless = {}, []
  rules = list(_compiled(kind, reverse=False))
  for key, value in state.items():
    if re.fullmatch(DROPPED[kind], key):
      continue
    for pattern, target, layout in rules:
      found = pattern.fullmatch(key)
      if found:
        path = target.replace('#', *found.groups()) if found.groups() else target
        flat[path] = np.ascontiguousarray(layout(_head_count(key, heads))[0](np.asarray(value, np.float32)))
        break
    else:
      homeless.append(key)
  if homeless:
    raise UserError(
      f'{len(homeless)} keys have no place in a {kind} model: {", ".join(sorted(homeless)[:6])}. Is it another kind, or another model?'
    )
  return handoff.unflatten(flat)


def from_ours(kind: str, variables: dict[str, Any]) -> dict[str, Array]:
  """Our variables → official keys and layouts; the inverse of `to_ours`."""
  rules, out = list(_compiled(kind, reverse=True)), {}
  for path, value in handoff.flatten(variables).items():
    for pattern, target, layout in rules:
      found = pattern.fullmatch(path)
      if found:
        key = target.replace('#', *found.groups()) if found.groups() else target
        out[key] = np.ascontiguousarray(layout(0)[1](np.asarray(value)))
        break
    else:
      raise UserError(f'{path} has no official name; is this a {kind} model?')
  return out
