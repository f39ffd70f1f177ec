"""What each setting of a recipe may be: one table, looked at before anything is read, made or compiled.

A setting is found by its path in the config (`optim.lr`); those of models by their last name wherever they stand (`model.width` is also
`model.encoder.width`). A new setting gets its line here; a test finds those without.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax.errors import UserError

MAX_STEPS = 10**9  # more would not fit the 32 bits that count them


@dataclasses.dataclass(frozen=True)
class Number:
  """From `low` to `high`, or only `above` and `below`."""

  low: float = -math.inf
  high: float = math.inf
  whole: bool = False
  above: bool = False  # low itself is not allowed
  below: bool = False  # high itself is not allowed

  def allows(self, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)) or not math.isfinite(value):
      return False
    return (value > self.low if self.above else value >= self.low) and (value < self.high if self.below else value <= self.high)

  def __str__(self) -> str:
    if not math.isfinite(self.low):
      return 'a number'
    lower = f'{"above" if self.above else "at least"} {self.low:g}'
    upper = f' and {"below" if self.below else "at most"} {self.high:g}' if math.isfinite(self.high) else ''
    return f'{"a whole number" if self.whole else "a number"}, {lower}{upper}'


@dataclasses.dataclass(frozen=True)
class Choice:
  values: tuple[str, ...]

  def allows(self, value: Any) -> bool:
    return value in self.values

  def __str__(self) -> str:
    return 'one of ' + ', '.join(map(repr, self.values))


@dataclasses.dataclass(frozen=True)
class Flag:
  def allows(self, value: Any) -> bool:
    return isinstance(value, bool)

  def __str__(self) -> str:
    return 'True or False'


@dataclasses.dataclass(frozen=True)
class Text:
  def allows(self, value: Any) -> bool:
    return isinstance(value, str) and '\0' not in value

  def __str__(self) -> str:
    return 'text'


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple whose items are all like `item`: `length` of them, or any number; a `rising` one does not fall."""

  item: Any
  length: int | None = None
  rising: bool = False

  def allows(self, value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or (self.length is not None and len(value) != self.length):
      return False
    return all(map(self.item.allows, value)) and not (self.rising and list(value) != sorted(value))

  def __str__(self) -> str:
    return f'a tuple of {self.length or "any number of"} items{", rising" * self.rising}, each {self.item}'


@dataclasses.dataclass(frozen=True)
class OneOrPair:
  """A side, or (height, width)."""

  item: Number

  def allows(self, value: Any) -> bool:
    return self.item.allows(value) or Several(self.item, 2).allows(value)

  def __str__(self) -> str:
    return f'{self.item}, or a pair (height, width) of them'


@dataclasses.dataclass(frozen=True)
class Pattern(Text):
  """A regular expression."""

  def allows(self, value: Any) -> bool:
    try:
      return super().allows(value) and re.compile(value) is not None
    except re.error:
      return False

  def __str__(self) -> str:
    return 'a regular expression'


@dataclasses.dataclass(frozen=True)
class AxisRule:
  """(logical axis of a parameter, mesh axis or None)."""

  def allows(self, value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
      return False
    return isinstance(value[0], str) and value[1] in ('data', 'model', None)

  def __str__(self) -> str:
    return "a pair such as ('heads', 'model'): an axis of parameters, and 'data', 'model' or None"


def count(low: int, high: float = 10**6) -> Number:
  return Number(low, high, whole=True)


SHARE, POSITIVE_SHARE, SHARE_BELOW_1 = Number(0, 1), Number(0, 1, above=True), Number(0, 1, below=True)
POSITIVE, NOT_NEGATIVE = Number(0, above=True), Number(0)
RATIO = Number(0.01, 100)  # of two sides: what is beyond makes boxes of no pixel, or of more than memory holds
FLOATS = Choice(('bfloat16', 'float32'))

SETTINGS: dict[str, Any] = {
  'task': Choice(('clip', 'tokenizer', 'pretrain', 'classifier', 'segmenter', 'pixels')),
  'seed': count(0, 2**31 - 1),
  'init_from': Text(),
  'tokenizer_from': Text(),
  'dtype': FLOATS,
  'tokenizer_dtype': FLOATS,
  'batch_size': count(1),
  'epochs': Number(0, 10**6),
  'steps': count(-1, MAX_STEPS),
  'accumulate': count(1),
  'quick_compile': Flag(),
  'quick_steps': count(-1, MAX_STEPS),
  'log_every': count(1, MAX_STEPS),
  'profile_steps': count(0),
  'samples': count(0, 64),
  'track': Choice(('', 'wandb', 'mlflow', 'trackio')),
  'eval_every': count(0, MAX_STEPS),
  'eval_batch_size': count(0),
  'data.source': Text(),
  'data.dir': Text(),
  'data.holdout': POSITIVE_SHARE,
  'data.limit': count(0, 2**40),
  'data.image_size': OneOrPair(count(1, 16384)),
  'data.crop_scale': Several(Number(1e-4, 1), 2, rising=True),
  'data.crop_ratio': Several(RATIO, 2, rising=True),
  'data.crop_pct': Number(0.1, 1),  # the resize is size / crop_pct
  'data.flip': Flag(),
  'data.resize': Choice(('fast', 'pillow')),
  'data.resize_ratio': Several(RATIO, 2, rising=True),
  'data.mean': Several(Number(), 3),
  'data.std': Several(POSITIVE, 3),
  'data.value_range': Several(Number()),
  'data.channels': Several(count(0, 1000)),
  'data.max_bad': SHARE,
  'data.workers': count(-1, 1024),
  'optim.schedule': Choice(('cosine', 'linear')),
  'optim.lr': Number(0, 1000),
  'optim.min_lr': Number(0, 1000),
  'optim.warmup_epochs': Number(0, 10**6),
  'optim.warmup_steps': count(-1, MAX_STEPS),
  'optim.b1': SHARE_BELOW_1,
  'optim.b2': SHARE_BELOW_1,
  'optim.eps': POSITIVE_SHARE,
  'optim.first_moment': FLOATS,
  'optim.weight_decay': Number(0, 1000),
  'optim.clip_norm': NOT_NEGATIVE,
  'optim.layer_decay': POSITIVE_SHARE,
  'optim.no_decay': Several(Pattern()),
  'mesh.data': count(-1),
  'mesh.model': count(1),
  'mesh.rules': Several(AxisRule()),
  'mesh.shard_state': Flag(),
  'layers.scan': Flag(),
  'layers.remat': Choice(('none', 'dots', 'full')),
  'layers.attention': Choice(('auto', 'xla', 'tpu', 'gpu')),
  'checkpoint.every': count(1, MAX_STEPS),
  'checkpoint.keep': count(1),
  'checkpoint.keep_every': count(0, MAX_STEPS),
  'model.width': count(1, 65536),
  'model.depth': count(1, 1000),
  'model.heads': count(1, 65536),
  'model.patch_size': count(1, 1024),
  'model.mlp_ratio': Number(0, 64, above=True),
  'model.layer_scale': Number(0, 1000),
  'model.drop_path': SHARE_BELOW_1,
  'model.dropout': SHARE_BELOW_1,
  'model.early_layer': count(1, 1000),
  'model.head_layers': count(0, 1000),
  'model.shared_head': Flag(),
  'model.init_scheme': Choice(('normal', 'truncated', 'torch')),
  'model.aggregation_init': Choice(('torch', 'truncated')),
  'model.vocab': count(0, 2**24),
  'model.codes': count(2, 2**24),
  'model.code_dim': count(1, 65536),
  'model.quantizer': Choice(('ema', 'simvq', 'fsq')),
  'model.gradient': Choice(('straight_through', 'rotation')),
  'model.levels': Several(count(2, 1000)),
  'model.decay': SHARE,
  'model.teacher_width': count(0, 65536),
  'model.abs_pos': Flag(),
  'model.rel_pos': Choice(('none', 'per_block', 'shared')),
  'model.mean_pooling': Flag(),
  'model.head_scale': Number(0, 1000),
  'model.classes': count(0, 65535),
  'model.out_indices': Several(count(0, 999), 4, rising=True),
  'model.channels': count(1, 65536),
  'model.aux_channels': count(0, 65536),
  'model.pool_scales': Several(count(1, 64)),
  'model.projection': count(1, 65536),
  'model.text_length': count(3, 10000),
  'target': Choice(('codes', 'features', 'pixels')),
  'mask.kind': Choice(('block', 'random')),
  'mask.count': count(1),
  'mask.min_block': count(1),
  'mask.max_block': count(0),
  'mask.min_aspect': Number(0.01, 1),
  'color_jitter': SHARE,
  'color_jitter_on': Choice(('host', 'device')),
  'teacher.kind': Choice(('clip', 'open_clip', 'siglip', 'dino', 'dinov2', 'dinov3', 'timm', 'stage', 'python', 'disk', 'untrained')),
  'teacher.name': Text(),
  'teacher.layers': Several(count(1, 1000)),
  'codebook.kmeans': Flag(),
  'codebook.kmeans_samples': count(0, MAX_STEPS),
  'codebook.beta': NOT_NEGATIVE,
  'codebook.revive': SHARE,
  'class_names': Several(Text()),
  'fresh_head': Flag(),
  'rand_augment': Number(0, 10),
  'random_erasing': SHARE,
  'mixup': Number(0, 1000),
  'cutmix': Number(0, 1000),
  'label_smoothing': SHARE_BELOW_1,
  'ema_decay': SHARE_BELOW_1,
  'labels.reduce_zero': Flag(),
  'labels.ignore': Several(count(0, 65535)),
  'labels.values': Several(count(0, 65535)),
  'labels.any': Flag(),
  'aux_weight': NOT_NEGATIVE,
  'average_over_ignored': Flag(),
  'caption': Text(),
  'shuffled': Flag(),
}


def leaves(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(path, value) of all settings."""
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict) and rule(f'{prefix}{key}') is None:
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def rule(path: str) -> Any:
  """What the setting at `path` may be; None if the table does not know it, as one of somebody's own task."""
  first, _, rest = path.partition('.')
  return SETTINGS.get(f'model.{rest.rpartition(".")[2]}' if first == 'model' else path)


def check(config: ConfigDict) -> None:
  """Raises UserError for the first setting that is not what it may be."""
  for path, value in leaves(config):
    allowed = rule(path)
    if allowed is not None and not allowed.allows(value):
      raise UserError(f'{path}={" ".join(repr(value).split())}: {allowed}.')
