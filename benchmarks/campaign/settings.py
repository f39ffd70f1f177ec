"""Settings at random: each shipped recipe at smoke size with one to three settings changed, to what its range allows and to what it does not.

The values are made from beitv2_jax/settings.py, so a new setting is attacked the day it gets its line there.
"""

import math
from typing import Any

import numpy as np

from beitv2_jax import settings

STRANGE = (
  None,
  True,
  -1,
  0,
  1,
  2**31,
  -(2**40),
  1e300,
  -0.5,
  math.nan,
  math.inf,
  '',
  'x',
  '\0',
  (),
  (1,),
  ('a', 'b'),
  (0, 0),
  [],
  {'a': 1},
)
FREE = ('task', 'data.source', 'data.dir', 'init_from', 'tokenizer_from', 'teacher.name', 'model.vocab', 'model.teacher_width')
SMALL = 12  # numbers allowed are tried up to so much above their low end: the machine is not what is tested


def values(rule: Any, rng: np.random.Generator) -> Any:
  """A value at random: usually one that `rule` allows."""
  if rng.random() < 0.35:
    return STRANGE[rng.integers(len(STRANGE))]
  if isinstance(rule, settings.Number):
    low = rule.low if math.isfinite(rule.low) else -10.0
    high = min(rule.high, low + SMALL)
    if rule.whole:
      return int(rng.choice([low, low + 1, low - 1, high, rng.integers(int(low), int(high) + 1)]))
    return float(rng.choice([low, high, low - 1e-3, np.nextafter(low, high), rng.uniform(low, high), 1e-30]))
  if isinstance(rule, settings.Choice):
    return str(rng.choice(rule.values))
  if isinstance(rule, settings.Flag):
    return bool(rng.integers(2))
  if isinstance(rule, settings.Several):
    length = rule.length if rule.length is not None and rng.random() < 0.8 else int(rng.integers(0, 5))
    return tuple(values(rule.item, rng) for _ in range(length))
  if isinstance(rule, settings.OneOrPair):
    return int(rng.choice([8, 16, 24, 40, 7])) if rng.random() < 0.5 else (int(rng.choice([16, 32, 1])), int(rng.choice([16, 48])))
  if isinstance(rule, settings.AxisRule):
    return str(rng.choice(['heads', 'mlp', 'vocab', 'embed', 'nothing'])), rng.choice(['data', 'model', None, 'x'])
  return str(rng.choice(['', 'x', '.*', '(', '{}', '{0}', '{a}', '/nowhere', 'ä b']))


def change(config: Any, rng: np.random.Generator) -> dict[str, Any]:
  """Changes one to three settings of an unlocked `config` in place. Returns them."""
  paths = [path for path, _ in settings.leaves(config) if path not in FREE and settings.rule(path) is not None]
  changed = {}
  for path in rng.choice(paths, int(rng.integers(1, 4)), replace=False):
    *parents, last = path.split('.')
    section = config
    for parent in parents:
      section = section[parent]
    value = values(settings.rule(path), rng)
    with section.ignore_type():
      section[last] = value
    changed[str(path)] = value
  return changed
