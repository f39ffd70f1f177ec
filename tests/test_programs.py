"""The two programs of a training step: which of them makes which step, and that neither a stop nor the time it takes to compile changes a run."""

import signal
import threading

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from beitv2_jax import compiler
from beitv2_jax.errors import UserError
from beitv2_jax.training import checkpoint, events, loop, metrics, programs
from tests.conftest import smoke


class Compiled:
  """Stands for a jitted function that notes what is compiled of it, and which program runs."""

  def __init__(self, fail='', gate=None):
    self.fail, self.gate, self.log = fail, gate, []

  def lower(self, x):
    return self

  def compile(self, compiler_options=None):
    name = 'quick' if compiler_options else 'fast'
    self.log.append(name)
    if name == 'fast' and self.gate:
      self.gate.wait()
    if self.fail == name:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: it does not fit\nmore')
    return lambda x: (name, x)

  def __call__(self, x):
    return ('plain', x)

  def clear_cache(self):
    self.log.append('cleared')


def made(jitted, steps=9, said=None, **settings):
  return programs.TrainStep(jitted, ConfigDict(settings), steps, (said if said is not None else []).append)


def test_the_number_of_a_step_alone_says_which_program_makes_it():
  jitted = Compiled(gate=threading.Event())
  step = made(jitted, quick_steps=3)
  assert [step(i, i) for i in (0, 1, 2)] == [('quick', 0), ('quick', 1), ('quick', 2)]
  assert not step.must_wait(2) and step.must_wait(3)
  step.wait(0.01)
  assert step.must_wait(3)
  jitted.gate.set()
  step.wait(10)
  assert not step.must_wait(3) and [step(i, i) for i in (3, 4)] == [('fast', 3), ('fast', 4)]
  assert jitted.log == ['quick', 'fast', 'cleared']


def test_a_run_that_goes_on_later_compiles_one_program():
  step = made(Compiled(), quick_steps=3)
  assert not step.must_wait(3) and step(3, 0) == ('plain', 0) and step.jitted.log == []


def test_a_run_without_later_steps_compiles_no_program_for_them():
  step = made(Compiled(), steps=3, quick_steps=3)
  assert [step(i, i)[0] for i in range(3)] == ['quick'] * 3 and step.jitted.log == ['quick']


def test_where_the_quick_program_does_not_fit_the_fast_one_makes_all_steps():
  said = []
  step = made(Compiled(fail='quick'), said=said, quick_steps=3)
  assert step(0, 0) == ('plain', 0) and step(1, 1) == ('plain', 1)
  assert len(said) == 1 and 'it does not fit' in said[0] and 'more' not in said[0]


def test_that_the_fast_program_cannot_be_compiled_is_said_at_once():
  step = made(Compiled(fail='fast'), quick_steps=8)
  step(0, 0)
  with pytest.raises(jax.errors.JaxRuntimeError, match='does not fit'):
    for i in range(1, 8):
      step.fast.exception()  # until it has been tried
      step(i, i)
  assert i == 1


def test_the_first_steps_are_quick_on_tpus_unless_asked_otherwise(monkeypatch):
  assert compiler.first_steps(ConfigDict()) == 0  # a CPU's programs compile in seconds
  assert compiler.first_steps(ConfigDict(dict(quick_steps=4))) == 4
  tpu = type('Device', (), dict(platform='tpu'))
  monkeypatch.setattr(jax, 'devices', lambda: [tpu])
  assert compiler.first_steps(ConfigDict(dict(quick_steps=-1))) == 10
  assert compiler.first_steps(ConfigDict(dict(quick_steps=0))) == 0
  assert compiler.first_steps(ConfigDict(dict(quick_steps=4, quick_compile=True))) == 0


def test_real_programs_agree_and_free_what_is_donated():
  def double(state, x):
    return state + 2 * x, state.sum()

  step = programs.TrainStep(jax.jit(double, donate_argnums=0), ConfigDict(dict(quick_steps=2)), 4, print)
  state = jnp.zeros(8)
  for number in range(4):
    given, (state, total) = state, step(number, state, jnp.ones(8))
    assert given.is_deleted() and float(total) == 16 * number
  programs_of = [x for x in jax.devices()[0].client.live_executables() if x.hlo_modules()[0].name == 'jit_double']
  assert len(programs_of) == 1  # the quick one is not kept


def test_with_several_processes_none_goes_on_with_another_program_than_the_others(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match='quick_steps=0.*it does not fit'):
    made(Compiled(fail='quick'), quick_steps=3)(0, 0)


def test_a_signal_stops_a_run_that_waits_for_its_program(tmp_path, monkeypatch):
  gate, waits = threading.Event(), []

  def compile_later(self, *args):
    gate.wait(60)
    return compile_now(self, *args)

  def signalled(self, seconds):
    waits.append(seconds)
    signal.raise_signal(signal.SIGTERM)

  compile_now = jax.stages.Lowered.compile
  monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda self, *args, **kw: compile_now(self, **kw) if kw else compile_later(self))
  monkeypatch.setattr(programs.TrainStep, 'wait', signalled)
  with pytest.raises(SystemExit) as stop:
    loop.run(smoke('tokenizer', quick_compile=False, quick_steps=2), tmp_path)
  gate.set()
  assert stop.value.code == 128 + signal.SIGTERM and len(waits) == 1
  assert [(e['event'], e['step']) for e in events.read(tmp_path)[-2:]] == [('saved', 2), ('stopped', 2)]


def test_a_run_stopped_among_its_first_steps_goes_on_to_the_same_figures(tmp_path, monkeypatch):
  made_by = []

  class Noted(programs.TrainStep):
    def __call__(self, number, *arguments):
      result = super().__call__(number, *arguments)
      made_by.append((number, 'fast' if self.quick is None else 'quick'))
      return result

  def run(name):
    made_by.clear()
    loop.run(smoke('tokenizer', quick_compile=False, quick_steps=4), tmp_path / name)
    return [(r['step'], r['loss'], r['grad_norm']) for r in metrics.read(tmp_path / name)]

  monkeypatch.setattr(programs, 'TrainStep', Noted)
  whole = run('whole')
  assert made_by == [*((i, 'quick') for i in range(4)), (4, 'fast'), (5, 'fast')]
  assert events.read(tmp_path / 'whole')[-1]['compiling'] >= 0 and len(whole) == 6

  class Lost(Exception):
    pass

  def lost_after_save(self, *args):
    save(self, *args)
    self.wait()
    raise Lost

  save = checkpoint.Checkpoints.save
  with monkeypatch.context() as patch, pytest.raises(Lost):
    patch.setattr(checkpoint.Checkpoints, 'save', lost_after_save)
    run('lost')
  assert run('lost') == whole
  assert made_by == [(3, 'quick'), (4, 'fast'), (5, 'fast')]
