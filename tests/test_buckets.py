"""Runs in buckets, by real requests to an emulator on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from beitv2_jax import storage
from beitv2_jax.commands import prepare
from beitv2_jax.errors import UserError
from beitv2_jax.training import events, loop, metrics
from beitv2_jax.weights import stages
from tests.conftest import ROOT, main_command, main_env, smoke
from tests.test_processes import two_processes

SMOKE = ('--config=configs/vqkd_b16.py:smoke', '--config.checkpoint.every=2')


@pytest.fixture(params=['calm'])
def bucket(request, monkeypatch):
  """Environment of processes that reach a bucket server of their own; 'trouble' makes it refuse a tenth of the requests."""
  command = [sys.executable, Path(__file__).with_name('bucket_server.py')]
  options = ['--trouble', '0.03'] if request.param == 'trouble' else []
  with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
    address = f'http://127.0.0.1:{server.stdout.readline().strip()}'
    settings = dict(
      TENSORSTORE_GCS_HTTP_URL=address,
      GOOGLE_AUTH_TOKEN_FOR_TESTING='x',
      STORAGE_EMULATOR_HOST=address,
      FSSPEC_GCS_TOKEN='anon',
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',  # asks for the kind of bucket by an interface that the emulator lacks
    )
    for name, value in settings.items():
      monkeypatch.setenv(name, value)
    yield address
    server.kill()


def train(*args, devices=1):
  return subprocess.run(main_command(*args), env=main_env(devices), cwd=ROOT, capture_output=True, text=True, timeout=200)


def look(program: str) -> str:
  """What a process prints: gcsfs keeps the address it saw first, so each server needs a fresh one."""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=100, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.strip()


def figures(workdir: str) -> str:
  """Sum of all variables, and the lines of metrics.jsonl by kind and step."""
  return look(f"""
from beitv2_jax.training import metrics
from beitv2_jax import storage
from beitv2_jax.weights import checksums, stages
config, variables, step = stages.load_variables({workdir!r})
rows = [(k, r['step'], r.get('loss')) for k in ('train', 'eval') for r in metrics.read(storage.place({workdir!r}), k)]
print(step, sum(checksums.of_tree(variables).values()), rows)
""")


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('local')
  done = train(*SMOKE, f'--workdir={workdir}')
  assert done.returncode == 0, done.stderr[-2000:]
  return figures(str(workdir))


@pytest.mark.parametrize('bucket', ['calm', 'trouble'], indirect=True)
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, undisturbed):
  done = train(*SMOKE, '--workdir=gs://runs/one')
  assert done.returncode == 0, done.stderr[-2000:]
  assert figures('gs://runs/one') == undisturbed


def test_the_next_stage_starts_from_a_bucket_and_its_programs_are_kept_there(bucket, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  for args in (SMOKE, ('--config=configs/beitv2_b16.py:smoke', '--config.tokenizer_from=gs://runs/first')):
    done = train(*args, f'--workdir=gs://runs/{"first" if args is SMOKE else "second"}')
    assert done.returncode == 0, done.stderr[-2000:]
  names = look("from beitv2_jax import storage; print(sorted(p.name for p in storage.place('gs://runs/second').iterdir()))")
  assert names == str(
    [
      'checkpoints',
      'compiled',
      'config.json',
      'data.txt',
      'events.jsonl',
      'metrics.jsonl',
      'parameters.txt',
      'report.html',
      'samples',
      'tensorboard',
    ]
  )
  command = [sys.executable, '-m', 'beitv2_jax', 'checkpoints', '--from=gs://runs/second', '--verify']
  listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert listed.returncode == 0 and listed.stdout.rstrip().endswith('whole'), listed


def test_a_run_killed_in_a_save_goes_on(bucket, undisturbed):
  """The killed save leaves arrays under their final name, without Orbax's mark."""
  run = subprocess.Popen(main_command(*SMOKE, '--workdir=gs://runs/killed'), env=main_env(), cwd=ROOT, stderr=subprocess.DEVNULL)

  def objects():
    address = f'{bucket}/storage/v1/b/runs/o?prefix=killed/checkpoints/'
    return [item['name'] for item in json.loads(urllib.request.urlopen(address).read()).get('items', ())]

  until = time.monotonic() + 100
  while not any('/checkpoints/4/' in name for name in objects()):
    assert run.poll() is None and time.monotonic() < until
    time.sleep(0.005)
  os.kill(run.pid, signal.SIGKILL)
  run.wait()
  assert 'killed/checkpoints/4/commit_success.txt' not in objects()
  done = train(*SMOKE, '--workdir=gs://runs/killed')
  assert done.returncode == 0 and 'going on from step 2' in done.stderr, done.stderr[-2000:]
  assert figures('gs://runs/killed') == undisturbed


