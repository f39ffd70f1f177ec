"""report.html of a run, kept fresh while it trains, and the page that compares several runs."""

import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beitv2_jax import config as config_lib
from beitv2_jax import storage
from beitv2_jax.errors import UserError
from beitv2_jax.models import flops
from beitv2_jax.reports import draw
from beitv2_jax.reports.page import Curve, Page
from beitv2_jax.training import events as events_lib
from beitv2_jax.training import metrics

EVERY = 20.0  # seconds between two versions of a page
NAME = 'report.html'

# What is drawn in one frame: (title, unit, whether a metric belongs there). The first that fits has it; others get a frame of their own.
FRAMES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
  ('loss', '', lambda name: name.startswith('loss') or name.endswith('_loss')),
  ('masked codes predicted right', '%', lambda name: name.startswith('mim_acc')),
  ('accuracy', '%', lambda name: name.startswith('acc')),
  ('perplexity of the codes', '', lambda name: name == 'perplexity'),
  ('codes', '%', lambda name: name in ('codes_used', 'dead_codes')),
  ('gradient norm', '', lambda name: name == 'grad_norm'),
  ('learning rate', '', lambda name: name == 'lr'),
  ('images', 'images/s', lambda name: name == 'images_per_second'),
  ('share of peak', '%', lambda name: name == 'share_of_peak'),
  ('waiting for the next batch', 's', lambda name: name == 'input_wait'),
  ('steps that found the device idle', '%', lambda name: name == 'device_waited'),
)
NOT_DRAWN = ('step', 'kind', 'steps_per_second', 'bad_images')


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir tells of a run. Rows have `step` and the metrics."""

  name: str
  train: list[dict]
  evaluations: list[dict]
  events: list[dict]
  config: Any  # None where there is none
  samples: list[tuple[int, bytes]]  # (step, PNG), the first and the newest
  data: str  # what the data were understood to be

  @property
  def started(self) -> dict:
    """What the newest start says: versions, devices, recipe."""
    return next((e for e in reversed(self.events) if e['event'] == 'started'), {})


def read(workdir: str | Path, name: str = '') -> Run:
  """Raises UserError if there is no such workdir."""
  place = storage.place(workdir)
  with storage.reaching(place):
    if not place.exists():
      raise UserError(f'no workdir {workdir}.')
    try:
      config = config_lib.load(place)
    except UserError:
      config = None
    pictures = sorted((place / 'samples').glob('*.png')) if (place / 'samples').is_dir() else []
    samples = [(int(p.stem), p.read_bytes()) for p in dict.fromkeys([*pictures[:1], *pictures[-1:]]) if p.stem.isdigit()]
    data = (place / 'data.txt').read_text() if (place / 'data.txt').is_file() else ''
    run = Run(name or place.name, metrics.read(place), metrics.read(place, 'eval'), events_lib.read(place), config, samples, data)
  return dataclasses.replace(run, train=with_share_of_peak(run))


def with_share_of_peak(run: Run) -> list[dict]:
  """The training rows with `share_of_peak` in percent, where the chip and a formula for the model are known."""
  peak, devices = flops.peak(run.started.get('device', '')), run.started.get('devices', 0)
  if not (run.config and peak and devices):
    return run.train
  try:
    tokenizer = config_lib.load(run.config.tokenizer_from).model if run.config.get('tokenizer_from') else None
  except UserError:
    tokenizer = None
  try:
    needed = sum(flops.per_image(run.config, tokenizer).values())
  except (ValueError, AttributeError):
    return run.train
  return [
    row | dict(share_of_peak=100 * row['images_per_second'] * needed / (devices * peak * 1e12))
    for row in run.train
    if 'images_per_second' in row
  ]


def page(run: Run) -> Page:
  """The report of one run."""
  out = Page(f'{run.name}: {run.config.task if run.config else "a run"}')
  out.text(status(run))
  for line in run.data.splitlines():
    out.text(line)
  if not run.train and not run.evaluations:
    out.text('There are no figures yet: the first come after log_every steps.')
  if run.samples:
    out.heading('Samples of the evaluation images')
    for step, png in run.samples:
      out.png(png, f'Step {step:,}. {draw.CAPTIONS.get(run.config.task if run.config else "", "")}')
  _curves(out, {'': run})
  if run.evaluations:
    out.heading('Evaluations')
    names = list(dict.fromkeys(name for row in run.evaluations for name in row if name not in ('step', 'kind')))
    out.table(['step', *names], [[f'{row["step"]:,}', *(figure(row.get(name)) for name in names)] for row in run.evaluations[-30:]])
  _what_happened(out, run)
  _made_with(out, run)
  return out


def status(run: Run) -> str:
  last, begun = max([row['step'] for row in run.train + run.evaluations], default=0), run.started
  steps = f' of {begun["steps"]:,}' if begun.get('steps') else ''
  state = {'finished': 'finished', 'stopped': 'stopped; the same command goes on from there', 'failed': 'failed'}.get(
    run.events[-1]['event'] if run.events else '', 'under way'
  )
  figures = events_lib.goodput(run.events)
  spent = f' {events_lib.in_words(figures)}.' if figures['starts'] else ''
  bad = int(run.train[-1].get('bad_images', 0)) if run.train else 0
  skipped = f' {bad:,} images did not decode and were replaced by the next.' if bad else ''
  return f'Step {last:,}{steps}, {state}; this page is of {now()}.{spent}{skipped}'


def now() -> str:
  return datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M:%S %Z')


def figure(value: Any) -> str:
  return f'{value:.5g}' if isinstance(value, (int, float)) else '' if value is None else str(value)


def _curves(out: Page, runs: dict[str, Run]) -> None:
  """Frames of all metrics: those of one run together where they are of one kind, or of several runs each metric by itself."""
  series: dict[tuple[str, str], dict[str, Curve]] = {}
  for label, run in runs.items():
    for kind, rows in (('', run.train), ('evaluation: ', run.evaluations)):
      names = dict.fromkeys(name for row in rows for name in row if name not in NOT_DRAWN)
      for name in names:
        points = [(row['step'], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        title, unit = next(((title, unit) for title, unit, fits in FRAMES if fits(name)), (name, ''))
        if len(runs) > 1:
          title = f'{kind}{name}'
        series.setdefault((title, unit), {})[label if len(runs) > 1 else f'{kind}{name}'] = points
  if not series:
    return
  out.heading('Curves')
  out.begin_charts()
  order = [title for title, _, _ in FRAMES]
  for (title, unit), curves in sorted(series.items(), key=lambda x: order.index(x[0][0]) if x[0][0] in order else len(order)):
    out.curves(title, curves, unit)
  out.end_charts()


def _what_happened(out: Page, run: Run) -> None:
  if not run.events:
    return
  out.heading('What happened')
  rows = []
  for same, group in itertools.groupby(run.events, lambda e: e['event']):
    group = list(group)
    kept = (
      group
      if same != 'saved' or len(group) < 4
      else [group[0], dict(event=f'... {len(group) - 2} more saves', step='', time=None), group[-1]]
    )
    for event in kept:
      when = datetime.datetime.fromtimestamp(event['time']).strftime('%Y-%m-%d %H:%M:%S') if event['time'] else ''
      rows.append([when, event['event'], event['step'], event.get('text', '')])
  out.table(['when', 'what', 'step', ''], rows[-60:])


def _made_with(out: Page, run: Run) -> None:
  begun = run.started
  out.heading('Made with')
  if begun.get('recipe'):
    out.text(f'Recipe: {begun["recipe"]}')
    changed = begun.get('changed') or {}
    if changed:
      out.table(
        ['setting that is not the recipe’s', 'value'], [[k, json.dumps(v) if not isinstance(v, str) else v] for k, v in changed.items()]
      )
    else:
      out.text('All settings are the recipe’s.')
  if begun.get('device'):
    out.text(
      f'{begun.get("devices", "?")} x {begun["device"]} in {begun.get("processes", 1)} processes; '
      + ', '.join(f'{k} {v}' for k, v in begun.get('versions', {}).items())
    )
  if run.config:
    out.folded('All settings', run.config.to_json_best_effort(indent=2))


def compare(runs: list[Run]) -> Page:
  """Curves of several runs over each other, their last figures, and the settings that differ."""
  names = labels([run.name for run in runs])
  out = Page('Runs compared: ' + ', '.join(names))
  for name, run in zip(names, runs):
    out.text(f'{name}: {status(run)}')
  out.heading('Last figures')
  rows = []
  for kind, get in (('evaluation', lambda run: run.evaluations), ('training', lambda run: run.train)):
    for metric in dict.fromkeys(m for run in runs for m in (get(run)[-1] if get(run) else {}) if m not in NOT_DRAWN):
      rows.append([f'{kind}: {metric}', *(figure(get(run)[-1].get(metric)) if get(run) else '' for run in runs)])
  rows.append(['step', *(f'{max([r["step"] for r in run.train + run.evaluations], default=0):,}' for run in runs)])
  out.table(['', *names], rows)
  out.heading('Settings that differ')
  flat = [flatten(run.config) for run in runs]
  keys = [k for k in dict.fromkeys(k for f in flat for k in f) if len({json.dumps(f.get(k), default=str) for f in flat}) > 1]
  if keys:
    out.table(['setting', *names], [[k, *(str(f.get(k, '')) for f in flat)] for k in sorted(keys)])
  else:
    out.text('None.')
  _curves(out, dict(zip(names, runs)))
  return out


def labels(names: list[str]) -> list[str]:
  """The names, numbered where two are the same."""
  return [name if names.count(name) == 1 else f'{name} ({names[: i + 1].count(name)})' for i, name in enumerate(names)]


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  out = {}
  for key, value in (config or {}).items():
    out |= flatten(value, f'{prefix}{key}.') if hasattr(value, 'items') else {f'{prefix}{key}': value}
  return out


class Live:
  """WORKDIR/report.html of a run under way. A run does not end for want of it: after the first failure it says so and writes no more."""

  def __init__(self, folder: Path, name: str, say: Callable[[str], None], active: bool):
    self.folder, self.name, self.say, self.active = folder, name, say, active
    self.written = 0.0

  def refresh(self, now: bool = False) -> None:
    """Writes the page, unless that was done a moment ago; with `now` in any case."""
    if not self.active or not (now or time.monotonic() - self.written > EVERY):
      return
    try:
      temporary = self.folder / f'.{NAME}'
      page(read(self.folder, self.name)).save(temporary)
      temporary.replace(self.folder / NAME)
    except Exception as e:  # whatever a full disk, or a file that somebody changed, brings
      self.active = False
      self.say(f'warning: no more {NAME} from this run ({(str(e).splitlines() or [type(e).__name__])[0]}); metrics.jsonl has everything.')
    self.written = time.monotonic()

  def sample(self, step: int, image: Any) -> None:
    """Keeps a picture of what the model makes of some images."""
    if not self.active:
      return
    try:
      folder = self.folder / 'samples'
      folder.mkdir(exist_ok=True)
      image.save(folder / f'.{step}.png')
      (folder / f'.{step}.png').replace(folder / f'{step:08d}.png')
    except OSError as e:
      self.active = False
      self.say(f'warning: no more {NAME} from this run ({e}); metrics.jsonl has everything.')
