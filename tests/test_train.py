"""The loop: going on after a stop, meshes, several processes, broken runs."""

import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beitv2_jax.configs import finetune_b16

from beitv2_jax import config as config_lib
from beitv2_jax import tasks
from beitv2_jax.data import pipeline, sources
from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.kernels import attention_gpu, chip, norm_gpu
from beitv2_jax.training import checkpoint, loop, metrics, optim, sharding
from beitv2_jax.training.train_state import state_layout
from beitv2_jax.training.train_step import make_train_step
from beitv2_jax.weights import stages, trees
from tests.conftest import main_command, main_env, run_main, smoke


def losses(workdir):
  return [(r['step'], r['loss'], r['grad_norm']) for r in metrics.read(workdir)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Both stages, trained for 6 steps without a stop."""
  root = tmp_path_factory.mktemp('runs')
  results = {'tokenizer': loop.run(smoke('tokenizer'), root / 'tokenizer')}
  results['pretrain'] = loop.run(smoke('pretrain', tokenizer_from=str(root / 'tokenizer')), root / 'pretrain')
  return root, results


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain'])
def test_a_stopped_run_goes_on_bit_by_bit(runs, tmp_path, task):
  root, results = runs
  extra = {'tokenizer_from': str(root / 'tokenizer')} if task == 'pretrain' else {}

  class Stop(Exception):
    pass

  def stop_after_save(self, step, *args):
    save(self, step, *args)
    self.wait()
    raise Stop

  save = checkpoint.Checkpoints.save
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
    patch.setattr(checkpoint.Checkpoints, 'save', stop_after_save)
    loop.run(smoke(task, **extra), tmp_path)
  assert [s for s, *_ in losses(tmp_path)] == [1, 2, 3]
  assert loop.run(smoke(task, **extra), tmp_path) == results[task]
  assert losses(tmp_path) == losses(root / task) and len(losses(tmp_path)) == 6
  a, b = (trees.flatten(stages.load_variables(d)[1]) for d in (tmp_path, root / task))
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_what_a_run_leaves(runs):
  root, results = runs
  rows = metrics.read(root / 'pretrain')
  for key in ('loss_1', 'loss_2', 'mim_acc_1', 'mim_acc_2', 'grad_norm', 'lr', 'images_per_second', 'input_wait'):
    assert all(np.isfinite(r[key]) for r in rows), key
  assert rows[0]['lr'] == 0 and abs(rows[0]['loss'] - 2 * np.log(32)) < 0.2
  tokenizer_rows = metrics.read(root / 'tokenizer')
  assert {'rec_loss', 'quant_loss', 'perplexity', 'codes_used'} <= tokenizer_rows[0].keys()
  assert tokenizer_rows[-1]['rec_loss'] < tokenizer_rows[0]['rec_loss']
  assert metrics.read(root / 'pretrain', 'eval')[-1]['loss_1'] == results['pretrain']['loss_1']
  config = config_lib.load(root / 'pretrain')
  assert config.model.vocab == 32 and config.tokenizer_from == str(root / 'tokenizer')
  assert list((root / 'pretrain' / 'tensorboard').glob('events*'))
  assert 'lm_head/kernel' in (root / 'pretrain' / 'parameters.txt').read_text()


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain'])
def test_a_stage_starts_from_the_weights_of_another(runs, tmp_path, task):
  root, results = runs
  extra = dict(tokenizer_from=str(root / 'tokenizer')) if task == 'pretrain' else {}
  c = smoke(task, init_from=str(root / task), steps=0, **extra)
  assert loop.run(c, tmp_path / 'same') == results[task]
  larger = smoke(task, init_from=str(root / task), steps=0, data__image_size=48, **extra)
  if task == 'pretrain':  # the tables are resampled, so the larger images are read as well as the smaller ones
    assert abs(loop.run(larger, tmp_path / 'larger')['loss_1'] - results[task]['loss_1']) < 0.5
  wider = smoke(task, init_from=str(root / task), **extra).unlock()
  (wider.model.encoder if task == 'tokenizer' else wider.model).width = 64
  with pytest.raises(
    UserError, match=r'init_from=.* does not fit the model of this config. shapes differ .*Give this stage the same sizes'
  ):
    loop.run(wider, tmp_path / 'wider')
  other = dict(tokenizer='pretrain', pretrain='tokenizer')[task]
  with pytest.raises(UserError, match=f'init_from holds a {other} stage; a {task} stage starts from one of its own kind'):
    loop.run(smoke(task, init_from=str(root / other), **extra), tmp_path / 'other')


def test_the_frozen_tokenizer_is_not_saved_again(runs):
  _, variables, _ = stages.load_variables(runs[0] / 'pretrain')
  assert set(variables) == {'params'} and 'encoder' not in variables['params']


def global_batches(c, task):
  if c.task == 'segmenter':
    rng, (h, w, _) = np.random.default_rng(0), config_lib.image_shape(c)
    while True:
      yield dict(image=rng.integers(0, 256, (16, h, w, 3), np.uint8), mask=rng.integers(0, 151, (16, h, w), np.uint8))
  source = sources.make('fake:64', 'train')
  yield from pipeline.train_batches(source, task.transforms(True, source), seed=0, batch=16, workers=-1)


def some_steps(c, steps=3):
  """(losses, state) of a few steps on this config's mesh, fed with the same global batches."""
  task, frozen = tasks.make(c)
  mesh = sharding.make_mesh(c.mesh.data, c.mesh.model)
  tx, schedule = optim.make(c.optim, 100, 2)
  layout = state_layout(task, tx, mesh, c)
  state, frozen = layout.init(jax.random.key(0)), sharding.put_replicated(frozen, mesh)
  train_step = make_train_step(task, tx, schedule, c.accumulate, layout)
  step = jax.jit(train_step, out_shardings=(layout.shardings, sharding.replicated(mesh)))
  batches = global_batches(c, task)
  out = []
  for i in range(steps):
    batch = sharding.put_batch(next(batches), mesh)
    if i == 0:
      warm = jax.jit(task.warm_start, out_shardings=layout.shardings.model_state)
      state = state._replace(model_state=warm(state.params, state.model_state, frozen, batch, jax.random.key(1)))
    with jax.set_mesh(mesh):
      state, values = step(state, frozen, batch, jax.random.key(2))
    out.append([float(values['loss']), float(values['grad_norm'])])
  return np.array(out), state


FSDP = (('heads', 'model'), ('mlp', 'model'), ('vocab', 'model'), ('embed', 'data'))


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain', 'classifier', 'segmenter'])
@pytest.mark.parametrize(
  'changes',
  [
    dict(mesh__data=8, mesh__shard_state=False),
    dict(mesh__data=4, mesh__model=2),
    dict(mesh__data=4, mesh__model=2, mesh__rules=FSDP),
    dict(mesh__data=8, accumulate=2),
    dict(mesh__data=8, mesh__rules=FSDP, layers__scan=True, layers__remat='dots', accumulate=2),
    dict(layers__remat='full', accumulate=4),
  ],
)
def test_layouts_and_ways_to_run_the_layers_give_the_same_numbers(task, changes, monkeypatch):
  """Devices, tensor and data parallel, FSDP, state in parts, scan, rematerialisation, gradient accumulation: the same losses and codebook."""
  monkeypatch.setattr(sharding, 'SMALL', 1)
  # What draws for every part of a batch, or looks at all of it, changes with the parts: drop path, mixup, erasing, batch norm.
  same = dict(pretrain=dict(model__drop_path=0.0), classifier=dict(model__drop_path=0.0, mixup=0.0, cutmix=0.0, random_erasing=0.0))
  if task == 'segmenter':
    changes = changes | dict(accumulate=1)
  if task not in _cache:
    _cache[task] = some_steps(smoke(task, **same.get(task, {})))
  alone, one = _cache[task]
  together, many = some_steps(smoke(task, **same.get(task, {}), **changes))
  np.testing.assert_allclose(together, alone, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one.model_state), jax.tree.leaves(many.model_state)):
    np.testing.assert_allclose(a, b, atol=2e-5)  # the codebook: k-means and EMA over the global batch
  params, moments = many.params, many.opt_state[1]
  for p, mu, nu in zip(*map(jax.tree.leaves, (params, moments.mu, moments.nu))):
    assert p.sharding == mu.sharding == nu.sharding  # moments lie where their parameters lie
  split = [p for p in jax.tree.leaves(params) if not p.sharding.is_fully_replicated]
  assert bool(split) == (changes.get('mesh__data', 1) > 1 and changes.get('mesh__shard_state', True))


