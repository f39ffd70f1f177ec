"""Runs a study: every row with every seed, one stage after the other, each in a process of its own; what is done is not done again.

`OUT/teacher`, `OUT/random_teacher`; `OUT/tokenizers/NAME-SEED`, shared by rows that have the same one; `OUT/rows/ROW-SEED/pretrain`,
`finetune`, `segment` and `scores.json`, shared by tables; `OUT/TABLE/table.json`, `table.md` and `table.html`.

Several processes may work in one OUT, one for each GPU for example: who makes a row or a stage holds a lock on it (`NAME.lock`).
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax import recipes
from beitv2_jax.data import sources
from beitv2_jax.downstream import features, probes, segmentation, trained
from beitv2_jax.errors import RunFailed, UserError
from beitv2_jax.reports.page import Page
from beitv2_jax.studies.tables import ENCODER, RANDOM, Relative, Row, Table
from beitv2_jax.training import events, metrics

# What is reported of a row: (key, title, digits).
FIGURES = (
  ('codes_used', 'codes used %', 1),
  ('perplexity', 'perplexity', 1),
  ('rec_loss', '1 - cosine to the teacher', 3),
  ('finetune', 'fine-tuning %', 1),
  ('probe', 'linear probe %', 1),
  ('probe5', '5 labels a class %', 1),
  ('knn', 'k-NN %', 1),
  ('miou', 'mIoU %', 1),
)
PROBES = ('probe', 'probe5', 'knn')
GEOMETRY = ('data.image_size', 'model.patch_size')  # what a model's later stages must share


class OutOfTime(Exception):
  """The minutes that a study may take are over; what is done stays."""


@dataclasses.dataclass(frozen=True)
class Study:
  """`settings` hold for every stage, those called 'STAGE:KEY' for one. `recipe` is a file with the stages teacher, vqkd and pretrain, and
  finetune and segment for the scores of those names."""

  name: str
  table: Table
  out: Path
  seeds: int
  recipe: str = 'configs/demo.py'
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  scores: tuple[str, ...] = ('probe',)  # of 'probe', 'finetune' and 'segment'

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
    if not any(limits):
      return list(self.table.rows)
    data = self.config('pretrain').data
    images = len(sources.make(data.source, 'train', data.dir, data.holdout))
    return [row for row, limit in zip(self.table.rows, limits) if limit < images]

  def folder(self, row: Row, seed: int) -> Path:
    return self.out / 'rows' / f'{slug(row.name)}-{seed}'


def slug(name: str) -> str:
  return re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')


@functools.cache
def fingerprint() -> str:
  """Of the code that rows depend on."""
  package, digest = Path(recipes.__file__).parent, hashlib.sha256()
  folders = [package / name for name in ('models', 'tasks', 'training', 'data', 'kernels', 'downstream')] + [recipes.shipped()]
  for path in sorted(p for folder in folders for p in folder.glob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def left(study: Study) -> list[tuple[Row, int, Path]]:
  """The cells without all their scores. Raises UserError if those that have some were made by other code or settings."""
  return [(row, seed, folder) for row, seed, folder in study.cells() if not scores_of(study, folder)]


def scores_of(study: Study, folder: Path) -> dict[str, float]:
  """A cell's, or {} where some are missing that the study wants. Raises UserError if they were made by other code or settings."""
  if not (folder / 'scores.json').is_file():
    return {}
  made = json.loads((folder / 'scores.json').read_text())
  if made['code'] != fingerprint() or concerning(made['settings'], made['scores']) != concerning(written(study.settings), made['scores']):
    what = 'other code' if made['code'] != fingerprint() else 'other settings'
    raise UserError(
      f'{folder} was made by {what}: rows of one table must not differ in that. Give another --out, or --redo to make them all again.'
    )
  return made['scores'] if wanted(study) <= made['scores'].keys() else {}


def wanted(study: Study) -> set[str]:
  """The figures that every row must have."""
  keys = dict(probe=set(PROBES), finetune={'finetune'}, segment={'miou'})
  return set().union(*(keys[name] for name in study.scores))


def concerning(settings: dict[str, str], scores: dict[str, float]) -> dict[str, str]:
  """Without the settings of a stage that none of the scores is from: a score that is asked for later does not unmake the others."""
  others = [stage for stage, key in (('finetune', 'finetune'), ('segment', 'miou')) if key not in scores]
  return {k: v for k, v in settings.items() if k.partition(':')[0] not in others}


def written(settings: dict[str, Any]) -> dict[str, str]:
  return {k: str(v) for k, v in settings.items()}


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
  """Changes with the recipe's values where they are relative to them."""

  def value(key: str, change: Any) -> Any:
    if not isinstance(change, Relative):
      return change
    found = study.config(stage)
    for part in key.split('.'):
      found = found[part]
    return change.of(found)

  return {k: value(k, v) for k, v in changes.items()}


def changes_text(study: Study, stage: str, changes: dict[str, Any] | None) -> str:
  return json.dumps(resolved(study, stage, changes or {}), sort_keys=True)


