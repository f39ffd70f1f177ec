"""Runs a study: every row with every seed, one stage after the other, each in a process of its own; what is done is not done again.

Several processes may work in one OUT, one for each GPU for example: who makes a row or a stage holds a lock on it (`NAME.lock`).
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.data import sources
from beitv2_jax.errors import RunFailed, UserError
from beitv2_jax.studies import score, summary
from beitv2_jax.studies.plan import Study, fingerprint, stages_of
from beitv2_jax.studies.tables import Row
from beitv2_jax.training import child, events

PAUSE = 10.0  # seconds between two looks at what other processes are at
Cell = tuple[Row, int, Path]


class OutOfTime(Exception):
  """The minutes that a study may take are over; what is done stays."""


class Elsewhere(Exception):
  """Another process is at it."""


def left(study: Study) -> list[Cell]:
  """The cells without all their scores. Raises UserError if those that have some were made by other code or settings."""
  missing = [cell for cell in study.cells() if not wanted(study) <= made(study, *cell)['scores'].keys()]
  return [cell for cell in missing if study.only in cell[0].name]


def made(study: Study, row: Row, seed: int, folder: Path) -> dict[str, Any]:
  """What a cell's scores.json says; without one, the same with nothing in it. Raises UserError if other code or settings made it."""
  if not (folder / 'scores.json').is_file():
    return dict(scores={}, settings={}, seconds=0.0)
  found = json.loads((folder / 'scores.json').read_text())
  # Of the stages behind its scores, less what is not asked for now.
  known = dataclasses.replace(study, scores=tuple(name for name in study.scores if score.SCORES[name] <= found['scores'].keys()))
  stages = {stage for stage, _, _ in stages_of(known, row, seed)}
  concerning = lambda settings: {k: v for k, v in settings.items() if ':' not in k or k.partition(':')[0] in stages}
  code = fingerprint(study.recipe)
  if found['code'] != code or concerning(found['settings']) != concerning(written(study.settings)):
    what = 'other code or another recipe' if found['code'] != code else 'other settings'
    raise UserError(
      f'{folder} was made by {what}: rows of one table must not differ in that. Give another --out, or --redo to make them all again.'
    )
  return found


def wanted(study: Study) -> set[str]:
  """The figures that every row must have."""
  return set().union(*(score.SCORES[name] for name in study.scores))


def check(study: Study) -> None:
  """Raises UserError for a stage or data that the recipe has not, before anything is trained."""
  data = {}
  for stage in {stage for row in study.rows for stage, _, _ in stages_of(study, row, 0)}:
    config = study.config(stage)
    data[config.data.source, config.data.dir, config.data.holdout] = stage
  for (source, folder, holdout), stage in data.items():
    try:
      sources.make(source, 'train', folder, holdout)
    except UserError as e:
      raise UserError(f'{stage}: {e}') from e


def check_unchanged(study: Study, code: str) -> None:
  """Raises UserError if the `code` that a study began with is not what its next process would run."""
  if fingerprint(study.recipe) != code:
    raise UserError('the code or the recipe was changed while this study ran: undo that, or --redo to make all rows again.')


def written(settings: dict[str, Any]) -> dict[str, str]:
  return {k: str(v) for k, v in settings.items()}