_cache = {}


def test_the_attention_kernel_trains_to_the_same_numbers():
  """The TPU kernel, interpreted, with heads and images split over the mesh, against plain attention on one device."""
  size = dict(model__width=256, model__heads=4, model__drop_path=0.0)
  alone, _ = some_steps(smoke('pretrain', **size, layers__attention='xla'))
  kernel = dict(layers__attention='tpu', layers__scan=True, layers__remat='full')
  together, _ = some_steps(smoke('pretrain', **size, **kernel, mesh__data=2, mesh__model=2, mesh__rules=FSDP))
  np.testing.assert_allclose(together, alone, rtol=2e-5)


@pytest.mark.parametrize('task', ['tokenizer', 'pretrain'])
def test_the_way_through_gpu_kernels(task, monkeypatch):
  """What a GPU runs in bf16 (kernels interpreted), on four devices of which two share the heads, against plain XLA on one."""
  extra = dict(dtype='bfloat16') | (dict(model__drop_path=0.0, tokenizer_dtype='bfloat16') if task == 'pretrain' else {})
  alone, _ = some_steps(smoke(task, **extra))
  calls = []

  def interpreted(name, function):
    def call(*args, **kwargs):
      calls.append(name)
      return function(*args, **kwargs | dict(interpret=True))

    return call

  monkeypatch.setattr(chip, 'platform', lambda: 'gpu')
  monkeypatch.setitem(chip.refused, 'TF32 product', 'a CPU has none')
  monkeypatch.setattr(attention_gpu, 'attend', interpreted('attention', attention_gpu.attend))
  monkeypatch.setattr(norm_gpu, 'backward', interpreted('layer norm', norm_gpu.backward))
  together, _ = some_steps(smoke(task, **extra, mesh__data=2, mesh__model=2, mesh__rules=FSDP))
  assert set(calls) == {'attention', 'layer norm'}
  np.testing.assert_allclose(together, alone, rtol=0.02)


