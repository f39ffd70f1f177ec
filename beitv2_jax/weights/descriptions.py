"""What Hugging Face and timm write beside weights: how images are prepared, and what the classes are called."""

import json
from pathlib import Path
from typing import Any

from beitv2_jax.errors import UserError
from beitv2_jax.models.images import statistics

OUT_INDICES = 'beitv2_jax_out_indices'  # in config.json: the blocks that a segmenter reads, from 0


def apply(config: Any, source: Path) -> None:
  """Takes what stands beside the weights in `source`, a directory or a file in one, over into an imported model's config."""
  folder = source if source.is_dir() else source.parent
  theirs, preparation = (_json(folder / name) for name in ('config.json', 'preprocessor_config.json'))
  if theirs.get('model_type') != 'beit' and 'pretrained_cfg' not in theirs:
    return  # a config.json of something else
  more = theirs.get('pretrained_cfg')
  preparation |= more if isinstance(more, dict) else {}
  with config.unlocked(), config.data.ignore_type():
    for ours, names in dict(mean=('image_mean', 'mean'), std=('image_std', 'std')).items():
      values = next((preparation[n] for n in names if n in preparation), None)
      if isinstance(values, (list, tuple)) and len(values) == 3:
        config.data[ours] = tuple(map(float, values))
    size, crop = (preparation.get(name) or {} for name in ('size', 'crop_size'))
    if (
      preparation.get('do_center_crop')
      and isinstance(size, dict)
      and isinstance(crop, dict)
      and 'shortest_edge' in size
      and 'height' in crop
    ):
      config.data.crop_pct = min(crop['height'] / size['shortest_edge'], 1.0)
    elif isinstance(preparation.get('crop_pct'), float):
      config.data.crop_pct = preparation['crop_pct']
    labels, classes = theirs.get('id2label') or {}, config.model.get('classes', 0)
    names = list(theirs.get('label_names') or [labels[str(i)] for i in range(len(labels)) if str(i) in labels])
    if len(names) == classes and config.task in ('classifier', 'segmenter') and len(set(names)) == classes:
      config.class_names = tuple(map(str, names))


def sizes(source: Path, width: int) -> dict[str, Any]:
  """What no array tells of a model of this width and its config.json does: `heads`, and `out_indices` if we wrote it (others count them in
  other ways). Nothing if it describes a model of another width, which happens to lie there."""
  theirs = _json((source if source.is_dir() else source.parent) / 'config.json')
  found = dict(out_indices=theirs.get(OUT_INDICES))
  model = theirs.get('model_args')
  if theirs.get('model_type') == 'beit' and theirs.get('hidden_size') == width:
    found |= dict(heads=theirs.get('num_attention_heads'))
  elif isinstance(model, dict) and model.get('embed_dim') == width:
    found |= dict(heads=model.get('num_heads'))
  whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
  heads, taps = found.get('heads'), found['out_indices']
  return dict(
    heads=heads if whole(heads) and heads else None,
    out_indices=tuple(taps) if isinstance(taps, list) and len(taps) == 4 and all(map(whole, taps)) else None,
  )


def _json(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f'{path} is damaged ({e}).') from e
  return found if isinstance(found, dict) else {}


def for_timm(config: Any, grid: tuple[int, int]) -> dict[str, Any]:
  """The config.json of a classifier for timm's `local-dir:`."""
  model, (mean, std) = config.model, statistics(config)
  side = [n * model.patch_size for n in grid]
  size = dict(
    img_size=side, patch_size=model.patch_size, embed_dim=model.width, depth=model.depth, num_heads=model.heads, mlp_ratio=model.mlp_ratio,
    use_abs_pos_emb=model.abs_pos, use_rel_pos_bias=model.rel_pos == 'per_block', use_shared_rel_pos_bias=model.rel_pos == 'shared',
    init_values=model.layer_scale or None, global_pool='avg' if model.get('mean_pooling', True) else 'token',
  )  # fmt: skip
  pretrained = dict(
    input_size=[3, *side], fixed_input_size=True, interpolation='bicubic', crop_pct=config.data.get('crop_pct', 0.875), crop_mode='center', mean=list(mean),
    std=list(std), num_classes=model.classes, first_conv='patch_embed.proj', classifier='head',
  )  # fmt: skip
  described = dict(
    architecture='beitv2_base_patch16_224', num_classes=model.classes, num_features=model.width, pretrained_cfg=pretrained, model_args=size
  )
  names = list(config.get('class_names') or ())
  return described | (dict(label_names=names) if names else {})
