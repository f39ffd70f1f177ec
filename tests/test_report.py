"""report.html of a run, the comparison of runs, the terminal's lines, and trackers."""

import fcntl
import importlib
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios

import numpy as np
import pytest
from PIL import Image

from beitv2_jax import commands
from beitv2_jax.errors import UserError
from beitv2_jax.models import flops
from beitv2_jax.reports import draw
from beitv2_jax.reports.page import POINTS, Page, thinned
from beitv2_jax.training import loop, metrics, report, terminal, trackers
from tests.browser import Page as Tab
from tests.browser import assert_readable, chromium
from tests.conftest import ROOT, main_command, main_env, run_main, smoke


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two runs of one stage, the second with other settings."""
  root = tmp_path_factory.mktemp('runs')
  loop.run(
    smoke('pretrain', samples=4, eval_every=3), root / 'one', about=dict(recipe='configs/beitv2_b16.py:smoke', changed={'eval_every': 3})
  )
  loop.run(smoke('pretrain', optim__lr=0.002, steps=4), root / 'two')
  return root


def test_a_run_leaves_its_report(runs):
  page = (runs / 'one' / 'report.html').read_text()
  for text in (
    'Step 6 of 6, finished',
    'goodput',
    'masked codes predicted right',
    'gradient norm',
    'learning rate',
    'configs/beitv2_b16.py:smoke',
    'eval_every',
    'first step',
    'jax ',
  ):
    assert text in page, text
  assert page.count('<img src="data:image/png;base64,') == 2  # after 3 and after 6 steps
  assert 'http' not in re.sub(r'http://www.w3.org/\S+', '', page)
  events = [json.loads(line) for line in (runs / 'one' / 'events.jsonl').read_text().splitlines()]
  assert events[0]['versions'].keys() >= {'jax', 'flax', 'beitv2_jax'} and events[0]['steps'] == 6


def test_every_kind_of_stage_draws_its_samples(tmp_path):
  for task in ('tokenizer', 'classifier', 'segmenter'):
    loop.run(smoke(task, samples=2, steps=1), tmp_path / task)
    picture = np.asarray(Image.open(tmp_path / task / 'samples' / '00000001.png').convert('RGB'))
    assert picture.std() > 10 and draw.CAPTIONS[task][:20] in (tmp_path / task / 'report.html').read_text().replace('&#x27;', "'")


def test_samples_show_what_was_predicted():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (2, 96, 96, 3), np.uint8)
  right = dict(image=image, label=np.array([0, 1]), predicted=np.array([0, 2]))
  assert [draw.told(int(p), int(t), ['cat', 'dog', 'cow']) for p, t in zip(right['predicted'], right['label'])] == ['cat', 'cow (dog)']
  mask = np.zeros((2, 96, 96), np.int32)
  same = np.asarray(draw.samples('segmenter', dict(image=image, mask=mask, predicted=mask)))
  np.testing.assert_array_equal(same[100:196, :96], same[200:296, :96])
  other = np.asarray(draw.samples('segmenter', dict(image=image, mask=mask, predicted=mask + 3)))
  assert (other[100:196, :96] != other[200:296, :96]).any()


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
  (tmp_path / 'run' / 'report.html').mkdir(parents=True)
  loop.run(smoke('pretrain', steps=2), tmp_path / 'run')
  assert capsys.readouterr().err.count('no more report.html from this run') == 1


def test_comparison_of_runs(runs, tmp_path):
  assert commands.run('report', [f'{runs}/one', f'{runs}/two', '--out', f'{tmp_path}/both.html']) == 0
  page = (tmp_path / 'both.html').read_text()
  differing = page[page.index('Settings that differ') : page.index('Curves')]
  assert {'optim.lr', 'steps', 'eval_every', 'samples'} == set(re.findall(r'<tr><td>([\w.]+)</td>', differing))
  assert '0.002' in differing and page.count('class="chart"') > 6
  assert commands.run('report', [f'{runs}/one', '--out', f'{tmp_path}/one.html']) == 0
  assert 'What happened' in (tmp_path / 'one.html').read_text()
  assert report.labels(['a', 'b', 'a']) == ['a (1)', 'b', 'a (2)']


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['/nowhere'], 'no workdir /nowhere'),
    (['{empty}'], 'is not of a run'),
    (['{empty}', '--out', '/nowhere/x.html'], 'give the name of a file'),
  ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
  (tmp_path / 'empty').mkdir()
  assert commands.run('report', [a.format(empty=tmp_path / 'empty') for a in arguments]) == 2
  assert message in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path):
  (tmp_path / 'events.jsonl').write_text('{"time": 1.0, "event": "started", "step": 0, "steps": 9}\n')
  assert 'There are no figures yet' in report.page(report.read(tmp_path)).html()


def test_curves_in_a_browser(runs, tmp_path):
  report.compare([report.read(runs / name) for name in ('one', 'two')]).save(tmp_path / 'both.html')
  with chromium() as browser:
    for file in (runs / 'one' / 'report.html', tmp_path / 'both.html'):
      for size, dark in (((1200, 800), False), ((360, 740), True)):
        tab = Tab(browser, file, size, dark)
        page = tab.open()
        page.wait_for_selector('.chart canvas')
        assert_readable(page)
        chart = page.locator('.chart').first
        before = chart.locator('canvas').evaluate('x => x.toDataURL()')
        page.locator('input[type=range]').evaluate('x => { x.value = 0.9; x.dispatchEvent(new Event("input")); }')
        smooth = chart.locator('canvas').evaluate('x => x.toDataURL()')
        page.check('input[type=checkbox]')
        assert len({before, smooth, chart.locator('canvas').evaluate('x => x.toDataURL()')}) == 3
        chart.locator('canvas').focus()
        page.keyboard.press('ArrowRight')
        assert 'step 1' in chart.locator('.legend').inner_text()
        tab.check()
        tab.close()


def test_long_curves_keep_their_extremes():
  values = np.random.default_rng(0).normal(size=10_000)
  values[5000] = 40
  points = thinned(list(enumerate(values)) + [(10_000, float('nan'))])
  assert len(points) == POINTS and max(p[3] for p in points) == 40 and points[-1][0] == 9999
  assert np.mean([p[1] for p in points]) == pytest.approx(values.mean(), abs=0.01)
  page = Page('<a> & "b"')
  page.curves('x', {'<i>': [(0, 1.0), (1, float('inf'))]})
  page.curves('nothing', {'a': []})
  page.table(['<b>'], [['<script>']])
  body = page.html().split('<main>')[1].split('</main>')[0]
  assert '<script>' not in body and '<i>' not in body and body.count('class="chart"') == 1


def test_share_of_peak(tmp_path):
  config = smoke('pretrain').unlock()
  rows = [dict(step=1, images_per_second=1000.0)]
  events = [dict(time=0, event='started', step=0, device='TPU v5 lite', devices=2)]
  run = report.Run('x', rows, [], events, config, [], '')
  needed = sum(flops.per_image(config).values())
  assert report.with_share_of_peak(run)[0]['share_of_peak'] == pytest.approx(100 * 1000 * needed / (2 * 197e12))
  assert report.with_share_of_peak(report.Run('x', rows, [], [events[0] | dict(device='cpu')], config, [], '')) is rows
  assert flops.peak('NVIDIA H100 80GB HBM3') == 989 and flops.peak('cpu') is None


def test_lines_of_the_terminal_have_the_same_columns():
  values = dict(loss=6.913, mim_acc_1=4.167, lr=1.5e-4, images_per_second=898.91, input_wait=0.0145)
  one = terminal.line('train', 5, 3000, values, ('loss', 'mim_acc_1'), 7384)
  two = terminal.line('train', 3000, 3000, values | dict(loss=0.0001234, images_per_second=11342), ('loss', 'mim_acc_1'), 0)
  assert (
    one == 'train    5/3000  2 h 03 min left  loss     6.913  mim_acc_1     4.167 %  lr   0.00015      898.9 images/s  waited    0.0145 s'
  )
  assert len(one) == len(two) and [m.start() for m in re.finditer('  [a-z]', one)] == [m.start() for m in re.finditer('  [a-z]', two)]
  assert [terminal.duration(x) for x in (9, 75, 7384, 200_000)] == ['9 s', '1 min 15 s', '2 h 03 min', '2 d 07 h']
  assert [terminal.size(x) for x in (5000, 3 * 2**20, 1.5 * 2**30)] == ['5 KiB', '3 MiB', '1.5 GiB']


def test_a_log_has_plain_lines_and_a_terminal_one_live_line(tmp_path):
  arguments = ['--config=configs/vqkd_b16.py:smoke', '--config.log_every=3', '--config.samples=0']
  plain = run_main(*arguments, f'--workdir={tmp_path}/plain')
  assert plain.returncode == 0 and '\r' not in plain.stderr and '%|' not in plain.stderr
  lines = plain.stderr.splitlines()
  assert re.match(
    r'plain: a visual tokenizer \(VQ-KD\), [\d,]+ parameters; 6 steps of 16 images, 1.5 times over 64; on 1 CPU device, which each keep \d+ KiB',
    lines[0],
  )
  assert [line.split()[:2] for line in lines if line.startswith('train')] == [['train', '3/6'], ['train', '6/6']]
  main, other = pty.openpty()
  fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 160, 0, 0))
  process = subprocess.Popen(main_command(*arguments, f'--workdir={tmp_path}/live'), env=main_env(), cwd=ROOT, stdout=other, stderr=other)
  os.close(other)
  seen = b''
  while select.select([main], [], [], 120)[0]:
    try:
      part = os.read(main, 65536)
    except OSError:  # the other end is closed
      break
    if not part:
      break
    seen += part
  assert process.wait() == 0
  live = [x for x in re.split(r'[\r\n]', seen.decode()) if '%|' in x]
  assert any(re.search(r'live .*/6 .* left, .*images/s  loss [\d.]+  perplexity [\d.]+  dead_codes [\d.]+ %', x) for x in live), live


def test_traceback_is_shown_when_asked_for(tmp_path):
  arguments = ['--config=configs/vqkd_b16.py:smoke', f'--workdir={tmp_path}', '--config.data.source=folder:/nowhere']
  short, long = run_main(*arguments), run_main(*arguments, '--traceback')
  assert short.returncode == long.returncode == 2 and len(short.stderr.splitlines()) == 1
  assert long.stderr.splitlines()[-1] == short.stderr.splitlines()[0] and 'Traceback' in long.stderr and 'sources.py' in long.stderr


def test_a_command_shows_its_traceback_when_asked_for(capsys):
  assert commands.run('tokenize', ['--from', '/nowhere', '.', '--traceback']) == 2
  err = capsys.readouterr().err
  assert 'Traceback' in err and err.splitlines()[-1].startswith('error: there is no folder /nowhere')


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'trackio', None)
  with pytest.raises(UserError, match='track=trackio needs its package: pip install trackio'):
    loop.run(smoke('pretrain', track='trackio'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_tracker_that_fails_is_dropped(tmp_path, monkeypatch, capsys):
  class Failing:
    def __init__(self, *_):
      self.identity = 'x'

    def write(self, step, values):
      raise ConnectionError('no network')

    def close(self):
      raise AssertionError('it was dropped')

  monkeypatch.setitem(trackers.KINDS, 'wandb', Failing)
  monkeypatch.setattr(trackers, 'check', lambda kind: None)
  assert loop.run(smoke('pretrain', steps=2, track='wandb'), tmp_path / 'run')
  assert capsys.readouterr().err.count('nothing more goes to wandb from this run (no network)') == 1


@pytest.mark.parity
def test_wandb_offline(tmp_path, monkeypatch):
  """Two starts of one run are one record of wandb's."""
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  loop.run(smoke('pretrain', steps=2, track='wandb', samples=2), tmp_path / 'run')
  identity = json.loads((tmp_path / 'run' / 'tracker.json').read_text())['wandb']
  loop.run(smoke('pretrain', steps=4, track='wandb', samples=0), tmp_path / 'run')
  kept = list((tmp_path / 'run' / 'wandb').glob(f'offline-run-*-{identity}'))
  assert kept and json.loads((tmp_path / 'run' / 'tracker.json').read_text())['wandb'] == identity
  assert any(p.stat().st_size > 1000 for folder in kept for p in folder.glob('*.wandb')) and list(
    (tmp_path / 'run' / 'wandb').rglob('samples*.png')
  )


@pytest.mark.parity
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file:{tmp_path}/mlruns')
  loop.run(smoke('pretrain', steps=2, track='mlflow', samples=2), tmp_path / 'run')
  loop.run(smoke('pretrain', steps=4, track='mlflow', samples=0), tmp_path / 'run')
  identity = json.loads((tmp_path / 'run' / 'tracker.json').read_text())['mlflow']
  losses = importlib.import_module('mlflow').MlflowClient().get_metric_history(identity, 'train/loss')
  assert [m.step for m in losses] == [1, 2, 3, 4]
  assert [m.value for m in losses] == pytest.approx([row['loss'] for row in metrics.read(tmp_path / 'run')])
  assert list((tmp_path / 'mlruns').rglob('*.png'))


def test_samples_that_do_not_divide_over_the_devices_are_drawn_by_the_fused_kernel(tmp_path):
  """As on a slice of 16 chips, for which eight samples are too few."""
  few = dict(model__width=256, model__heads=4, model__depth=2, model__early_layer=1, layers__attention='tpu', layers__scan=False)
  loop.run(smoke('pretrain', samples=3, mesh__data=2, steps=1, **few), tmp_path)
  assert len(list((tmp_path / 'samples').iterdir())) == 1
