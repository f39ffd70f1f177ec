"""Studies: which runs a table needs, that they are made once, and what comes out."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from beitv2_jax import commands
from beitv2_jax.config import check
from beitv2_jax.reports.page import Page
from beitv2_jax.studies import plan, run, score, summary
from beitv2_jax.studies.tables import TABLES, Row, Table
from beitv2_jax.training import child, metrics
from tests.conftest import ROOT, main_env

SCORES = ('probe', 'finetune')
TINY = Table('Does it work?', (Row('codes'), Row('no pretraining', None, None)))


@pytest.mark.parametrize('name', TABLES)
@pytest.mark.parametrize('recipe', ['configs/demo.py', 'configs/transfer.py', 'configs/transfer.py:size=small'])
def test_every_row_is_a_config_that_is_allowed(name, recipe, tmp_path):
  scores = SCORES if 'demo' in recipe else (*SCORES, 'segment')
  study = plan.Study(name, TABLES[name], tmp_path, 1, recipe, {'data.source': 'digits'}, scores)
  names = [row.name for row in study.rows]
  assert len(set(map(plan.slug, names))) == len(names) and 'no pretraining' in names and 'the same from a random teacher' in names
  for row, seed, folder in study.cells():
    stages = list(plan.stages_of(study, row, seed))
    for stage, _, changes in stages:
      check(study.config(stage, changes))
    assert [s for s, workdir, _ in stages if workdir.parent == folder][-len(scores[1:]) :] == list(scores[1:])


def test_rows_of_one_name_are_one_row():
  rows = [row for table in TABLES.values() for row in table.rows]
  for row in rows:
    assert all(row == other for other in rows if plan.slug(other.name) == plan.slug(row.name)), row.name


def stages_of(table, row, **more):
  study = plan.Study(table, TABLES[table], plan.Path('out'), 1, **more)
  return list(plan.stages_of(study, next(r for r in study.rows if r.name == row), 0))


def test_what_is_relative_follows_the_recipe():
  (*_, (_, _, vqkd), (_, _, student), (_, _, finetune)) = stages_of('sizes', '1.5 times as many pixels a side', scores=SCORES)
  assert vqkd['data.image_size'] == 48 and (student['mask.count'], student['mask.min_block']) == (14, 4)  # of 6 and 2
  assert finetune['data.image_size'] == 48 and finetune['model.patch_size'] == 8 and 'mask.count' not in finetune
  (*_, (_, _, earlier)) = stages_of('aggregation', 'aggregation from a block earlier')
  assert earlier['model.early_layer'] == 2


def test_who_teaches():
  stages = stages_of('teachers', 'codes from a student of such codes')
  assert [name for name, _, _ in stages] == ['teacher', 'vqkd', 'pretrain', 'vqkd', 'pretrain']
  assert stages[3][2]['teacher.kind'] == 'stage' and stages[3][2]['teacher.name'] == stages[2][1] != stages[4][1]
  assert stages[1][1] != stages[3][1] and stages[4][2]['tokenizer_from'] == stages[3][1]
  stages = stages_of('teachers', 'codes from a classifier')
  assert [name for name, _, _ in stages] == ['finetune', 'vqkd', 'pretrain'] and 'init_from' not in stages[0][2]
  stages = stages_of('teachers', 'the tokenizer’s own encoder', scores=SCORES)
  assert [name for name, _, _ in stages] == ['teacher', 'vqkd', 'finetune']
  assert stages[2][2]['init_from'] == stages[1][1] and stages[2][2]['model.depth'] == 2 and stages[2][2]['model.abs_pos']


def test_rows_that_ask_for_more_images_than_there_are_fall_away(tmp_path):
  study = plan.Study('data', TABLES['data'], tmp_path, 1)
  assert [row.name for row in study.rows][:4] == ['100 images', '300 images', '1,000 images', 'codes of the recipe’s quantizer']


def test_rows_share_what_is_the_same(tmp_path):
  studies = [plan.Study(name, TABLES[name], tmp_path, 2) for name in ('aggregation', 'targets')]
  made = {(stage, workdir) for study in studies for row, seed, _ in study.cells() for stage, workdir, _ in plan.stages_of(study, row, seed)}
  count = {s: sum(stage == s for stage, _ in made) for s in ('teacher', 'vqkd', 'pretrain')}
  # Two teachers; each with two seeds; six rows with two seeds, of which the other table has four, and two of its own.
  assert count == dict(teacher=2, vqkd=4, pretrain=16)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  settings = {'steps': 2, 'quick_compile': True, 'pretrain:steps': 3}
  made = plan.Study('tiny', TINY, tmp_path_factory.mktemp('study'), 1, settings=settings)
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XLA_FLAGS', main_env()['XLA_FLAGS'])  # one device: half the time
    run.run(made, said.append)
  assert len(said) == 2 and said[0].startswith('1/2  codes, seed 0')
  return made


def test_a_table_comes_out(study, monkeypatch):
  table = json.loads((study.out / 'tiny' / 'table.json').read_text())
  assert table['rows'].keys() == {'codes', 'no pretraining'}
  assert table['rows']['codes'].keys() == {'codes_used', 'perplexity', 'rec_loss', 'probe', 'probe5', 'knn'}
  assert table['rows']['no pretraining'].keys() == {'probe', 'probe5', 'knn'}
  steps = metrics.read(study.out / 'rows' / 'codes-0' / 'pretrain')[-1]['step']
  assert steps == 3  # `pretrain:steps` is for one stage
  lines = (study.out / 'tiny' / 'table.md').read_text().splitlines()
  assert len(lines) == 4 and lines[2].startswith('| codes | ')
  page = (study.out / 'tiny' / 'table.html').read_text()
  assert page.count('class="intervals"') == 6 and 'over 1 seed.' in page
  monkeypatch.setattr(run.child, 'run', lambda *a, **k: pytest.fail('a row was trained again'))
  run.run(study, lambda line: pytest.fail('a row was made again'))
  assert run.cost(study) == ['nothing is left to do'] or '0 rows' in run.cost(study)[0]


def test_rows_of_other_code_or_settings_are_not_mixed(study, monkeypatch):
  from dataclasses import replace

  with pytest.raises(run.UserError, match='was made by other settings: rows of one table must not differ'):
    run.left(replace(study, settings={'steps': 3}))
  later = replace(study, settings={**study.settings, 'segment:data.source': 'fake-scenes:4'})
  assert not run.left(later) and len(run.left(replace(later, scores=('probe', 'segment')))) == 2  # asked for later: nothing is unmade
  monkeypatch.setattr(run, 'fingerprint', lambda recipe: 'another')
  with pytest.raises(run.UserError, match='was made by other code'):
    run.left(study)
  # Nor are the stages that rows share.
  row, seed, folder = next(study.cells())
  for stage, workdir, changes in plan.stages_of(study, row, seed):
    with pytest.raises(run.UserError, match=f'{workdir} was made by other code or settings'):
      run.train(study, stage, workdir, changes)


def test_a_row_waits_for_a_stage_that_another_process_is_at(tmp_path, monkeypatch):
  """And others go first."""
  waiting, trained, said = plan.Study('tiny', TINY, tmp_path, 1), [], []
  other = run.held(tmp_path / 'teacher')
  other.__enter__()

  def ask(study, row, seed, workdirs, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return dict(probe=1.0, probe5=1.0, knn=1.0)

  def pause(seconds):  # nothing else is left: the other process is done with the teacher
    assert seconds > 1 and len(said) == 1
    other.__exit__(None, None, None)

  monkeypatch.setattr(run.child, 'run', lambda command, *more, **streams: trained.append(command[3]) or 0)
  monkeypatch.setattr(run.time, 'sleep', pause)
  monkeypatch.setattr(run.score, 'ask', ask)
  run.run(waiting, said.append)
  assert [line.partition(',')[0] for line in said] == ['2/2  no pretraining', '1/2  codes']
  assert [stage.partition('stage=')[2] for stage in trained] == ['teacher', 'vqkd', 'pretrain']


def test_what_a_row_was_made_by(tmp_path):
  """The recipe with its arguments; the settings of the stages behind its scores, a teacher's included, and no others."""
  recipe = tmp_path / 'mine.py'
  recipe.write_text((plan.recipes.shipped() / 'transfer.py').read_text())
  rows = {row.name: row for row in TABLES['teachers'].rows}
  table = Table('?', (rows['codes from a classifier'], rows['no pretraining']))

  def study(scores=('probe',), recipe=str(recipe), **settings):
    return plan.Study('t', table, tmp_path, 1, recipe, {k.replace('__', ':'): v for k, v in settings.items()}, scores)

  def kept(study):
    return [cell[0].name for cell in study.cells() if run.made(study, *cell)['scores']]

  before = study(('probe', 'segment'), finetune__steps=5, segment__steps=5)
  for _, _, folder in before.cells():
    folder.mkdir(parents=True)
    scores = dict.fromkeys(('probe', 'probe5', 'knn', 'miou'), 1.0)
    made = dict(code=plan.fingerprint(str(recipe)), settings=run.written(before.settings), seconds=1, scores=scores)
    (folder / 'scores.json').write_text(json.dumps(made))
  assert len(kept(before)) == 2
  assert len(kept(study(finetune__steps=5))) == 2  # a score that is not asked for now is no obstacle
  with pytest.raises(run.UserError, match='codes_from_a_classifier-0 was made by other settings'):
    kept(study(finetune__steps=6))  # which made its teacher
  with pytest.raises(run.UserError, match='other code or another recipe'):
    kept(study(recipe=f'{recipe}:size=small', finetune__steps=5))
  recipe.write_text(recipe.read_text() + '# changed\n')
  with pytest.raises(run.UserError, match='other code or another recipe'):
    kept(study(finetune__steps=5))


