"""Runs as processes: several of them, signals, a profile."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from beitv2_jax.configs import finetune_b16

from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.training import loop, metrics, peers
from beitv2_jax.weights import stages
from tests.conftest import main_command, main_env, run_main, smoke


def losses(workdir):
  return [(r['step'], r['loss'], r['grad_norm']) for r in metrics.read(workdir)]


FSDP = (('heads', 'model'), ('mlp', 'model'), ('vocab', 'model'), ('embed', 'data'))


FLAG = f'--config.mesh.rules={FSDP}'


def two_processes(*args):
  """Two processes of two devices each, through the same entry point."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = main_command(*args, f'--coordinator=localhost:{port}', '--processes=2')
  started = [
    subprocess.Popen([*command, f'--process={i}'], env=main_env(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in (0, 1)
  ]
  for p in started:
    out, _ = p.communicate(timeout=400)
    assert p.returncode == 0, out[-3000:]


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
  """A tokenizer whose matrices are large enough to be kept in parts."""
  workdir = tmp_path_factory.mktemp('wide')
  loop.run(smoke('tokenizer', model__encoder__width=128), workdir)
  return workdir


@pytest.mark.parametrize(
  'layout',
  [
    pytest.param([], marks=pytest.mark.slow),
    pytest.param(['--config.mesh.shard_state=False', '--config.mesh.model=2'], marks=pytest.mark.slow),
    pytest.param([FLAG], marks=pytest.mark.slow),
    [FLAG, '--config.mesh.model=2', '--config.layers.scan=True'],
  ],
  ids=['data', 'tensor', 'fsdp', 'mixed'],
)
def test_two_processes_give_the_numbers_of_one(wide, tmp_path, layout):
  """And a single device goes on from what they saved."""
  two_processes('--config=configs/vqkd_b16.py:smoke', f'--workdir={tmp_path}', '--config.model.encoder.width=128', *layout)
  np.testing.assert_allclose(losses(tmp_path), losses(wide), rtol=1e-5)
  assert stages.load_variables(tmp_path)[2] == 6
  shutil.rmtree(tmp_path / 'checkpoints' / '6')
  loop.run(smoke('tokenizer', model__encoder__width=128), tmp_path)
  np.testing.assert_allclose(losses(tmp_path), losses(wide), rtol=1e-5)


def test_two_processes_fine_tune(wide, tmp_path):
  """A new head, which one process alone does not hold, and an average of the weights, kept in parts like them."""
  args = ['--config.steps=2', '--config.ema_decay=0.5', f'--config.init_from={wide}', '--config.model.width=128', '--config.model.depth=2']
  two_processes('--config=configs/finetune_b16.py:encoder,smoke', f'--workdir={tmp_path / "two"}', *args)
  c = finetune_b16.get_config('encoder,smoke').unlock()
  c.steps, c.ema_decay, c.init_from, c.model.width, c.model.depth, c.mesh.data = 2, 0.5, str(wide), 128, 2, 1
  results = loop.run(c.lock(), tmp_path / 'one')
  assert results['ema_loss'] != results['loss']
  (theirs,) = metrics.read(tmp_path / 'two', 'eval')
  for key, value in results.items():
    assert theirs[key] == pytest.approx(value, rel=1e-5), key
  np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=1e-5)


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_first(tmp_path, number):
  args = ['--config=configs/beitv2_b16.py:smoke', f'--workdir={tmp_path}', '--config.steps=100000', '--config.checkpoint.every=100000']
  process = subprocess.Popen(main_command(*args), env=main_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  path = tmp_path / 'metrics.jsonl'
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None and not (path.exists() and path.read_text().count('\n') > 3):
    time.sleep(0.2)
  process.send_signal(number)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 128 + number, out[-3000:]
  assert 'goes on from there' in out
  saved = stages.load_variables(tmp_path)[2]
  assert saved == losses(tmp_path)[-1][0] >= 3


def test_a_profile_of_some_steps(tmp_path):
  done = run_main(
    '--config=configs/vqkd_b16.py:smoke', f'--workdir={tmp_path}', '--config.steps=13', '--config.profile_steps=2', '--config.checkpoint.every=100'
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  read = [sys.executable, 'benchmarks/trace.py', str(tmp_path / 'profile')]
  text = subprocess.run(read, capture_output=True, text=True, env=main_env(), check=True).stdout
  busy, whole = (float(x) for x in re.search(r'busy ([\d.]+) of ([\d.]+) ms', text).groups())
  assert 0 < busy <= whole


def test_a_silent_process_is_lost_and_one_that_finished_is_not():
  watch = peers.Watch(client=None, process=0, silence=20.0)
  values = [('alive/0', '5 here'), ('alive/1', '5 there'), ('alive/2', 'finished elsewhere')]
  assert not watch.lost(values, 0.0) and not watch.lost(values, 19.0)
  assert watch.lost(values, 21.0) == ('process 1 on there is lost: nothing was heard of it for 21 s', 75)
  values[1] = ('alive/1', '6 there')
  assert not watch.lost(values, 22.0)


def test_one_that_failed_is_named_unless_the_others_fail_as_well():
  watch = peers.Watch(client=None, process=0, silence=20.0)
  values = [('alive/0', '5 here'), ('alive/1', 'failed 1 there')]
  assert not watch.lost(values, 0.0) and not watch.lost(values, 19.0)
  assert watch.lost(values, 21.0) == ('process 1 on there ended with an error, which it has printed', 75)
  values[1] = ('alive/1', 'failed 2 there')  # bad input: to try again would not help
  assert not watch.lost(values, 30.0) and watch.lost(values, 51.0) == ('process 1 on there ended with an error, which it has printed', 2)


def test_process_0_that_fails_waits_until_the_others_have_said_something():
  said = {f'{peers.FOLDER}/1': ['7 there', '8 there', 'failed 1 there', 'failed 1 there']}
  client = types.SimpleNamespace(
    key_value_set=lambda key, value, allow_overwrite: said.update({key: [value]}),
    key_value_dir_get=lambda folder: [(key, values.pop(0) if len(values) > 1 else values[0]) for key, values in said.items()],
  )
  peers.Watch(client, 0, beat=0.01, silence=60.0, expected=2).failed(1)
  assert said[f'{peers.FOLDER}/0'][0].startswith('failed 1 ') and said[f'{peers.FOLDER}/1'] == ['failed 1 there']
  said[f'{peers.FOLDER}/1'] = ['9 there']
  peers.Watch(client, 0, beat=0.01, silence=0.05, expected=2).failed(1)  # for so long only
  assert said[f'{peers.FOLDER}/1'] == ['9 there']


def test_bad_input_of_both_processes_is_said_by_both_at_once(tmp_path):
  both = start_two(f'--workdir={tmp_path}/run', '--config.data.source=folder:/nowhere')
  for p in both:
    text, _ = p.communicate(timeout=120)
    assert p.returncode == 2 and '/nowhere' in text and 'Traceback' not in text, text
    assert not re.search(r'process \d on|does not answer', text), text


@pytest.mark.slow
def test_bad_input_of_one_process_ends_the_other(tmp_path):
  both = start_two(f'--workdir={tmp_path}', '--config.steps=100000', second=['--config.data.source=folder:/nowhere'])
  texts = [p.communicate(timeout=120)[0] for p in both]
  assert [p.returncode for p in both] == [2, 2], texts
  assert 'process 1 on' in texts[0] and 'ended with an error, which it has printed' in texts[0] and '/nowhere' in texts[1]


def test_only_what_a_lost_process_may_have_caused_waits_for_the_verdict(monkeypatch):
  waited = []
  monkeypatch.setattr(peers, '_watch', object())
  monkeypatch.setattr(peers.time, 'sleep', waited.append)
  for error in (UserError('bad input'), SaveError('full disk'), FloatingPointError('loss')):
    peers.wait_for_verdict(error)
  assert not waited
  peers.wait_for_verdict(RuntimeError('connection closed by peer'))
  assert waited == [peers.SILENCE + 3 * peers.BEAT]


def start_two(*args, second=()):
  """Two processes of one device; `second` are arguments of the second alone."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = main_command('--config=configs/beitv2_b16.py:smoke', *args, f'--coordinator=localhost:{port}', '--processes=2')
  return [
    subprocess.Popen(
      [*command, f'--process={i}', *second * i], env=main_env(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for i in (0, 1)
  ]


def wait_for_lines(path, count, processes):
  deadline = time.time() + 240
  while time.time() < deadline and not (path.exists() and path.read_text().count('\n') > count):
    assert all(p.poll() is None for p in processes), processes[0].communicate()[0][-2000:]
    time.sleep(0.2)


def test_a_signal_to_one_of_two_processes_saves_both(tmp_path):
  both = start_two(f'--workdir={tmp_path}', '--config.steps=100000', '--config.checkpoint.every=100000')
  wait_for_lines(tmp_path / 'metrics.jsonl', 3, both)
  both[1].send_signal(signal.SIGTERM)
  texts = [p.communicate(timeout=120)[0] for p in both]
  assert [p.returncode for p in both] == [143, 143], texts
  assert stages.load_variables(tmp_path)[2] == losses(tmp_path)[-1][0] >= 3


@pytest.mark.slow
def test_the_end_of_one_process_is_said_by_the_other(tmp_path):
  both = start_two(f'--workdir={tmp_path}', '--config.steps=100000', '--config.checkpoint.every=10')
  wait_for_lines(tmp_path / 'metrics.jsonl', 12, both)
  both[1].kill()
  text, _ = both[0].communicate(timeout=60)
  assert both[0].returncode == peers.LOST
  assert 'process 1 on' in text and 'run the same command on all hosts' in text and 'Traceback' not in text


def test_a_process_that_never_comes_is_a_line_and_a_code_to_start_again():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  program = f"""
import sys
from beitv2_jax.training import peers
peers.FIND_SECONDS = 4.0
peers.initialize('localhost:{port}', 2, 0)
"""
  done = subprocess.run([sys.executable, '-c', program], env=main_env(), capture_output=True, text=True, timeout=60)
  assert done.returncode == peers.LOST, done
  assert 'did not find each other within 4 s' in done.stderr and 'run the same command on all hosts' in done.stderr
  assert 'stack trace' not in done.stderr


def test_a_process_that_dies_before_it_has_said_a_word_is_lost_too():
  watch = peers.Watch(None, 0, expected=2)
  now = watch.seen[f'{peers.FOLDER}/1'][1]
  mine = [(f'{peers.FOLDER}/0', '1 here')]
  assert watch.lost(mine, now + 10) is None
  assert 'process 1 on an unknown host is lost' in watch.lost([(f'{peers.FOLDER}/0', '9 here')], now + 25)[0]
