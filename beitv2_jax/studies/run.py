"""Runs a study: every row with every seed, one stage after the other, each in a process of its own; what is done is not done again.

Several processes may work in one OUT, one for each GPU for example: who makes a row or a stage holds a lock on it (`NAME.lock`).
"""

import collections
import contextlib
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
from beitv2_jax.downstream import features, probes, segmentation, trained
from beitv2_jax.errors import RunFailed, UserError
from beitv2_jax.studies import summary
from beitv2_jax.studies.plan import Study, fingerprint, stages_of
from beitv2_jax.studies.tables import ENCODER, Row
from beitv2_jax.training import child, events, metrics

PROBES = ('probe', 'probe5', 'knn')


class OutOfTime(Exception):
  """The minutes that a study may take are over; what is done stays."""


class Elsewhere(Exception):
  """Another process is at it."""


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


def train(study: Study, stage: str, workdir: Path, changes: dict[str, Any], deadline: float = float('inf'), wait: bool = True) -> None:
  """One stage in a process of its own, unless it is finished; where another study is at it, waits for that, or raises Elsewhere.

  Raises UserError if other code or settings made what is there, RunFailed, and OutOfTime where it is stopped at the deadline.
  """
  with held(workdir, deadline if wait else None) as mine:
    if not mine:
      raise Elsewhere
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
    code = child.run(command, None if deadline == float('inf') else max(deadline - time.monotonic(), 0), stdout=log, stderr=log)
  if code is None:
    raise OutOfTime  # it has saved, and goes on from there
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
  return {key: float(found[key]) for key, _, _ in summary.FIGURES if key in found}


def cell(
  study: Study, row: Row, seed: int, folder: Path, images: dict, deadline: float = float('inf'), wait: bool = True
) -> dict[str, float]:
  """Trains what a row needs, scores it, and keeps the scores. Raises what `train` does."""
  began, stages = time.monotonic(), list(stages_of(study, row, seed))
  workdirs: dict[str, Path] = {}
  for stage, workdir, changes in stages:
    train(study, stage, workdir, changes, deadline, wait)
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
  """Every cell that is left, and the table after each; first those that need nothing that another process is at, then the others.

  Raises UserError, RunFailed, and OutOfTime after `minutes`, if any.
  """
  missing, images, elsewhere = left(study), {}, []
  deadline = time.monotonic() + 60 * minutes if minutes else float('inf')

  def make(number: int, row: Row, seed: int, folder: Path, wait: bool) -> None:
    """Makes the cell, unless another process has meanwhile. Raises Elsewhere if one is at it, or at what it needs."""
    with held(folder, deadline if wait else None) as mine:
      if not mine:
        raise Elsewhere
      if scores := scores_of(study, folder):
        made = 'made by another process'
      else:
        began = time.monotonic()
        scores = cell(study, row, seed, folder, images, deadline, wait)
        made = f'{time.monotonic() - began:.0f} s'
      told = '  '.join(f'{title} {scores[key]:.{digits}f}' for key, title, digits in summary.FIGURES if key in scores)
      say(f'{number}/{len(missing)}  {row.name}, seed {seed}, {made}: {told}')
      summarize(study)

  for number, (row, seed, folder) in enumerate(missing, 1):
    try:
      make(number, row, seed, folder, wait=False)
    except Elsewhere:
      elsewhere.append((number, row, seed, folder))
  for left_over in elsewhere:
    make(*left_over, wait=True)
  summarize(study)


def forget(study: Study) -> None:
  """Removes the table, and all rows and stages: tables share them. Raises UserError while another process is at work on them."""
  for lock in (study.out / 'rows').glob('*.lock'):
    with held(lock.with_suffix('')) as free:
      if not free:
        raise UserError(f'another process is making {lock.with_suffix("")}: stop it before --redo, which removes it.')
  for name in (study.name, 'rows', 'tokenizers', 'teacher', 'random_teacher'):
    shutil.rmtree(study.out / name, ignore_errors=True)


def summarize(study: Study) -> None:
  with held(study.out / study.name, float('inf')):
    summary.write(study, study.out / study.name)


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