@contextlib.contextmanager
def held(path: Path, wait: bool = False) -> Generator[None]:
  """Holds `path`.lock, which the system lets go when the process ends, however it ends. Raises Elsewhere if another process has it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.with_name(f'{path.name}.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
    except BlockingIOError:
      raise Elsewhere from None
    yield


def finished(workdir: Path) -> bool:
  return any(e['event'] == 'finished' for e in events.read(workdir))


def train(study: Study, stage: str, workdir: Path, changes: dict[str, Any], deadline: float = float('inf')) -> None:
  """One stage in a process of its own, unless it is finished.

  Raises UserError if other code or settings made what is there, RunFailed, OutOfTime where it is stopped at the deadline, and Elsewhere
  where another process is at it.
  """
  settings = {'samples': 0, 'eval_every': 0} | study.settings_of(stage) | changes
  record, now = workdir.parent / f'{workdir.name}.made.json', dict(code=fingerprint(study.recipe), settings=written(settings))
  with held(workdir):
    if workdir.exists() and (not record.is_file() or json.loads(record.read_text()) != now):
      raise UserError(f'{workdir} was made by other code or settings: give another --out, or --redo to make all of it again.')
    if finished(workdir):
      return
    if time.monotonic() > deadline:
      raise OutOfTime
    record.write_text(json.dumps(now) + '\n')
    command = [sys.executable, '-m', 'beitv2_jax.main', f'--config={study.argument(stage)}', f'--workdir={workdir}']
    command += [f'--config.{k}={v}' for k, v in settings.items()]
    with (workdir.parent / f'{workdir.name}.log').open('a') as log:
      code = child.run(command, None if deadline == float('inf') else max(deadline - time.monotonic(), 0), stdout=log, stderr=log)
  if code is None:
    raise OutOfTime  # it has saved, and goes on from there
  if code:
    last = (workdir.parent / f'{workdir.name}.log').read_text().splitlines()[-1:]
    raise RunFailed(f'{workdir} ended with code {code}: {" ".join(last)} (log: {workdir}.log)')


def cell(study: Study, row: Row, seed: int, folder: Path, deadline: float = float('inf')) -> dict[str, float]:
  """Trains what a row needs, scores it, and keeps the scores beside those it had. Raises what `train` does."""
  began, code, before = time.monotonic(), fingerprint(study.recipe), made(study, row, seed, folder)
  workdirs: dict[str, Path] = {}
  for stage, workdir, changes in stages_of(study, row, seed):
    train(study, stage, workdir, changes, deadline)
    workdirs[stage] = workdir  # a row's own come after those that made its teacher
  own = {stage for stage, workdir in workdirs.items() if workdir.parent == folder or stage == 'vqkd' and row.tokenizer is not None}
  missing = dataclasses.replace(study, scores=tuple(name for name in study.scores if not score.SCORES[name] <= before['scores'].keys()))
  scores = before['scores'] | score.ask(missing, row, seed, {stage: workdirs[stage] for stage in own}, folder)
  check_unchanged(study, code)
  settings, seconds = before['settings'] | written(study.settings), before['seconds'] + time.monotonic() - began
  found = dict(row=row.name, seed=seed, code=code, settings=settings, seconds=seconds, scores=scores)
  (folder / 'scores.tmp').write_text(json.dumps(found, indent=2) + '\n')
  (folder / 'scores.tmp').replace(folder / 'scores.json')
  return scores


def run(study: Study, say: Callable[[str], None], minutes: float = 0) -> None:
  """Every cell that is left, and the table after each. What another process is at, or a cell that needs that, goes last.

  Raises UserError, RunFailed, and OutOfTime after `minutes`, if any.
  """
  check(study)
  missing, code = left(study), fingerprint(study.recipe)
  deadline = time.monotonic() + 60 * minutes if minutes else float('inf')

  def done(number: int, row: Row, seed: int, folder: Path) -> bool:
    """Makes the cell, unless another process has meanwhile. False if one is at it, or at what it needs."""
    began = time.monotonic()
    try:
      with held(folder):
        check_unchanged(study, code)
        scores = made(study, row, seed, folder)['scores']
        told = 'made by another process'
        if not wanted(study) <= scores.keys():
          scores = cell(study, row, seed, folder, deadline)
          told = f'{time.monotonic() - began:.0f} s'
    except Elsewhere:
      return False
    figures = '  '.join(f'{title} {scores[key]:.{digits}f}' for key, title, digits in summary.FIGURES if key in scores)
    say(f'{number}/{len(missing)}  {row.name}, seed {seed}, {told}: {figures}')
    summarize(study)
    return True

  waiting = [(number, *cell) for number, cell in enumerate(missing, 1)]
  while waiting:
    again = [numbered for numbered in waiting if not done(*numbered)]
    if len(again) == len(waiting):  # others are at all of it
      if time.monotonic() > deadline:
        raise OutOfTime
      time.sleep(PAUSE)
    waiting = again
  summarize(study)


def forget(study: Study) -> None:
  """Removes the table, and all rows and stages: tables share them. Raises UserError while another process is at work on them."""
  for lock in (study.out / 'rows').glob('*.lock'):
    try:
      with held(lock.with_suffix('')):
        pass
    except Elsewhere:
      raise UserError(f'another process is making {lock.with_suffix("")}: stop it before --redo, which removes it.') from None
  for name in (study.name, 'rows', 'tokenizers', 'teacher', 'random_teacher'):
    shutil.rmtree(study.out / name, ignore_errors=True)


def summarize(study: Study) -> None:
  with held(study.out / study.name, wait=True):
    summary.write(study, study.out / study.name)


def cost(study: Study) -> list[str]:
  """What is left to do, in words, without doing it."""
  check(study)
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
