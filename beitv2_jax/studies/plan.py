"""What a study trains: its rows with every seed, and the stages that each of them needs.

`OUT/teacher`, `OUT/random_teacher`; `OUT/tokenizers/NAME-SEED`, shared by rows that have the same one; `OUT/rows/ROW-SEED/pretrain`,
`finetune`, `segment` and `scores.json`, shared by tables.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beitv2_jax import recipes
from beitv2_jax.data import sources
from beitv2_jax.errors import UserError
from beitv2_jax.studies.tables import ENCODER, RANDOM, Relative, Row, Table
from beitv2_jax.training.setup import planned_steps

STAGES = ('teacher', 'vqkd', 'pretrain', 'finetune', 'segment')
GEOMETRY = ('data.image_size', 'model.patch_size')  # what a model's later stages must share


@dataclasses.dataclass(frozen=True)
class Study:
  """`settings` hold for every stage, those called 'STAGE:KEY' for one. `recipe` is a file with the stages teacher, vqkd and pretrain, and
  finetune and segment for the scores of those names. Only rows whose names contain `only` are made. Raises UserError for another stage."""

  name: str
  table: Table
  out: Path
  seeds: int
  recipe: str = 'configs/demo.py'
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  scores: tuple[str, ...] = ('probe',)  # of 'probe', 'finetune' and 'segment'
  only: str = ''

  def __post_init__(self):
    for key in self.settings:
      if ':' in key and key.partition(':')[0] not in STAGES:
        raise UserError(f'--set {key}: no stage {key.partition(":")[0]}; there are {", ".join(STAGES)}.')

  def config(self, stage: str, changes: dict[str, Any] | None = None) -> Any:
    """The recipe of a stage as it is trained. Raises UserError for a stage that it has not."""
    settings = self.settings_of(stage) | (changes or {})
    try:
      return recipes.from_arguments([f'--config={self.argument(stage)}', *(f'--config.{k}={v}' for k, v in settings.items())])
    except UserError as e:
      raise UserError(f'{self.recipe} as stage={stage}: {e}') from e

  def argument(self, stage: str) -> str:
    """What --config takes: FILE:stage=STAGE, or FILE:OTHER,stage=STAGE where the recipe was given arguments."""
    file, _, arguments = self.recipe.partition(':')
    return f'{file}:{",".join(filter(None, (arguments, f"stage={stage}")))}'

  def settings_of(self, stage: str) -> dict[str, Any]:
    general = {k: v for k, v in self.settings.items() if ':' not in k}
    return general | {k.partition(':')[2]: v for k, v in self.settings.items() if k.startswith(f'{stage}:')}

  def cells(self) -> Iterator[tuple[Row, int, Path]]:
    """Every row with every seed, and where its scores go. Seeds are the outer loop: a study that is cut short has whole tables."""
    for seed in range(self.seeds):
      for row in self.rows:
        yield row, seed, self.folder(row, seed)

  @functools.cached_property
  def rows(self) -> list[Row]:
    """The table's, less those that ask for as many images as there are."""
    limits = [row.student.get('data.limit', 0) if isinstance(row.student, dict) else 0 for row in self.table.rows]
    return [row for row, limit in zip(self.table.rows, limits) if not limit or limit < self.images]

  @functools.cached_property
  def images(self) -> int:
    """How many there are to train on."""
    data = self.config('pretrain').data
    return len(sources.make(data.source, 'train', data.dir, data.holdout))

  def folder(self, row: Row, seed: int) -> Path:
    return self.out / 'rows' / f'{slug(row.name)}-{seed}'


def slug(name: str) -> str:
  return re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')


CODE = ('models', 'tasks', 'training', 'data', 'kernels', 'downstream', 'weights', 'studies')


