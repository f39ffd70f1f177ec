"""What events.jsonl says of a run, and the goodput worked out from it."""

import json

import pytest

from beitv2_jax.training import events, loop
from tests.conftest import smoke


def rows(*lines):
  return [dict(time=t, event=event, step=step, **more) for t, event, step, more in lines]


def test_goodput_counts_only_steps_that_were_kept():
  log = rows(
    (0, 'started', 0, {}),
    (10, 'first step', 1, {}),
    (60, 'saved', 50, dict(evaluating=5.0, waiting=3.0)),
    (100, 'saved', 90, dict(evaluating=5.0, waiting=3.0)),  # the machine was lost in this save
    (200, 'started', 50, {}),
    (220, 'first step', 51, {}),
    (300, 'finished', 130, dict(evaluating=10.0, waiting=0.0)),
  )
  found = events.goodput(log)
  assert found == dict(seconds=300, counted=(60 - 10 - 8) + (300 - 220 - 10), starts=2, goodput=pytest.approx(100 * 112 / 300))


def test_a_start_that_saved_nothing_counts_nothing():
  log = rows((0, 'started', 0, {}), (10, 'first step', 1, {}), (50, 'started', 0, {}), (60, 'first step', 1, {}), (100, 'saved', 40, {}))
  assert events.goodput(log)['counted'] == 40
  assert events.goodput([])['goodput'] == 0.0


def test_a_run_notes_what_happens(tmp_path):
  config = smoke('tokenizer', checkpoint__every=3)
  loop.run(config, tmp_path)
  lines = events.read(tmp_path)
  assert [(e['event'], e['step']) for e in lines] == [('started', 0), ('first step', 1), ('saved', 3), ('saved', 6), ('finished', 6)]
  assert 0 < events.goodput(lines)['goodput'] < 100
  loop.run(config, tmp_path)  # a finished run is not changed
  assert events.read(tmp_path) == lines
  with (tmp_path / 'events.jsonl').open('a') as file:
    file.write(json.dumps(lines[0])[:20])  # a line that was cut
  assert events.read(tmp_path) == lines


def test_a_run_that_was_stopped_in_its_last_evaluation_is_finished_by_the_next_start(tmp_path, monkeypatch):
  def killed(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(loop.evaluate, 'run', killed)
    with pytest.raises(KeyboardInterrupt):
      loop.run(smoke('tokenizer'), tmp_path)
  assert events.read(tmp_path)[-1]['event'] == 'saved'
  loop.run(smoke('tokenizer'), tmp_path)
  assert [(e['event'], e['step']) for e in events.read(tmp_path)[-2:]] == [('started', 6), ('finished', 6)]
