"""The only training loop. What is trained is a task's business (tasks/)."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from beitv2_jax import checkpoint, evaluate, handoff, optim, sharding, tasks
from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, sources
from beitv2_jax.errors import UserError
from beitv2_jax.metrics import Metrics
from beitv2_jax.models import attention, chip, functions


class TrainState(NamedTuple):
  step: jax.Array
  params: Any
  model_state: Any  # collections that are not trained by gradient, such as the codebook
  opt_state: Any

  def split(self) -> tuple[dict, dict]:
    """(what the next stage needs, what only this run needs), as they are saved."""
    return {'params': self.params, **self.model_state}, {'step': self.step, 'opt_state': self.opt_state}

  @classmethod
  def join(cls, variables: dict, optimizer: dict) -> 'TrainState':
    model_state = {k: v for k, v in variables.items() if k != 'params'}
    return cls(optimizer['step'], variables['params'], model_state, optimizer['opt_state'])


class Interrupted(SystemExit):
  """A signal asked the run to stop; its state is saved."""


def make_train_step(
  task: tasks.Task, tx: optax.GradientTransformation, schedule: Callable, parts: int, shardings: TrainState, whole: dict
) -> Callable:
  """Pure (state, frozen, batch, key) → (state, metrics). The batch is worked through in `parts`, whose gradients are averaged.

  The parameters lie as `shardings` say, and are used as `whole` says; gradients come back to where the parameters lie.
  """
  place = jax.lax.with_sharding_constraint

  def step(state: TrainState, frozen, batch, key):
    key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
    params = place(state.params, whole['params'])

    def gradient(batch, key):
      loss_fn = lambda params: task.loss(params, state.model_state, frozen, batch, key)
      (loss, (stats, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      return grads, metrics | dict(loss=loss), stats

    def add(total, part):
      grads, metrics, stats = gradient(*part)
      return jax.tree.map(jnp.add, total, (place(grads, whole['params']), metrics)), stats

    if parts == 1:
      grads, metrics, stats = gradient(batch, key)
      stats = jax.tree.map(lambda x: x[None], stats)
    else:
      # Part i takes rows i, i + parts, ...: every device cuts up its own rows, and none moves.
      cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
      each = (cut, jax.random.split(key, parts))
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], each))[:2])
      (grads, metrics), stats = jax.lax.scan(add, zeros, each)
      grads, metrics = jax.tree.map(lambda x: x / parts, (grads, metrics))
    grads = place(grads, shardings.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model_state, more = task.update(state.model_state, stats, update_key, params)
    metrics = metrics | more | dict(grad_norm=optax.global_norm(grads), lr=schedule(state.step))
    return TrainState(state.step + 1, params, model_state, opt_state), metrics

  return step


def init_state(task: tasks.Task, tx: Any, mesh: Any, c: Any, key: jax.Array) -> tuple[Callable, TrainState, TrainState, dict]:
  """(function that makes the state already sharded, its abstract value, its shardings, those of its variables while they are used).

  `c` is the config's `mesh`."""
  variables, whole = sharding.variable_shardings(mesh, c.rules, task.init, key)
  placed = whole
  if c.shard_state:  # the parameters, and an average of them
    like = jax.tree.structure(variables['params'])
    placed = {k: sharding.split_over_data(mesh, v, whole[k]) if jax.tree.structure(v) == like else whole[k] for k, v in variables.items()}
  opt, opt_placed = sharding.optimizer_shardings(mesh, tx, variables['params'], placed['params'])
  step = jax.ShapeDtypeStruct((), jnp.int32)
  abstract = TrainState.join(variables, dict(step=step, opt_state=opt))
  shardings = TrainState.join(placed, dict(step=sharding.replicated(mesh), opt_state=opt_placed))

  def make(key):
    variables = sharding.unbox(task.init(key))
    return TrainState.join(variables, dict(step=jnp.zeros((), jnp.int32), opt_state=tx.init(variables['params'])))

  return jax.jit(make, out_shardings=shardings), abstract, shardings, whole


def start_from(where: str, task: tasks.Task, state: TrainState, shardings: TrainState) -> TrainState:
  """A fresh `state` with the weights of the stage in `where`, placed like its own. Raises UserError if they do not fit."""
  config, variables, _ = checkpoint.load_variables(where, 'a workdir, or a directory made by beitv2_jax.convert')
  fresh, optimizer = state.split()
  fresh = jax.jit(lambda x: x, out_shardings=state.step.sharding)(fresh)  # on every device: what the other stage lacks is taken from it
  variables = task.adopt(config, variables, fresh)
  handoff.check_same(variables, fresh, f'init_from={where}', 'the model of this config', 'Give this stage the same sizes.')
  return TrainState.join(sharding.put(variables, shardings.split()[0]), optimizer)