def fingerprint(recipe: str) -> str:
  """Of the code that rows depend on, and of the recipe with its arguments."""
  package, (file, _, arguments) = Path(recipes.__file__).parent, recipes.resolve(recipe).partition(':')
  paths = [
    package / 'config.py',
    Path(file),
    *(p for folder in [*(package / name for name in CODE), recipes.shipped()] for p in folder.glob('*.py')),
  ]
  digest = hashlib.sha256(arguments.encode())
  for path in sorted(paths):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def stages_of(study: Study, row: Row, seed: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
  """(stage, workdir, changes) that a row needs to be scored, in order."""
  folder = study.folder(row, seed)
  student = row.student if isinstance(row.student, dict) else None
  target = student.get('target', 'codes') if student is not None else ''
  taught: dict[str, Any] = {}
  if row.tokenizer is not None or target == 'features':
    before, taught = teaching(study, row, seed)
    yield from before
  tokenizer = study.out / 'tokenizers' / f'{teacher_name(row)}-{slug(changes_text(study, "vqkd", row.tokenizer)) or "recipe"}-{seed}'
  if row.tokenizer is not None:
    yield 'vqkd', tokenizer, {'seed': seed} | taught | resolved(study, 'vqkd', row.tokenizer)
  own: dict[str, Any] = {'seed': seed}  # of what comes after
  if row.student == ENCODER:
    encoder = study.config('vqkd').model.encoder
    own |= {'init_from': tokenizer, 'model.abs_pos': True, 'model.rel_pos': 'none', 'model.layer_scale': 0.0}
    own |= {f'model.{k}': encoder[k] for k in ('width', 'depth', 'heads')}
  elif student is not None:
    changes = resolved(study, 'pretrain', student)
    handed = {'tokenizer_from': tokenizer} if target == 'codes' else taught
    yield 'pretrain', folder / 'pretrain', {'seed': seed} | handed | changes
    own |= {'init_from': folder / 'pretrain'} | {k: v for k, v in changes.items() if k in GEOMETRY}
  else:
    own |= {'optim.layer_decay': 1.0}  # fresh blocks all learn at the same rate
  if 'finetune' in study.scores:
    yield 'finetune', folder / 'finetune', own
  if 'segment' in study.scores:
    yield 'segment', folder / 'segment', {k: v for k, v in own.items() if k != 'data.image_size'}


def teacher_name(row: Row) -> str:
  return row.teacher if isinstance(row.teacher, str) else slug(row.teacher.name)


def teaching(study: Study, row: Row, seed: int) -> tuple[list[tuple[str, Path, dict[str, Any]]], dict[str, Any]]:
  """(stages that make the row's teacher, what the next stage is told of it)."""
  if isinstance(row.teacher, str):
    workdir = study.out / ('random_teacher' if row.teacher == RANDOM else 'teacher')
    return [('teacher', workdir, {'steps': 0} if row.teacher == RANDOM else {})], {'teacher.name': workdir / 'hf'}
  stage = 'finetune' if row.teacher.student is None else 'pretrain'
  needed = dataclasses.replace(study, scores=(stage,) if stage == 'finetune' else ())
  workdir = study.folder(row.teacher, seed) / stage
  return list(stages_of(needed, row.teacher, seed)), {'teacher.kind': 'stage', 'teacher.name': workdir}


def resolved(study: Study, stage: str, changes: dict[str, Any]) -> dict[str, Any]:
  """Changes with the recipe's values where they are relative to them; with fewer images, as many steps as with all of them."""

  def value(key: str, change: Any) -> Any:
    if not isinstance(change, Relative):
      return change
    found = study.config(stage)
    for part in key.split('.'):
      found = found[part]
    return change.of(found)

  found = {k: value(k, v) for k, v in changes.items()}
  if found.get('data.limit') and (config := study.config(stage)).steps < 0:  # its length is in epochs
    steps, warmup = planned_steps(config, study.images)
    found |= {'steps': steps, 'optim.warmup_steps': warmup}
  return found


def changes_text(study: Study, stage: str, changes: dict[str, Any] | None) -> str:
  return json.dumps(resolved(study, stage, changes or {}), sort_keys=True)
