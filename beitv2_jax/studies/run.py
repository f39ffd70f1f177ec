"""Runs a study: every row with every seed, one stage after the other, each in a process of its own; what is done is not done again.

`OUT/teacher`, `OUT/random_teacher`; `OUT/tokenizers/NAME-SEED`, shared by rows that have the same one; `OUT/TABLE/ROW-SEED/pretrain` and
`OUT/TABLE/ROW-SEED/scores.json`; `OUT/TABLE/table.json`, `table.md` and `table.html`.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax import recipes
from beitv2_jax.downstream import features, probes, trained
from beitv2_jax.errors import RunFailed, UserError
from beitv2_jax.reports.page import Page
from beitv2_jax.studies.tables import Row, Table
from beitv2_jax.training import events, metrics

# What is reported of a row: (key, title, digits).
FIGURES = (
  ('codes_used', 'codes used %', 1),
  ('perplexity', 'perplexity', 1),
  ('rec_loss', '1 - cosine to the teacher', 3),
  ('probe', 'linear probe %', 1),
  ('probe5', '5 labels a class %', 1),
  ('knn', 'k-NN %', 1),
)


@dataclasses.dataclass(frozen=True)
class Study:
  """`settings` hold for every stage. `recipe` is a file with the stages teacher, vqkd and pretrain."""

  name: str
  table: Table
  out: Path
  seeds: int
  recipe: str = 'configs/demo.py'
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)

  def config(self, stage: str) -> Any:
    return recipes.from_arguments([f'--config={self.recipe}:stage={stage}'])

  def cells(self) -> Iterator[tuple[Row, int, Path]]:
    """Every row with every seed, and where its scores go. Seeds are the outer loop: a study that is cut short has whole tables."""
    for seed in range(self.seeds):
      for row in self.table.rows:
        yield row, seed, self.out / self.name / f'{slug(row.name)}-{seed}'


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
  """The cells without scores. Raises UserError if those that have some were made by other code or settings."""
  missing = []
  for row, seed, folder in study.cells():
    if not (folder / 'scores.json').is_file():
      missing.append((row, seed, folder))
      continue
    made = json.loads((folder / 'scores.json').read_text())
    if made['code'] != fingerprint() or made['settings'] != written(study.settings):
      what = 'other code' if made['code'] != fingerprint() else 'other settings'
      raise UserError(
        f'{folder} was made by {what}: rows of one table must not differ in that. Give another --out, or --redo to make them all again.'
      )
  return missing


def written(settings: dict[str, Any]) -> dict[str, str]:
  return {k: str(v) for k, v in settings.items()}


def stages_of(study: Study, row: Row, seed: int, folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
  """(stage, workdir, changes) that a cell needs, in order."""
  teacher = study.out / ('teacher' if row.teacher == 'trained' else 'random_teacher')
  target = (row.student or {}).get('target', 'codes')
  if row.tokenizer is not None or target == 'features':
    yield 'teacher', teacher, {} if row.teacher == 'trained' else {'steps': 0}
  tokenizer = study.out / 'tokenizers' / f'{row.teacher}-{slug(json.dumps(row.tokenizer)) or "recipe"}-{seed}'
  if row.tokenizer is not None:
    yield 'vqkd', tokenizer, {'teacher.name': teacher / 'hf', 'seed': seed} | row.tokenizer
  if row.student is not None:
    student = study.config('pretrain')
    relative = {
      'mask.count': lambda share: max(1, round(share * student.mask.count)),
      'model.early_layer': lambda by: student.model.early_layer + by,
    }
    changes = {k: relative[k](v) if k in relative else v for k, v in row.student.items()}
    handed = {'tokenizer_from': tokenizer} if target == 'codes' else {'teacher.name': teacher / 'hf'}
    yield 'pretrain', folder / 'pretrain', {'seed': seed} | handed | changes


def finished(workdir: Path) -> bool:
  return any(e['event'] == 'finished' for e in events.read(workdir))


def train(study: Study, stage: str, workdir: Path, changes: dict[str, Any]) -> None:
  """One stage in a process of its own, unless it is finished. Raises RunFailed; UserError if other code or settings made what is there."""
  made, now = workdir.parent / f'{workdir.name}.made.json', dict(code=fingerprint(), settings=written(study.settings | changes))
  if workdir.exists() and (not made.is_file() or json.loads(made.read_text()) != now):
    raise UserError(f'{workdir} was made by other code or settings: give another --out, or --redo to make all of it again.')
  if finished(workdir):
    return
  workdir.parent.mkdir(parents=True, exist_ok=True)
  made.write_text(json.dumps(now) + '\n')
  command = [sys.executable, '-m', 'beitv2_jax.main', f'--config={study.recipe}:stage={stage}', f'--workdir={workdir}']
  command += [f'--config.{k}={v}' for k, v in ({'samples': 0, 'eval_every': 0} | study.settings | changes).items()]
  with (workdir.parent / f'{workdir.name}.log').open('a') as log:
    code = subprocess.run(command, stdout=log, stderr=log).returncode
  if code == 130:
    raise KeyboardInterrupt
  if code:
    last = (workdir.parent / f'{workdir.name}.log').read_text().splitlines()[-1:]
    raise RunFailed(f'{workdir} ended with code {code}: {" ".join(last)} (log: {workdir}.log)')


def cell(study: Study, row: Row, seed: int, folder: Path, images: dict[str, tuple]) -> dict[str, float]:
  """Trains what a cell needs, scores it, and keeps the scores."""
  began, tokenizer = time.monotonic(), None
  for stage, workdir, changes in stages_of(study, row, seed, folder):
    train(study, stage, workdir, changes)
    tokenizer = workdir if stage == 'vqkd' else tokenizer
  scores = dict(metrics.read(tokenizer, 'eval')[-1]) if tokenizer else {}
  if row.student is None:
    config = study.config('pretrain').unlock()
    config.model.vocab, config.seed = 1, seed
    model = trained.Model(config, seed=seed)
  else:
    model = trained.load(folder / 'pretrain')
  means = {split: features.last_block_means(model, x) for split, (x, _) in images.items()}
  scores |= probes.scores(means['train'], images['train'][1], means['eval'], images['eval'][1])
  scores = {key: float(scores[key]) for key, _, _ in FIGURES if key in scores}
  folder.mkdir(parents=True, exist_ok=True)
  made = dict(
    row=row.name, seed=seed, code=fingerprint(), settings=written(study.settings), seconds=time.monotonic() - began, scores=scores
  )
  (folder / 'scores.tmp').write_text(json.dumps(made, indent=2) + '\n')
  (folder / 'scores.tmp').replace(folder / 'scores.json')
  return scores


def run(study: Study, say: Callable[[str], None]) -> None:
  """Every cell that is left, and the table after each. Raises UserError, RunFailed."""
  missing = left(study)
  if missing:
    config = study.config('pretrain').unlock()
    config.update_from_flattened_dict({k: v for k, v in study.settings.items() if k.startswith('data.')})
    images = {split: features.images_of(config, split) for split in ('train', 'eval')}
    for number, (row, seed, folder) in enumerate(missing, 1):
      began = time.monotonic()
      scores = cell(study, row, seed, folder, images)
      told = '  '.join(f'{title} {scores[key]:.{digits}f}' for key, title, digits in FIGURES if key in scores)
      say(f'{number}/{len(missing)}  {row.name}, seed {seed}, {time.monotonic() - began:.0f} s: {told}')
      summarize(study)
  summarize(study)


def forget(study: Study) -> None:
  """Removes the rows of a table, and the stages they share."""
  for folder in (study.out / study.name, study.out / 'tokenizers', study.out / 'teacher', study.out / 'random_teacher'):
    shutil.rmtree(folder, ignore_errors=True)


def gathered(study: Study) -> dict[str, dict[str, list[float]]]:
  """{row: {figure: its values, one a seed}}, of what is done."""
  out: dict[str, dict[str, list[float]]] = {row.name: {} for row in study.table.rows}
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
  folder, values = study.out / study.name, gathered(study)
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
  for row, seed, folder in missing:
    for stage, workdir, changes in stages_of(study, row, seed, folder):
      if not finished(workdir):
        planned[workdir] = (stage, int(changes.get('steps', study.settings.get('steps', study.config(stage).steps))))
  for stage in ('teacher', 'vqkd', 'pretrain'):
    steps = [s for name, s in planned.values() if name == stage]
    if steps:
      lines.append(f'{len(steps)} x {stage}, {sum(steps):,} steps')
  done = [json.loads(p.read_text())['seconds'] for p in (study.out / study.name).glob('*/scores.json')]
  if done:
    lines.append(
      f'{len(missing)} rows at {np.mean(done):.0f} s, as the {len(done)} that are done took: {len(missing) * np.mean(done) / 60:.0f} min'
    )
  return lines or ['nothing is left to do']