def test_two_processes_write_one_run_to_a_bucket(bucket, undisturbed):
  two_processes(*SMOKE, '--workdir=gs://runs/two')
  step, _, rows = figures('gs://runs/two').split(' ', 2)
  alone = undisturbed.split(' ', 2)
  rounded = lambda text: [(k, s, loss and round(loss, 4)) for k, s, loss in eval(text)]
  assert step == alone[0] and rounded(rows) == rounded(alone[2])


def test_shards_are_read_from_a_bucket(bucket, monkeypatch, tmp_path):
  monkeypatch.setenv('CLOUD_STORAGE_EMULATOR_ENDPOINT', bucket)
  assert prepare.main(['fake:64', '--out', str(tmp_path)]) == 0
  rows = look(f"""
import pathlib
from beitv2_jax import storage
from beitv2_jax.data import sources
for file in pathlib.Path({str(tmp_path)!r}).rglob('*.*'):
  if file.is_file():
    storage._file_system().pipe_file('gs://runs/data/' + str(file.relative_to({str(tmp_path)!r})), file.read_bytes())
here, there = sources.make('tfds:images', 'train', {str(tmp_path)!r}), sources.make('tfds:gs://runs/data/images', 'train')
print(len(there), all(here[i] == there[i] for i in range(64)))
""")
  assert rows == '64 True'


@pytest.mark.parametrize('name, reason', [('locked', 'Forbidden'), ('missing', 'does the bucket exist')])
def test_a_bucket_that_takes_nothing_is_one_line_at_the_start(bucket, name, reason):
  done = train(*SMOKE, f'--workdir=gs://{name}/run')
  assert done.returncode == 2 and done.stderr.startswith('error: cannot write to the workdir'), done
  assert reason in done.stderr and len(done.stderr.splitlines()) == 1 and 'train 1' not in done.stderr


@pytest.mark.parametrize('where', ['s3://bucket/run', 'gs://', 'https://example.com/run'])
def test_other_addresses_are_refused(where):
  with pytest.raises(UserError, match='gs://BUCKET/RUN'):
    storage.place(where)


def test_a_mounted_bucket_is_known_by_the_type_of_its_mount(tmp_path):
  mounts = tmp_path / 'mounts'
  mounts.write_text('/dev/sda / ext4 rw 0 0\nbucket /mnt/my\\040bucket fuse.gcsfuse rw 0 0\n')
  assert storage._mount_type(Path('/mnt/my bucket/run'), str(mounts)) == 'fuse.gcsfuse'
  assert storage._mount_type(Path('/mnt/other'), str(mounts)) == 'ext4'


def test_where_nothing_can_be_renamed_only_marked_checkpoints_count(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'renames', lambda path: False)
  config = smoke('tokenizer', checkpoint__every=2)
  loop.run(config, tmp_path)
  (tmp_path / 'checkpoints' / '6' / 'commit_success.txt').unlink()
  assert stages.load_variables(tmp_path)[2] == 4
  before = metrics.read(tmp_path)
  loop.run(config, tmp_path)
  assert stages.load_variables(tmp_path)[2] == 6 and [r['loss'] for r in metrics.read(tmp_path)] == [r['loss'] for r in before]


def test_a_run_copied_from_a_disk_goes_on(tmp_path, monkeypatch):
  """Orbax marks its checkpoints on a disk too."""
  loop.run(smoke('tokenizer', checkpoint__every=2, steps=4), tmp_path)
  monkeypatch.setattr(storage, 'renames', lambda path: False)
  loop.run(smoke('tokenizer', checkpoint__every=2), tmp_path)
  assert [e['step'] for e in events.read(tmp_path) if e['event'] == 'started'] == [0, 4]


def test_a_mirror_sends_nothing_that_it_has_only_brought(tmp_path, monkeypatch):
  """Or each process of a run would put its old copy in the place of what process 0 has written since."""
  sent = []
  (tmp_path / 'bucket').mkdir()
  (tmp_path / 'bucket' / 'metrics.jsonl').write_text('1')
  monkeypatch.setattr(storage, 'in_bucket', lambda path: True)
  monkeypatch.setattr(storage, '_file_system', lambda: type('Fake', (), dict(pipe_file=lambda self, *args: sent.append(args)))())
  mirror = storage.Mirror(tmp_path / 'bucket')
  mirror.bring('metrics.jsonl')
  mirror.send()
  assert not sent
  (mirror.folder / 'metrics.jsonl').write_text('12')
  mirror.close()
  assert [data for _, data in sent] == [b'12']


def test_a_mirror_sends_what_has_changed(tmp_path, monkeypatch):
  sent = []
  monkeypatch.setattr(storage, 'in_bucket', lambda path: True)
  monkeypatch.setattr(storage, '_file_system', lambda: type('Fake', (), dict(pipe_file=lambda self, *args: sent.append(args)))())
  mirror = storage.Mirror(tmp_path / 'bucket')
  (mirror.folder / 'a').write_text('1')
  mirror.send()
  mirror.send()
  (mirror.folder / 'a').write_text('12')
  mirror.close()
  assert [data for _, data in sent] == [b'1', b'12'] and not mirror.folder.exists()