def planned_steps(c: Any, images: int) -> tuple[int, int]:
  """(total, warmup) steps of a config for a data set of `images`."""
  per_epoch = max(images // c.batch_size, 1)
  steps = c.steps if c.steps >= 0 else round(c.epochs * per_epoch)
  return steps, c.optim.warmup_steps if c.optim.warmup_steps >= 0 else round(c.optim.warmup_epochs * per_epoch)


def run(c: Any, workdir: str | Path) -> dict[str, float]:
  """Trains `c` in `workdir`, going on from its newest checkpoint. Returns the last evaluation.

  Raises: UserError (bad input), Interrupted (a signal; the state is saved), FloatingPointError (the loss is not finite),
  SaveError.
  """
  workdir = Path(workdir).expanduser().absolute()
  config_lib.check(c)
  opened = {split: sources.make(c.data.source, split, c.data.dir, c.data.holdout) for split in ('train', 'eval')}
  task, frozen = tasks.make(c, source=opened['train'])
  transforms = {split: task.transforms(split == 'train', opened[split]) for split in opened}
  steps, warmup = planned_steps(c, len(opened['train']))
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f'cannot make the workdir {workdir}: {e.strerror}.') from e

  mesh = sharding.make_mesh(c.mesh.data, c.mesh.model)
  tx, schedule = optim.make(c.optim, steps, warmup)
  # Made on the mesh: a key on one device would have to move to the others in every step.
  init_key, warm_key, key = jax.jit(lambda: tuple(jax.random.split(jax.random.key(c.seed), 3)), out_shardings=sharding.replicated(mesh))()
  make_state, abstract, shardings, whole = init_state(task, tx, mesh, c.mesh, init_key)
  checkpoints = checkpoint.Checkpoints(workdir, c.checkpoint.keep, c.checkpoint.keep_every)
  start = checkpoints.latest() or 0
  if start:
    targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = TrainState.join(*checkpoints.restore(start, *targets.split()))
    changed = config_lib.changes(config_lib.load(workdir), c)
  else:
    state, changed = make_state(init_key), []
    if c.init_from:
      state = start_from(c.init_from, task, state, shardings)
  metrics = Metrics(workdir, start, steps, workdir.name)
  if jax.process_index() == 0:
    config_lib.save(c, workdir)
    (workdir / 'parameters.txt').write_text(parameter_overview.get_parameter_overview(abstract.params, include_stats=False) + '\n')
  count = int(parameter_overview.count_parameters(abstract.params))
  metrics.say(f'{workdir.name}: {count:,} parameters, {steps} steps of {c.batch_size} on {mesh.size} {jax.devices()[0].platform} devices')
  if start:
    metrics.say(f'going on from step {start}')
  elif c.init_from:
    metrics.say(f'starting from the weights in {c.init_from}')
  for change in changed:
    metrics.say(f'warning: the run began with another config; {change}')

  attention.check(config_lib.head_dims(c))
  functions.check()
  chip.agree()
  for kernel, why in chip.refused.items():
    metrics.say(f'warning: our {kernel} does not work on this chip ({why}); taking plain XLA, which is slower, unless the config insists.')
  frozen = sharding.put_replicated(frozen, mesh)
  batches = pipeline.train_batches(
      opened['train'], transforms['train'], seed=c.seed, batch=c.batch_size, start=start, workers=c.data.workers,
      process=jax.process_index(), processes=jax.process_count(), max_bad=c.data.max_bad,
  )  # fmt: skip
  eval_step = evaluate.make_eval_step(task, mesh)
  put_together = jax.jit(lambda variables: variables, out_shardings=whole)

  def together(state):
    """The state with its variables as a step uses them. All processes must call it."""
    variables, optimizer = state.split()
    return TrainState.join(put_together(variables), optimizer)

  def evaluate_now(state):
    rows = pipeline.eval_batches(
        opened['eval'], transforms['eval'], seed=c.seed, batch=c.eval_batch_size or c.batch_size,
        process=jax.process_index(), processes=jax.process_count(), max_bad=c.data.max_bad,
    )  # fmt: skip
    state = together(state)
    return evaluate.run(task, eval_step, (state.params, state.model_state, frozen), rows, mesh)

  def pull():
    began = time.monotonic()
    batch = sharding.put_batch(next(batches), mesh)
    return batch, time.monotonic() - began

  def report(step, values, wait):
    """Checks and logs one step's metrics; called a step late, so that the device never waits for it."""
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not (np.isfinite(values['loss']) and np.isfinite(values['grad_norm'])):
      checkpoints.wait()
      raise FloatingPointError(
        f'the loss or its gradient is not finite at step {step} (loss {values["loss"]}, gradient norm {values["grad_norm"]}). The last good checkpoint is '
        f'step {checkpoints.latest()}. Try a lower optim.lr, a longer warmup, optim.clip_norm, or dtype=float32, and look at the images near that step.'
      )
    metrics.progress(step, values['loss'])
    if step % c.log_every == 0 or step == steps:
      rate = metrics.rate(step)
      idle = 100 * float(np.mean(waited or [0]))
      speed = dict(
        steps_per_second=rate, images_per_second=rate * c.batch_size, input_wait=wait, device_waited=idle, bad_images=batches.bad
      )  # fmt: skip
      waited.clear()
      metrics.write(step, 'train', values | speed)
      warning = task.warning(step, values)
      if warning and not warned:
        warned.append(step)
        metrics.say(f'warning at step {step}: {warning}')

  train_step = jax.jit(
    make_train_step(task, tx, schedule, c.accumulate, shardings, whole),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  signals = _Signals()
  profile = _Profile(workdir / 'profile', c.profile_steps if jax.process_index() == 0 else 0)
  step, pending, results, warned = start, None, {}, []
  waited: list[bool] = []  # for each step since the last report: was the one before done, so that the device had nothing to do?
  try:
    with signals, jax.set_mesh(mesh):
      if step < steps:
        batch, wait = pull()
        if step == 0 and not c.init_from:
          warm = jax.jit(task.warm_start, out_shardings=shardings.model_state)
          state = state._replace(model_state=warm(together(state).params, state.model_state, frozen, batch, warm_key))
      while step < steps:
        waited.append(pending is not None and pending[1]['loss'].is_ready())
        with jax.transfer_guard('disallow'):
          state, values = train_step(state, frozen, batch, key)
        step += 1
        profile.step(values)
        if pending:
          report(*pending)
        pending = (step, values, wait)
        stop = signals.received or checkpoints.manager.reached_preemption(step)
        due = step % c.checkpoint.every == 0 or step == steps or stop
        evaluation = step < steps and c.eval_every and step % c.eval_every == 0
        if due or evaluation:
          report(*pending)  # never save a state whose loss was not finite
          pending = None
        if evaluation:
          metrics.write(step, 'eval', evaluate_now(state))
        if due:
          checkpoints.save(step, *state.split())
        if stop:
          checkpoints.wait()
          raise Interrupted(128 + (signals.received or signal.SIGTERM))
        if step < steps:
          batch, wait = pull()
      if not start and not steps:
        checkpoints.save(0, *state.split())
      checkpoints.wait()
      results = evaluate_now(state)
      metrics.write(step, 'eval', results)
      params = together(state).params
      if jax.process_index() == 0:
        task.finish(params, workdir)
  except Interrupted:
    metrics.say(f'stopped at step {step} and saved; the same command goes on from there.')
    raise
  finally:
    metrics.close()
    checkpoints.close()
    batches.close()
    profile.close()
  return results


class _Profile:
  """Traces `steps` steps, after ten to warm up, into `directory`, for TensorBoard, Perfetto or benchmarks/trace.py."""

  def __init__(self, directory: Path, steps: int):
    self.directory, self.steps, self.done, self.on = directory, steps, 0, False

  def step(self, values):
    """To be called after a step was dispatched, with its metrics."""
    self.done += 1
    if self.steps and self.done == 10:
      jax.block_until_ready(values)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # tracing every Python call slows all threads down
      jax.profiler.start_trace(str(self.directory), profiler_options=options)
      self.on = True
    elif self.on and self.done == 10 + self.steps:
      jax.block_until_ready(values)
      self.close()

  def close(self):
    if self.on:
      jax.profiler.stop_trace()
    self.on = False


class _Signals:
  """Notes SIGTERM and SIGINT so that the loop can save first; a second one acts at once.

  With several processes JAX's own preemption service tells all of them at the same step.
  """

  def __init__(self):
    self.received = 0

  def __enter__(self):
    self.old = {}
    if jax.process_count() == 1:
      try:
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
      except ValueError:  # not the main thread, as in some notebooks
        pass

  def _note(self, number, frame):
    self.received = number
    signal.signal(number, self.old[number])

  def __exit__(self, *_):
    for number, handler in self.old.items():
      signal.signal(number, handler)
