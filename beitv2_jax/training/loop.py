"""The only training loop: prepare, begin or go on, loop, finish. What is trained is a task's business (tasks/).

The order inside the loop is what keeps a run safe: dispatch a step, report the one before it, save and evaluate the state that
was reached, and only then pull the next batch. A state whose loss was not finite is never saved.
"""

import contextlib
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from beitv2_jax import compiler, storage, tasks
from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, sources
from beitv2_jax.errors import SaveError
from beitv2_jax.reports import draw
from beitv2_jax.training import announce, evaluate, events, programs, report, sharding, terminal
from beitv2_jax.training.checkpoint import Checkpoints
from beitv2_jax.training.events import Events
from beitv2_jax.training.interruptions import Interrupted, Signals
from beitv2_jax.training.lock import Lock
from beitv2_jax.training.metrics import Metrics
from beitv2_jax.training.profile import Profile
from beitv2_jax.training.setup import Setup, prepare
from beitv2_jax.training.train_state import TrainState
from beitv2_jax.training.train_step import make_train_step
from beitv2_jax.weights import checksums, stages, trees


def run(config: Any, workdir: str | Path, about: dict[str, Any] | None = None) -> dict[str, float]:
  """Trains `config` in `workdir`, going on from its newest checkpoint. Returns the last evaluation.

  `about` is kept with the record of this start: `recipe`, and what is `changed` in it.

  Raises: UserError (bad input, or a workdir in use), Interrupted (a signal; the state is saved), FloatingPointError (the loss is not
  finite), SaveError.
  """
  workdir = storage.place(workdir)
  if storage.in_bucket(workdir):
    storage.check_writable(workdir, f'.writable-{jax.process_index()}')
  setup = prepare(config, workdir)
  storage.check_writable(workdir, f'.writable-{jax.process_index()}')
  with Lock(workdir) as lock:
    training = begin(setup, about or {}, lock)
    try:
      with training.signals, jax.set_mesh(setup.mesh):
        training.loop()
        return training.finish()
    except Interrupted:
      training.report_page.refresh(now=True)
      training.metrics.say(f'stopped at step {training.step} and saved; the same command goes on from there.')
      raise
    except Exception as e:
      training.failed(e)
      raise
    finally:
      training.close()


@contextlib.contextmanager
def writing(workdir: Any, checkpoints: Checkpoints) -> Generator[None]:
  """A disk that takes no more is an error that names it and the newest checkpoint."""
  try:
    yield
  except OSError as e:
    where = e.filename or workdir
    raise SaveError(f'could not write {where}: {e.strerror or e}. {checkpoints.last_good()}') from e


def begin(setup: Setup, about: dict[str, Any], lock: Lock) -> 'Training':
  """The state of the newest checkpoint, or a new one, on the devices; metrics and batches from there on."""
  config, workdir = setup.config, setup.workdir
  checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
  restored = checkpoints.restore(*setup.layout.targets().split())
  if restored:
    start, variables, optimizer, notes = restored
    state = TrainState.join(variables, optimizer)
    notes += announce.config_changes(workdir, config)
  else:
    start, notes = 0, []
    state = setup.layout.init(setup.init_key)
    if config.init_from:
      state = start_from(config.init_from, setup.task, state, setup.layout.shardings)
  with writing(workdir, checkpoints):
    output = storage.Mirror(workdir)
    output.bring('metrics.jsonl')
    output.bring(events.NAME)
    output.bring('tracker.json')
    log = events.read(output.folder)
    finished = 0 < setup.steps <= start and any(e['event'] == 'finished' and e['step'] >= start for e in log)
    if finished and notes:
      notes.append(
        f'warning: this run is finished at step {start}: nothing of it changes. For more steps give a larger config.steps, for other settings another workdir.'
      )
    elif finished:
      notes.append(f'this run is finished at step {start}')
    elif 0 < setup.steps <= start:
      notes.append(f'all steps of this run are done (step {start}); what is left of its end is done now')
    tokenizer = dict(tokenizer=checksums.sample(setup.frozen)) if config.get('tokenizer_from') else {}
    notes += announce.tokenizer_changes(log, tokenizer, config) if restored else []
    metrics = Metrics(output.folder, start, setup.steps, workdir.name, setup.task.headline, config.get('track', ''), config)
    announce.describe(setup, metrics, start, notes)
    kind = jax.devices()[0].device_kind
    history = Events(
      output.folder,
      start,
      finished,
      steps=setup.steps,
      devices=setup.mesh.size,
      device=kind,
      processes=jax.process_count(),
      versions=announce.versions(),
      **tokenizer,
      **about,
    )
    notes += announce.check_kernels(config, metrics)
    for note in notes:
      if note.startswith('warning: '):
        history.warn(start, note)
  return Training(setup, state, start, checkpoints, metrics, output, history, lock)