@contextlib.contextmanager
def held(path: Path, deadline: float | None = None) -> Generator[bool]:
  """Holds `path`.lock, which the system lets go when the process ends, however it ends.

  Yields whether it is held: without a deadline another process that has it is not waited for. Raises OutOfTime at the deadline.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.with_name(f'{path.name}.lock').open('w') as file:
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if deadline is None:
          yield False
          return
      if time.monotonic() > deadline:
        raise OutOfTime
      time.sleep(1)
    yield True


def finished(workdir: Path) -> bool:
  return any(e['event'] == 'finished' for e in events.read(workdir))


def train(study: Study, stage: str, workdir: Path, changes: dict[str, Any], deadline: float = float('inf')) -> None:
  """One stage in a process of its own, unless it is finished; where another study is at it, waits for that.

  Raises UserError if other code or settings made what is there, RunFailed, and OutOfTime where it is stopped at the deadline.
  """
  with held(workdir, deadline):
    train_alone(study, stage, workdir, changes, deadline)


def train_alone(study: Study, stage: str, workdir: Path, changes: dict[str, Any], deadline: float) -> None:
  settings = {'samples': 0, 'eval_every': 0} | study.settings_of(stage) | changes
  made, now = workdir.parent / f'{workdir.name}.made.json', dict(code=fingerprint(), settings=written(settings))
  if workdir.exists() and (not made.is_file() or json.loads(made.read_text()) != now):
    raise UserError(f'{workdir} was made by other code or settings: give another --out, or --redo to make all of it again.')
  if finished(workdir):
    return
  if time.monotonic() > deadline:
    raise OutOfTime
  workdir.parent.mkdir(parents=True, exist_ok=True)
  made.write_text(json.dumps(now) + '\n')
  command = [sys.executable, '-m', 'beitv2_jax.main', f'--config={study.argument(stage)}', f'--workdir={workdir}']
  command += [f'--config.{k}={v}' for k, v in settings.items()]
  with (workdir.parent / f'{workdir.name}.log').open('a') as log:
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
      code = process.wait(None if deadline == float('inf') else max(deadline - time.monotonic(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
      process.send_signal(signal.SIGTERM)  # it saves, and goes on from there
      process.wait()
      raise (OutOfTime if isinstance(e, subprocess.TimeoutExpired) else KeyboardInterrupt) from None
  if code:
    last = (workdir.parent / f'{workdir.name}.log').read_text().splitlines()[-1:]
    raise RunFailed(f'{workdir} ended with code {code}: {" ".join(last)} (log: {workdir}.log)')


def score(study: Study, row: Row, seed: int, workdirs: dict[str, Path], images: dict) -> dict[str, float]:
  """The figures of a row whose stages are trained, at `workdirs`. `images` are kept from row to row."""
  found = dict(metrics.read(workdirs['vqkd'], 'eval')[-1]) if 'vqkd' in workdirs else {}
  if 'finetune' in workdirs:
    found['finetune'] = metrics.read(workdirs['finetune'], 'eval')[-1]['acc1']
  if 'segment' in workdirs:
    model = trained.load(workdirs['segment'])
    source = sources.make(model.config.data.source, 'eval', model.config.data.dir, model.config.data.holdout)
    found['miou'] = segmentation.evaluate(model, source, segmentation.labels_of(model.config))['miou']
  if 'probe' in study.scores:
    if row.student is None:
      config = study.config('pretrain').unlock()
      config.model.vocab, config.seed = 1, seed
      model = trained.Model(config, seed=seed)
    else:
      model = trained.load(workdirs['vqkd' if row.student == ENCODER else 'pretrain'])
    means, labels = {}, {}
    for split in ('train', 'eval'):
      config = study.config('pretrain').unlock()
      config.data.image_size = model.config.data.image_size
      if (key := (split, config.data.image_size)) not in images:
        images[key] = features.images_of(config, split)
      pixels, labels[split] = images[key]
      means[split] = features.last_block_means(model, pixels)
    found |= probes.scores(means['train'], labels['train'], means['eval'], labels['eval'])
  return {key: float(found[key]) for key, _, _ in FIGURES if key in found}


def cell(study: Study, row: Row, seed: int, folder: Path, images: dict, deadline: float = float('inf')) -> dict[str, float]:
  """Trains what a row needs, scores it, and keeps the scores."""
  began, stages = time.monotonic(), list(stages_of(study, row, seed))
  workdirs: dict[str, Path] = {}
  for stage, workdir, changes in stages:
    train(study, stage, workdir, changes, deadline)
    workdirs[stage] = workdir  # a row's own come after those that made its teacher
  own = {stage for stage, workdir in workdirs.items() if workdir.parent == folder or stage == 'vqkd' and row.tokenizer is not None}
  scores = score(study, row, seed, {stage: workdirs[stage] for stage in own}, images)
  folder.mkdir(parents=True, exist_ok=True)
  made = dict(
    row=row.name, seed=seed, code=fingerprint(), settings=written(study.settings), seconds=time.monotonic() - began, scores=scores
  )
  (folder / 'scores.tmp').write_text(json.dumps(made, indent=2) + '\n')
  (folder / 'scores.tmp').replace(folder / 'scores.json')
  return scores


def run(study: Study, say: Callable[[str], None], minutes: float = 0) -> None:
  """Every cell that is left, and the table after each; first those that no other process is at, then the others, should they be left over.

  Raises UserError, RunFailed, and OutOfTime after `minutes`, if any.
  """
  missing, images, elsewhere = left(study), {}, []
  deadline = time.monotonic() + 60 * minutes if minutes else float('inf')

  def make(number: int, row: Row, seed: int, folder: Path, wait: bool) -> bool:
    """Whether the cell is made, or was by another process meanwhile."""
    with held(folder, deadline if wait else None) as mine:
      if not mine:
        return False
      if scores := scores_of(study, folder):
        made = 'made by another process'
      else:
        began = time.monotonic()
        scores = cell(study, row, seed, folder, images, deadline)
        made = f'{time.monotonic() - began:.0f} s'
      told = '  '.join(f'{title} {scores[key]:.{digits}f}' for key, title, digits in FIGURES if key in scores)
      say(f'{number}/{len(missing)}  {row.name}, seed {seed}, {made}: {told}')
      summarize(study)
    return True

  for numbered in enumerate(missing, 1):
    if not make(numbered[0], *numbered[1], wait=False):
      elsewhere.append(numbered)
  for number, (row, seed, folder) in elsewhere:
    make(number, row, seed, folder, wait=True)
  summarize(study)


def forget(study: Study) -> None:
  """Removes the table, and all rows and stages: tables share them."""
  for name in (study.name, 'rows', 'tokenizers', 'teacher', 'random_teacher'):
    shutil.rmtree(study.out / name, ignore_errors=True)


def gathered(study: Study) -> dict[str, dict[str, list[float]]]:
  """{row: {figure: its values, one a seed}}, of what is done."""
  out: dict[str, dict[str, list[float]]] = {row.name: {} for row in study.rows}
  for row, _, folder in study.cells():
    if (folder / 'scores.json').is_file():
      for key, value in json.loads((folder / 'scores.json').read_text())['scores'].items():
        out[row.name].setdefault(key, []).append(value)
  return out


def cell_text(values: list[float], digits: int) -> str:
  if not values:
    return ''
  spread = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
  return f'{np.mean(values):.{digits}f}{spread}'


def table_rows(study: Study) -> tuple[list[str], list[list[str]]]:
  values = gathered(study)
  keys = [figure for figure in FIGURES if any(figure[0] in row for row in values.values())]
  rows = [[name, *(cell_text(row.get(key, []), digits) for key, _, digits in keys)] for name, row in values.items()]
  return ['', *(title for _, title, _ in keys)], rows


def markdown(study: Study) -> str:
  header, rows = table_rows(study)
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return '\n'.join([line(header), line(['---'] * len(header)), *map(line, rows)]) + '\n'


def summarize(study: Study) -> None:
  """table.json, table.md and table.html of what is done."""
  with held(study.out / study.name, float('inf')):
    write_table(study, study.out / study.name)


def write_table(study: Study, folder: Path) -> None:
  values = gathered(study)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.json').write_text(
    json.dumps(dict(question=study.table.question, seeds=study.seeds, code=fingerprint(), rows=values), indent=2) + '\n'
  )
  (folder / 'table.md').write_text(markdown(study))
  page = Page(f'Study: {study.name}')
  page.text(study.table.question)
  page.table(*table_rows(study))
  seeds = max((len(v) for row in values.values() for v in row.values()), default=0)
  page.text(f'Mean and standard deviation over {seeds} seed{"s" * (seeds != 1)}.')
  for key, title, _ in FIGURES:
    shown = {name: row[key] for name, row in values.items() if key in row}
    if shown:
      page.intervals(title, shown)
  page.save(folder / 'table.html')


def cost(study: Study) -> list[str]:
  """What is left to do, in words, without doing it."""
  missing, planned, lines = left(study), {}, []
  for row, seed, _ in missing:
    for stage, workdir, changes in stages_of(study, row, seed):
      if not finished(workdir):
        config = study.config(stage)
        length = f'{changes.get("steps", config.steps):,} steps' if 'steps' in changes or config.steps >= 0 else f'{config.epochs:g} epochs'
        planned[workdir] = (stage, length)
  for (stage, length), count in collections.Counter(planned.values()).items():
    lines.append(f'{count} x {stage} of {length}')
  done = [json.loads(p.read_text())['seconds'] for p in (study.out / 'rows').glob('*/scores.json')]
  if done:
    lines.append(
      f'{len(missing)} rows at {np.mean(done):.0f} s, as the {len(done)} that are done took: {len(missing) * np.mean(done) / 60:.0f} min'
    )
  return lines or ['nothing is left to do']
