"""The same figures and pictures in a tracker that people use: wandb, mlflow or trackio, by `--config.track=NAME`.

A run that goes on writes to the record that it began: its name there is kept in WORKDIR/tracker.json. A run does not end for want of
a tracker: after the first failure it says so and sends no more. What each needs, such as WANDB_MODE=offline or MLFLOW_TRACKING_URI, is set
in the environment as its own documentation says.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beitv2_jax.errors import UserError


def check(kind: str) -> None:
  """Raises UserError if the package of a tracker is not installed."""
  if kind:
    try:
      importlib.import_module(kind)
    except ImportError as e:
      raise UserError(f'track={kind} needs its package: pip install {kind}.') from e


class Wandb:
  """Also trackio, which has the same functions."""

  def __init__(self, kind: str, name: str, folder: Path, config: dict, former: str | None):
    self.module = importlib.import_module(kind)
    more = dict(dir=str(folder), id=former, resume='allow') if kind == 'wandb' else dict(resume='allow')
    self.run = self.module.init(project='beitv2_jax', name=former if kind == 'trackio' and former else name, config=config, **more)
    self.identity = self.run.id if kind == 'wandb' else self.run.name

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self.module.log(dict(values), step=step)

  def picture(self, step: int, name: str, image: Any) -> None:
    self.module.log({name: self.module.Image(image)}, step=step)

  def close(self) -> None:
    self.module.finish()


class Mlflow:
  def __init__(self, kind: str, name: str, folder: Path, config: dict, former: str | None):
    self.client = importlib.import_module(kind).MlflowClient()
    if former:
      self.identity = former
    else:
      found = self.client.get_experiment_by_name('beitv2_jax')
      experiment = found.experiment_id if found else self.client.create_experiment('beitv2_jax')
      self.identity = self.client.create_run(experiment, run_name=name).info.run_id
      self.client.log_dict(self.identity, config, 'config.json')

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self.client.log_metric(self.identity, name, value, step=step)

  def picture(self, step: int, name: str, image: Any) -> None:
    self.client.log_image(self.identity, image, key=name, step=step)

  def close(self) -> None:
    self.client.set_terminated(self.identity)


KINDS: dict[str, type] = {'wandb': Wandb, 'trackio': Wandb, 'mlflow': Mlflow}


class Tracker:
  """What a run writes to, whichever it is; nothing for kind ''."""

  def __init__(self, kind: str, name: str, folder: Path, config: dict, say: Callable[[str], None]):
    self.kind, self.say, self.record = kind, say, None
    if kind:
      path = folder / 'tracker.json'
      with self._dropped_if_it_fails():
        kept = json.loads(path.read_text()) if path.is_file() else {}
        record = KINDS[kind](kind, name, folder, config, kept.get(kind))
        path.write_text(json.dumps(kept | {kind: record.identity}) + '\n')
        self.record = record

  @contextlib.contextmanager
  def _dropped_if_it_fails(self):
    try:
      yield
    except Exception as e:  # networks, accounts and servers fail in many ways
      self.record = None
      self.say(
        f'warning: nothing more goes to {self.kind} from this run ({(str(e).splitlines() or [type(e).__name__])[0][:200]}); metrics.jsonl has everything.'
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self.record:
      with self._dropped_if_it_fails():
        self.record.write(step, values)

  def picture(self, step: int, name: str, image: Any) -> None:
    if self.record:
      with self._dropped_if_it_fails():
        self.record.picture(step, name, image)

  def close(self) -> None:
    if self.record:
      with self._dropped_if_it_fails():
        self.record.close()