def test_scores_asked_for_later_stand_beside_the_others(study, monkeypatch):
  later, asked = plan.dataclasses.replace(study, scores=('probe', 'finetune')), []
  monkeypatch.setattr(run, 'train', lambda *a: None)
  monkeypatch.setattr(run.score, 'ask', lambda missing, *a: asked.append(missing.scores) or dict(finetune=50.0))
  row, seed, folder = next(c for c in later.cells() if c[0].name == 'no pretraining')
  kept = (folder / 'scores.json').read_text()
  try:
    assert run.cell(later, row, seed, folder) == json.loads(kept)['scores'] | dict(finetune=50.0) and asked == [('finetune',)]
  finally:
    (folder / 'scores.json').write_text(kept)


def test_code_that_changes_meanwhile_makes_no_row(tmp_path, monkeypatch):
  codes = iter('aaa')  # while the first cell is begun; then it is another
  monkeypatch.setattr(run, 'fingerprint', lambda recipe: next(codes, 'b'))
  monkeypatch.setattr(run, 'train', lambda *a: None)
  monkeypatch.setattr(run.score, 'ask', lambda *a: dict(probe=1.0, probe5=1.0, knn=1.0))
  with pytest.raises(run.UserError, match='the code or the recipe was changed while this study ran'):
    run.run(plan.Study('tiny', TINY, tmp_path, 1), print)
  assert not list(tmp_path.rglob('scores.json'))