FLAG = f'--config.mesh.rules={FSDP}'


def two_processes(*args):
  """Two processes of two devices each, through the same entry point."""
  import socket

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
    [],
    ['--config.mesh.shard_state=False', '--config.mesh.model=2'],
    [FLAG],
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


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
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


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch):
  healthy = loop.make_train_step

  def poisoned(*args):
    def step(state, *rest):
      state, values = healthy(*args)(state, *rest)
      return state, values | dict(loss=jnp.where(state.step >= 5, jnp.inf, values['loss']))

    return step

  monkeypatch.setattr(loop, 'make_train_step', poisoned)
  with pytest.raises(FloatingPointError, match=r'not finite at step 5 .*last good checkpoint is step 3.*optim.lr'):
    loop.run(smoke('pretrain'), tmp_path)
  assert stages.load_variables(tmp_path)[2] == 3


def test_a_failed_save_is_clear_and_keeps_the_last_good_one(tmp_path, monkeypatch):
  manager_save = checkpoint.ocp.CheckpointManager.save

  def full_disk(self, step, *args, **kwargs):
    if step == 6:
      raise OSError(28, 'No space left on device')
    return manager_save(self, step, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, 'save', full_disk)
    with pytest.raises(SaveError, match=r'could not save checkpoint 6.*No space left.*last good checkpoint is step 3'):
      loop.run(smoke('pretrain'), tmp_path)
  loop.run(smoke('pretrain'), tmp_path)
  assert stages.load_variables(tmp_path)[2] == 6


def test_keep_n_and_keep_every_and_only_complete_ones(tmp_path):
  loop.run(smoke('pretrain', checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3), tmp_path)
  folder = tmp_path / 'checkpoints'
  assert sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == [3, 5, 6]
  (folder / '7.orbax-checkpoint-tmp-123' / 'variables').mkdir(parents=True)  # what a kill in the middle of a save leaves
  assert stages.load_variables(tmp_path)[2] == 6
  assert checkpoint.Checkpoints(tmp_path).latest() == 6


def test_another_size_in_the_same_workdir_is_an_error(runs):
  c = smoke('pretrain', model__width=64, tokenizer_from=str(runs[0] / 'tokenizer'))
  before = (runs[0] / 'pretrain' / 'config.json').read_text()
  with pytest.raises(UserError, match='shapes differ .*another workdir'):
    loop.run(c, runs[0] / 'pretrain')
  assert (runs[0] / 'pretrain' / 'config.json').read_text() == before


BAD = {
  'unknown config key': (['--config=configs/vqkd_b16.py:smoke', '--config.optim.learning_rate=1'], 'learning_rate'),
  'missing config': (['--config=configs/nothing.py'], 'configs/nothing.py'),
  'wrong tokenizer path': (['--config=configs/beitv2_b16.py:smoke', '--config.tokenizer_from=/nowhere'], 'no config.json in /nowhere'),
  'batch does not divide': (['--config=configs/vqkd_b16.py:smoke', '--config.batch_size=15'], 'batch_size=15 does not divide'),
  'image size': (['--config=configs/vqkd_b16.py:smoke', '--config.data.image_size=30'], 'not a multiple of model.patch_size=8'),
  'no teacher': (['--config=configs/demo.py:stage=vqkd', '--config.teacher.name=/tmp'], 'no teacher in /tmp'),
  'recipe argument': (['--config=configs/vqkd_b16.py:smok'], 'unknown recipe argument'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(tmp_path, name):
  args, words = BAD[name]
  done = run_main(*args, f'--workdir={tmp_path}/run', devices=2)
  assert done.returncode == 2, done.stderr[-2000:]
  assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
  assert done.stderr.startswith('error: ') and not (tmp_path / 'run').exists()


def test_missing_workdir_is_one_line():
  done = run_main('--config=configs/vqkd_b16.py:smoke')
  assert done.returncode == 2 and done.stderr.startswith('error: give --workdir=DIR')
  done = run_main('--config=configs/vqkd_b16.py:smoke', '--workdir=gs://bucket/run')
  assert done.returncode == 2 and done.stderr.startswith('error: --workdir=gs://bucket/run: give a directory')


def test_tokenizer_of_another_kind_and_patch(runs, tmp_path):
  with pytest.raises(UserError, match='holds a pretrain stage, not a tokenizer'):
    loop.run(smoke('pretrain', tokenizer_from=str(runs[0] / 'pretrain')), tmp_path / 'a')
  with pytest.raises(UserError, match='make model.patch_size 8'):
    loop.run(smoke('pretrain', tokenizer_from=str(runs[0] / 'tokenizer'), model__patch_size=16), tmp_path / 'b')
  with pytest.raises(UserError, match='mask.count=16'):
    loop.run(smoke('pretrain', mask__count=16), tmp_path / 'c')