def start_from(where: str, task: tasks.Task, state: TrainState, shardings: TrainState) -> TrainState:
  """A fresh `state` with the weights of the stage in `where`, placed like its own. Raises UserError if they do not fit."""
  config, variables, _ = stages.load_variables(where, 'a workdir, or a directory made by `python -m beitv2_jax convert`')
  fresh, optimizer = state.split()
  fresh = jax.jit(lambda x: x, out_shardings=state.step.sharding)(fresh)  # on every device: what the other stage lacks is taken from it
  variables = task.adopt(config, variables, fresh)
  trees.check_same(variables, fresh, f'init_from={where}', 'the model of this config', 'Give this stage the same sizes.')
  return TrainState.join(sharding.put(variables, shardings.split()[0]), optimizer)


class Training:
  """A run under way: its state, the batches to come, and what is still to be reported."""

  def __init__(
    self,
    setup: Setup,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    metrics: Metrics,
    output: storage.Mirror,
    history: Events,
    lock: Lock,
  ):
    config, mesh, layout = setup.config, setup.mesh, setup.layout
    self.setup, self.state, self.start, self.step = setup, state, start, start
    self.began = setup.began
    self.checkpoints, self.metrics, self.output = checkpoints, metrics, output
    self.events, self.lock = history, lock
    self.report_page = report.Live(output.folder, setup.workdir.name, metrics.say, jax.process_index() == 0)
    self.frozen = sharding.put_replicated(setup.frozen, mesh)
    self.signals = Signals()
    self.profile = Profile(output.folder / 'profile', config.profile_steps if jax.process_index() == 0 else 0)
    self.batches = pipeline.train_batches(
      setup.sources['train'], setup.transforms['train'], batch=config.batch_size, start=start, workers=config.data.workers, **self._share()
    )
    train_step = make_train_step(setup.task, setup.optimizer, setup.schedule, config.accumulate, layout)
    options, everywhere = compiler.options(config), sharding.replicated(mesh)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(layout.shardings, everywhere), compiler_options=options)
    self.train_step = programs.TrainStep(jitted, config, setup.steps, metrics.say)
    self.eval_step = evaluate.make_eval_step(setup.task, mesh, options)
    self.sample_step = jax.jit(setup.task.samples, out_shardings=everywhere, compiler_options=options)
    self.sampled: dict | None = None  # the evaluation images that the report shows
    self.gather = jax.jit(lambda variables: variables, out_shardings=layout.gathered)
    self.pending: tuple | None = None  # (step, metrics, seconds waited for input) of the newest step, not looked at yet
    self.found_idle: list[bool] = []  # for each step since the last report: was the device done with the one before?
    self.waited = 0.0  # seconds that the last batch took
    self.saved = checkpoints.latest()  # the newest step that is saved, or being saved
    self.warned = False

  def _share(self) -> dict[str, Any]:
    """This process's part of the data."""
    config = self.setup.config
    reading = config_lib.reading(config)
    return dict(seed=config.seed, process=jax.process_index(), processes=jax.process_count(), max_bad=config.data.max_bad, reading=reading)

  def loop(self) -> None:
    steps = self.setup.steps
    if 0 < self.step < steps and self.evaluation_due():  # the run was stopped between the two
      self.evaluate()
    batch = self.first_batch() if self.step < steps else None
    while self.step < steps:
      self.dispatch(batch)
      stop, evaluation = self.signals.stop(), self.step < steps and self.evaluation_due()
      if evaluation or stop or self.save_due():
        self.report()  # never save a state whose loss was not finite
      if stop or self.save_due():
        self.save()
      if stop:
        self.stop()
      if evaluation:
        self.evaluate()
      if self.step < steps:
        batch = self.pull()

  def failed(self, error: Exception) -> None:
    """Leaves on record that the run ended with an error, if there is room."""
    with contextlib.suppress(OSError, SaveError):
      self.events.note('failed', self.step, text=(str(error).splitlines() or [''])[0][:300])
      self.report_page.refresh(now=True)

  def finish(self) -> dict[str, float]:
    """Everything on disk, the last evaluation, and what the task leaves behind."""
    if not self.setup.steps:
      self.save()
    self.checkpoints.wait()
    variables = self.gather(self.state.split()[0])
    results = self.evaluate(variables) if self.not_yet_evaluated() else self.metrics.evaluated.get(self.step, {})
    if jax.process_index() == 0:
      with writing(self.setup.workdir, self.checkpoints):
        self.lock.check()
        self.setup.task.finish(variables['params'], self.output.folder)
        self.events.note('finished', self.step)
        self.metrics.say(events.summary(self.output.folder))
        self.report_page.refresh(now=True)
        self.output.send()
    return results

  def save_due(self) -> bool:
    return self.step % self.setup.config.checkpoint.every == 0 or self.step == self.setup.steps

  def evaluation_due(self) -> bool:
    every = self.setup.config.eval_every
    return every > 0 and self.step % every == 0 and self.not_yet_evaluated()

  def not_yet_evaluated(self) -> bool:
    """Has this run no figures for this step yet? Process 0 knows, and tells the others."""
    missing = self.step not in self.metrics.evaluated
    return bool(multihost_utils.broadcast_one_to_all(np.array(missing))) if jax.process_count() > 1 else missing

  def save(self) -> None:
    """Starts saving the state of this step, unless that is done already."""
    if self.saved != self.step:
      with writing(self.setup.workdir, self.checkpoints):
        self.lock.check()
        self.metrics.keep()
        self.events.note('saved', self.step)
        self.report_page.refresh()
        self.output.send()
        self.checkpoints.save(self.step, *self.state.split())
      self.saved = self.step

  def stop(self) -> None:
    self.save()
    self.checkpoints.wait()
    with writing(self.setup.workdir, self.checkpoints):
      self.events.note('stopped', self.step)
    raise Interrupted(128 + self.signals.received)

  def first_batch(self) -> dict[str, jax.Array]:
    batch, setup = self.pull(), self.setup
    if self.step == 0 and not setup.config.init_from:
      options = compiler.options(setup.config)
      warm_start = jax.jit(setup.task.warm_start, out_shardings=setup.layout.shardings.model_state, compiler_options=options)
      params = self.gather(self.state.split()[0])['params']
      self.state = self.state._replace(
        model_state=warm_start(params, self.state.model_state, self.frozen, batch, setup.warm_start_key)
      )  # fmt: skip
    return batch

  def pull(self) -> dict[str, jax.Array]:
    """The next batch, on the devices."""
    began = time.monotonic()
    batch = sharding.put_batch(next(self.batches), self.setup.mesh)
    self.waited = time.monotonic() - began
    return batch

  def dispatch(self, batch: Any) -> None:
    """Sends a step to the devices, then reports the one before, which is done by now or soon."""
    if 0 < self.step == self.train_step.first_steps:
      self.await_program()
    self.found_idle.append(self.pending is not None and self.pending[1]['loss'].is_ready())
    with jax.transfer_guard('disallow'):
      self.state, values = self.train_step(self.step, self.state, self.frozen, batch, self.setup.step_key)
    self.step += 1
    if self.step > self.train_step.first_steps:  # by the program that makes nearly all of them
      with writing(self.setup.workdir, self.checkpoints):
        self.profile.step(values)
    self.report()
    self.pending = (self.step, values, self.waited)

  def await_program(self) -> None:
    """The first steps are done, and the program of all others may not be compiled yet. A signal stops the run as after a step."""
    if self.train_step.must_wait(self.step):
      self.report()
      self.metrics.say(f'after step {self.step}: waiting for the faster program, which makes all other steps (compiling)')
    with self.events.spending('compiling'):
      while self.train_step.must_wait(self.step):
        self.train_step.wait(seconds=1)
        if self.signals.received and jax.process_count() == 1:
          self.stop()
    self.metrics.restart_clock(self.step)

  def report(self) -> None:
    """Checks and logs the pending step's metrics. A step late, so that the device never waits for it."""
    if self.pending is None:
      return
    (step, values, waited), self.pending = self.pending, None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not (np.isfinite(values['loss']) and np.isfinite(values['grad_norm'])):
      self.checkpoints.wait()
      raise FloatingPointError(
        f'the loss or its gradient is not finite at step {step} (loss {values["loss"]}, gradient norm {values["grad_norm"]}). The last good '
        f'checkpoint is step {self.checkpoints.latest()}. Try a lower optim.lr, a longer warmup, optim.clip_norm, or dtype=float32, and look at '
        'the images near that step.'
      )
    self.metrics.progress(step, values, self.setup.config.batch_size)
    if self.events.first:
      self.metrics.say(
        f'the first step was done after {terminal.duration(time.monotonic() - self.began)} (opening, compiling){announce.device_memory()}'
      )
    with writing(self.setup.workdir, self.checkpoints):
      self.events.stepped(step, waited)
    if step % self.setup.config.log_every == 0 or step == self.setup.steps:
      self._log(step, values, waited)

  def _log(self, step: int, values: dict[str, float], waited: float) -> None:
    rate, idle = self.metrics.rate(step), 100 * float(np.mean(self.found_idle or [False]))
    self.found_idle.clear()
    images = rate * self.setup.config.batch_size
    speed = dict(steps_per_second=rate, images_per_second=images, input_wait=waited, device_waited=idle, bad_images=self.batches.bad)
    self.write(step, 'train', values | speed)
    warning = self.setup.task.warning(step, values)
    if warning and not self.warned:
      self.warned = True
      self.metrics.say(f'warning at step {step}: {warning}')
      with writing(self.setup.workdir, self.checkpoints):
        self.events.warn(step, warning)
    self.report_page.refresh()

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    with writing(self.setup.workdir, self.checkpoints):
      self.metrics.write(step, kind, values)

  def evaluate(self, variables: Any = None) -> dict[str, float]:
    """The task's figures over the whole evaluation set, which are also written. All processes must call it."""
    setup = self.setup
    variables = self.gather(self.state.split()[0]) if variables is None else variables
    batch = setup.config.eval_batch_size or setup.config.batch_size
    rows = pipeline.eval_batches(setup.sources['eval'], setup.transforms['eval'], batch=batch, **self._share())
    model_state = {k: v for k, v in variables.items() if k != 'params'}
    arguments = (variables['params'], model_state, self.frozen)
    with self.events.spending('evaluating'):
      results = evaluate.run(setup.task, self.eval_step, arguments, self.until_asked_to_stop(rows), setup.mesh)
      self.draw_samples(arguments)
    self.write(self.step, 'eval', results)
    self.report_page.refresh()
    with writing(setup.workdir, self.checkpoints):
      self.output.send()
    return results

  def until_asked_to_stop(self, rows: Iterable[dict]) -> Iterator[dict]:
    """`rows`; a run that is asked to stop does not evaluate to the end, which may be long: it does that when it goes on."""
    for row in rows:
      yield row
      if self.signals.stop():
        self.stop()

  def draw_samples(self, arguments: tuple) -> None:
    """What the model makes of some evaluation images, evenly spread over all, for the report."""
    config, source = self.setup.config, self.setup.sources['eval']
    count = min(config.get('samples', 0), len(source))
    if not count or config.task not in draw.CAPTIONS:
      return
    self.sampled = self.sampled or self.spread_out(source, count)
    batch = sharding.put_batch(self.sampled, self.setup.mesh)
    arrays = {k: np.asarray(v)[:count] for k, v in jax.device_get(self.sample_step(*arguments, batch)).items()}
    if jax.process_index() == 0 and arrays:  # a task need not draw any
      size = config.model.get('codes', 0) or config.model.get('vocab', 0)
      image = draw.samples(config.task, arrays, list(config.get('class_names') or ()), size)
      self.report_page.sample(self.step, image)
      self.metrics.picture(self.step, 'samples', image)

  def spread_out(self, source: Any, count: int) -> dict:
    """This process's part of a batch of `count` evaluation images from all over the source (more, so that each device has as many)."""
    size = -(-count // self.setup.mesh.size) * self.setup.mesh.size
    places = np.linspace(0, len(source) - 1, count).round().astype(int)
    some: Any = sources.Picked(source, places)
    return next(iter(pipeline.eval_batches(some, self.setup.transforms['eval'], batch=size, **self._share())))

  def close(self) -> None:
    """Whatever ended the run is what matters now, so that a part that does not close is only named."""
    for part in (self.metrics, self.checkpoints, self.batches, self.profile, self.output):
      try:
        part.close()
      except Exception as e:  # Orbax, tensorstore, grain and the disk raise many types
        print(f'warning: {type(part).__name__} did not close: {(str(e).splitlines() or [type(e).__name__])[0]}', file=sys.stderr)