def test_fewer_images_take_as_many_steps(tmp_path):
  study = plan.Study('data', TABLES['data'], tmp_path, 1, 'configs/transfer.py:size=small', {'data.source': 'digits'})
  steps = {
    row.name: [changes.get('steps') for stage, _, changes in plan.stages_of(study, row, 0) if stage != 'teacher'] for row in study.rows
  }
  assert steps['100 images'] == steps['1,000 images'] == [200, 200]  # 100 epochs of 1,297 images in batches of 512


def test_the_control_is_scored_as_the_others_are(study, monkeypatch):
  """In fp32, whatever the recipe trains in."""
  seen = []
  monkeypatch.setattr(
    score.features, 'last_block_means', lambda model, images: seen.append(model.config.dtype) or np.zeros((len(images), 2))
  )
  monkeypatch.setattr(score.probes, 'scores', lambda *a: {})
  bf16 = plan.dataclasses.replace(study, settings=study.settings | {'dtype': 'bfloat16'})
  score.score(bf16, Row('no pretraining', None, None), 0, {})
  assert seen == ['float32', 'float32']


def test_processes_share_a_study(tmp_path, monkeypatch):
  """A row that another process is at is left to it, and waited for at the end."""
  waiting, order = plan.Study('tiny', TINY, tmp_path, 1), []
  (_, _, first), (_, _, second) = waiting.cells()
  other = run.held(first)
  other.__enter__()

  def cell(study, row, seed, folder, *rest):
    order.append(folder)
    if folder == second:
      other.__exit__(None, None, None)  # the other process ends, and has not made its row
    made = dict(code=run.fingerprint(study.recipe), settings={}, seconds=1, scores=dict(probe=1.0, probe5=1.0, knn=1.0))
    folder.mkdir()
    (folder / 'scores.json').write_text(json.dumps(made))
    return made['scores']

  monkeypatch.setattr(run, 'cell', cell)
  run.run(waiting, print)
  assert order == [second, first]
  with run.held(tmp_path / 'stage'), pytest.raises(run.Elsewhere), run.held(tmp_path / 'stage'):
    pass
  with run.held(first), pytest.raises(run.UserError, match='another process is making .*: stop it before --redo'):
    run.forget(waiting)
  assert first.is_dir()


