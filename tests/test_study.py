"""Studies: which runs a table needs, that they are made once, and what comes out."""

import json

import numpy as np
import pytest

from beitv2_jax import commands, recipes
from beitv2_jax.config import check
from beitv2_jax.reports.page import Page
from beitv2_jax.studies import run
from beitv2_jax.studies.tables import TABLES, Row, Table
from tests.conftest import main_env


@pytest.mark.parametrize('name', TABLES)
def test_every_row_is_a_config_that_is_allowed(name, tmp_path):
  study = run.Study(name, TABLES[name], tmp_path, 2)
  names = [row.name for row in study.table.rows]
  assert len(set(map(run.slug, names))) == len(names) and 'no pretraining' in names and 'the same from a random teacher' in names
  for row, seed, folder in study.cells():
    for stage, _, changes in run.stages_of(study, row, seed, folder):
      check(recipes.from_arguments([f'--config=configs/demo.py:stage={stage}', *(f'--config.{k}={v}' for k, v in changes.items())]))


def test_rows_share_what_is_the_same(tmp_path):
  study = run.Study('aggregation', TABLES['aggregation'], tmp_path, 2)
  stages = [run.stages_of(study, *cell) for cell in study.cells()]
  made = {(stage, workdir) for cell in stages for stage, workdir, _ in cell}
  count = {s: sum(stage == s for stage, _ in made) for s in ('teacher', 'vqkd', 'pretrain')}
  assert count == dict(teacher=2, vqkd=4, pretrain=12)  # two teachers; each with two seeds; six rows with two seeds


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  table = Table('Does it work?', (Row('codes'), Row('no pretraining', None, None)))
  made = run.Study('tiny', table, tmp_path_factory.mktemp('study'), 1, settings={'steps': 2, 'quick_compile': True})
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
  lines = (study.out / 'tiny' / 'table.md').read_text().splitlines()
  assert len(lines) == 4 and lines[2].startswith('| codes | ')
  page = (study.out / 'tiny' / 'table.html').read_text()
  assert page.count('class="intervals"') == 6 and 'over 1 seed.' in page
  monkeypatch.setattr(run.subprocess, 'run', lambda *a, **k: pytest.fail('a row was trained again'))
  run.run(study, lambda line: pytest.fail('a row was made again'))
  assert run.cost(study) == ['nothing is left to do'] or '0 rows' in run.cost(study)[0]


def test_rows_of_other_code_or_settings_are_not_mixed(study, monkeypatch):
  from dataclasses import replace

  with pytest.raises(run.UserError, match='was made by other settings: rows of one table must not differ'):
    run.left(replace(study, settings={'steps': 3}))
  monkeypatch.setattr(run, 'fingerprint', lambda: 'another')
  with pytest.raises(run.UserError, match='was made by other code'):
    run.left(study)
  # Nor are the stages that rows share.
  row, seed, folder = next(study.cells())
  for stage, workdir, changes in run.stages_of(study, row, seed, folder):
    with pytest.raises(run.UserError, match=f'{workdir} was made by other code or settings'):
      run.train(study, stage, workdir, changes)


def test_a_stage_that_fails_is_named(tmp_path):
  broken = run.Study('tiny', Table('?', (Row('codes'),)), tmp_path, 1, settings={'steps': 2, 'data.source': 'folder:/nowhere'})
  with pytest.raises(run.RunFailed, match='teacher ended with code 2: error: no folder /nowhere'):
    run.train(broken, 'teacher', tmp_path / 'teacher', {})


def test_means_and_deviations():
  assert run.cell_text([1.0, 2.0, 3.0], 1) == '2.0 ± 1.0' and run.cell_text([2.0], 2) == '2.00' and run.cell_text([], 1) == ''
  page = Page('x')
  page.intervals('accuracy', {'a': [1.0, 3.0], '<b>': [2.0]})
  drawn = page.html()
  assert drawn.count('<circle') == 3 and 'accuracy: a 2, &lt;b&gt; 2' in drawn and np.isfinite(len(drawn))


@pytest.mark.parametrize(
  'arguments, message',
  [(['nothing'], "no table 'nothing'; there are quantizers"), (['targets', '--set', 'steps'], '--set steps: give KEY=VALUE')],
)
def test_bad_input(arguments, message, tmp_path, capsys):
  assert commands.run('study', [*arguments, '--out', str(tmp_path)]) == 2
  assert message in capsys.readouterr().err
