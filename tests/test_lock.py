"""Two runs in one workdir: the second is refused, a dead one's lock is taken over."""

import itertools
import json
import os
import socket
import subprocess
import threading
import time

import pytest

from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.training import checkpoint, loop, metrics
from beitv2_jax.training.lock import Lock
from tests.conftest import main_command, main_env, smoke


def test_a_second_run_is_refused_by_name_and_the_first_goes_on(tmp_path):
  workdir = tmp_path / 'run'
  first = subprocess.Popen(
    main_command('--config=configs/vqkd_b16.py:smoke', f'--workdir={workdir}', '--config.steps=100000', '--config.checkpoint.every=100000'),
    env=main_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  try:
    deadline = time.time() + 120
    while not (workdir / 'run.lock').exists() and time.time() < deadline:
      time.sleep(0.1)
    with pytest.raises(UserError, match=f'in use by a run .host {socket.gethostname()}, process {first.pid}, since 20'):
      loop.run(smoke('tokenizer', seed=5), workdir)
    assert first.poll() is None
    first.kill()
    first.wait()
    assert (workdir / 'run.lock').exists()  # what a killed run leaves
    loop.run(smoke('tokenizer', steps=1), workdir)
    assert not (workdir / 'run.lock').exists()
  finally:
    first.kill()


def other_host(path):
  path.write_text(json.dumps(dict(host='other', machine='other', pid=1, birth='', since='2026-01-01 00:00:00 UTC')))


def test_another_machines_run_is_dead_when_its_lock_stays_as_it_is(tmp_path, capsys):
  other_host(tmp_path / 'run.lock')
  with Lock(tmp_path, beat=0.1, stale=0.5):
    owner = json.loads((tmp_path / 'run.lock').read_text())
    assert owner['pid'] == os.getpid()
  assert not (tmp_path / 'run.lock').exists() and 'waiting up to' in capsys.readouterr().err


def test_another_machines_run_lives_while_its_lock_changes(tmp_path):
  path = tmp_path / 'run.lock'
  other_host(path)
  owner, stop = json.loads(path.read_text()), threading.Event()

  def count():
    for i in itertools.takewhile(lambda _: not stop.wait(0.05), itertools.count()):
      path.write_text(json.dumps(owner | dict(count=i)))

  counting = threading.Thread(target=count)
  counting.start()
  try:
    with pytest.raises(UserError, match='host other, process 1, since 2026-01-01'):
      with Lock(tmp_path, beat=0.1, stale=10):
        pass
  finally:
    stop.set()
    counting.join()
  assert json.loads(path.read_text())['host'] == 'other'  # it keeps it


def test_a_lock_counts_and_is_left_to_its_owner(tmp_path):
  with Lock(tmp_path, beat=0.05) as lock:
    time.sleep(0.3)
    assert json.loads(lock.path.read_text())['count'] >= 2
    other_host(lock.path)
  assert lock.path.exists()


def test_a_process_number_that_was_given_away_again(tmp_path):
  """The lock names a living process, which was not born when the lock was made."""
  ours = Lock(tmp_path).ours
  (tmp_path / 'run.lock').write_text(json.dumps(ours | dict(birth='1')))
  with Lock(tmp_path):
    pass
  (tmp_path / 'run.lock').write_text(json.dumps(ours))
  with pytest.raises(UserError, match='in use by a run'):
    with Lock(tmp_path):
      pass


def test_a_workdir_that_was_exchanged_is_not_written_to(tmp_path, monkeypatch):
  """As under a disk that was unmounted: what is written in the empty folder would be hidden when the disk is back."""
  workdir, away = tmp_path / 'run', tmp_path / 'away'
  save = checkpoint.Checkpoints.save

  def exchanged(self, step, *state):
    save(self, step, *state)
    self.wait()
    if step == 3:
      workdir.rename(away)
      workdir.mkdir()

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', exchanged)
  with pytest.raises(SaveError, match='run.lock is gone, or of another run: was the disk unmounted'):
    loop.run(smoke('pretrain', checkpoint__every=3), workdir)
  assert not list(workdir.glob('checkpoints/*'))
  monkeypatch.undo()
  workdir.rename(tmp_path / 'hidden')
  away.rename(workdir)
  (workdir / 'run.lock').unlink()  # of this process, which lives
  loop.run(smoke('pretrain', checkpoint__every=3), workdir)
  assert [row['step'] for row in metrics.read(workdir)] == [1, 2, 3, 4, 5, 6]