def test_a_stage_that_fails_is_named(tmp_path):
  broken = plan.Study('tiny', Table('?', (Row('codes'),)), tmp_path, 1, settings={'steps': 2, 'data.source': 'folder:/nowhere'})
  with pytest.raises(run.RunFailed, match='teacher ended with code 2: error: no folder /nowhere'):
    run.train(broken, 'teacher', tmp_path / 'teacher', {})


def test_minutes_that_are_over(tmp_path):
  """A stage is stopped with a save, and the same command goes on to the end."""
  made = plan.Study(
    'tiny', Table('?', (Row('none', None, None),)), tmp_path, 1, settings={'steps': 20, 'quick_compile': True}, scores=('finetune',)
  )
  row, seed, folder = next(made.cells())
  with pytest.raises(run.OutOfTime):
    run.cell(made, row, seed, folder, deadline=0)
  (stage, workdir, changes), *_ = plan.stages_of(made, row, seed)
  with pytest.raises(run.OutOfTime):
    run.train(made, stage, workdir, changes, deadline=run.time.monotonic() + 4)
  assert not run.finished(workdir)
  run.run(made, print)
  assert 5 < json.loads((folder / 'scores.json').read_text())['scores']['finetune'] < 100
  assert run.finished(workdir) and metrics.read(workdir)[-1]['step'] == 20


@pytest.mark.parametrize('told', [signal.SIGTERM, signal.SIGINT])
def test_a_child_does_not_outlive_us(told, tmp_path):
  """In a process of its own: a signal that is not caught ends it, and not the tests."""
  ready, saved = tmp_path / 'ready', tmp_path / 'saved'
  childs = f"""
import signal, sys, time
def stop(*_):
  time.sleep(0.3)
  open({str(saved)!r}, 'w').close()
  sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open({str(ready)!r}, 'w').close()
time.sleep(60)
"""
  ours = f"""
import signal, sys
from beitv2_jax.training import child
before = signal.getsignal(signal.SIGTERM)
try:
  child.run([sys.executable, '-c', {childs!r}])
except KeyboardInterrupt:
  sys.exit(77 if signal.getsignal(signal.SIGTERM) == before else 1)
"""
  process = subprocess.Popen([sys.executable, '-c', ours], cwd=ROOT)
  while not ready.exists():
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(told)
  assert process.wait(30) == 77 and saved.exists()


def test_exit_codes_of_a_child():
  assert child.run([sys.executable, '-c', 'raise SystemExit(3)']) == 3
  assert child.run([sys.executable, '-c', 'import time; time.sleep(60)'], timeout=0.1) is None


def test_means_and_deviations():
  assert summary.cell_text([1.0, 2.0, 3.0], 1) == '2.0 ± 1.0' and summary.cell_text([2.0], 2) == '2.00' and summary.cell_text([], 1) == ''
  page = Page('x')
  page.intervals('accuracy', {'a': [1.0, 3.0], '<b>': [2.0]})
  drawn = page.html()
  assert drawn.count('<circle') == 3 and 'accuracy: a 2, &lt;b&gt; 2' in drawn and np.isfinite(len(drawn))


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['nothing'], "no table 'nothing'; there are quantizers"),
    (['targets', '--set', 'steps'], '--set steps: give KEY=VALUE'),
    (['targets', '--only', 'cods'], "--only 'cods': no such row in targets; there are codes of the recipe"),
    (['targets', '--set', 'pretraining:optim.lr=1'], '--set pretraining:optim.lr: no stage pretraining; there are teacher, vqkd'),
    (['targets', '--set', 'pretrain:optim.rate=1'], 'unknown config key in --config.optim.rate=1'),
    (['targets', '--scenes', 'scenes:/nowhere'], 'configs/demo.py as stage=segment: '),
    (
      ['targets', '--config', 'configs/transfer.py', '--data', 'digits', '--scenes', 'scenes:/nowhere'],
      'segment: no train images with masks under /nowhere',
    ),
    (['targets', '--redo', '--dry-run'], '--redo removes what is there, and --dry-run does nothing'),
  ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
  assert commands.run('study', [*arguments, '--out', str(tmp_path)]) == 2
  assert message in capsys.readouterr().err
