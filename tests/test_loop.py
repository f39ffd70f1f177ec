"""The loop: going on after a stop, starting from other weights, broken runs, checkpoints."""

import dataclasses
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest

import beitv2_jax
from beitv2_jax import config as config_lib
from beitv2_jax.data import decode, sources, transforms
from beitv2_jax.errors import SaveError, UserError
from beitv2_jax.training import checkpoint, events, loop, metrics
from beitv2_jax.weights import stages, trees
from tests.conftest import smoke


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
  last = events.read(tmp_path)[-1]
  assert (
    last['event'] == 'failed' and 'not finite' in last['text'] and ', failed; this page is of' in (tmp_path / 'report.html').read_text()
  )


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


def test_tokenizer_of_another_kind_and_patch(runs, tmp_path):
  with pytest.raises(UserError, match='holds a pretrain stage, not a tokenizer'):
    loop.run(smoke('pretrain', tokenizer_from=str(runs[0] / 'pretrain')), tmp_path / 'a')
  with pytest.raises(UserError, match='make model.patch_size 8'):
    loop.run(smoke('pretrain', tokenizer_from=str(runs[0] / 'tokenizer'), model__patch_size=16), tmp_path / 'b')
  with pytest.raises(UserError, match='mask.count=16'):
    loop.run(smoke('pretrain', mask__count=16), tmp_path / 'c')


@pytest.mark.parametrize(
  'target, extra', [('features', {}), ('pixels', {}), ('pixels', dict(model__head_layers=0)), ('codes', dict(mask__kind='random'))]
)
def test_controls_of_pretraining_train(tmp_path, target, extra):
  """The same student with something else to predict; what it left is where fine-tuning starts."""
  loop.run(smoke('pretrain', target=target, steps=30, optim__lr=3e-3, optim__warmup_epochs=0.0, **extra), tmp_path / 'run')
  rows = metrics.read(tmp_path / 'run')
  assert rows[-1]['loss_1'] < 0.97 * rows[0]['loss_1'] and ('loss_2' in rows[0]) == ('model__head_layers' not in extra)
  loop.run(smoke('classifier', init_from=str(tmp_path / 'run'), steps=1), tmp_path / 'tuned')
  if target != 'codes':
    with pytest.raises(UserError, match=f'trained to predict {target}'):
      beitv2_jax.load(tmp_path / 'run').masked_logits(np.zeros((1, 32, 32, 3), np.uint8), np.ones((1, 4, 4), bool))


def test_targets_of_the_controls():
  from beitv2_jax.tasks import make
  from beitv2_jax.tasks.regress import normalized_patches

  images = np.random.default_rng(0).uniform(0, 1, (2, 16, 24, 3)).astype(np.float32)
  out = np.asarray(normalized_patches(images, 8))
  patch = images[1, 8:16, 16:24]
  np.testing.assert_allclose(out[1, 5], ((patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)).ravel(), atol=1e-5)
  # The loss of features is VQ-KD's: 0 for the teacher's own features, whatever their length, and 2 for their opposite.
  config = smoke('pretrain', target='features').unlock()
  task, frozen = make(config)
  batch = dict(image=(255 * np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3))).astype(np.uint8), mask_index=np.array([[0, 5], [3, 9]]))
  target = task._target(frozen, batch['image'])

  class Told:
    def __init__(self, sign):
      self.sign = sign

    def apply(self, variables, images, index, **_):
      return self.sign * 7 * np.take_along_axis(np.asarray(target), index[..., None], 1)[None]

  for sign, right in ((1, 0), (-1, 2)):
    losses = dataclasses.replace(task, model=Told(sign))._forward({}, frozen, batch)
    np.testing.assert_allclose(losses['loss_1'], right, atol=1e-6)


def test_random_masks():
  from beitv2_jax.data.masking import RandomMask

  drawn = [RandomMask((4, 5), 7)({}, np.random.default_rng(i))['mask_index'] for i in range(400)]
  assert all(len(set(d.tolist())) == 7 and (np.diff(d) > 0).all() for d in drawn)
  counts = np.bincount(np.concatenate(drawn), minlength=20)
  assert len(counts) == 20 and counts.min() > 100 and counts.max() < 180  # 140 each on average


def test_a_finished_run_says_so(tmp_path, capsys):
  loop.run(smoke('pretrain'), tmp_path)
  capsys.readouterr()
  loop.run(smoke('pretrain', steps=4), tmp_path)
  said = ' '.join(capsys.readouterr())
  assert 'steps: 6 -> 4' in said and 'this run is finished at step 6: nothing of it changes' in said


def test_samples_come_from_all_over_the_evaluation_images():
  """Sorted by class, the first ones would be of one class."""
  source = sources.make('fake:800', 'eval')
  setup = types.SimpleNamespace(mesh=types.SimpleNamespace(size=8), transforms={'eval': [transforms.CenterCrop(32, 1.0)]})
  training = types.SimpleNamespace(setup=setup, _share=lambda: dict(seed=0))
  found = loop.Training.spread_out(training, source, 3)
  assert len(found['image']) == 8  # one a device
  for image, place in zip(found['image'], np.linspace(0, len(source) - 1, 3).round().astype(int)):
    np.testing.assert_array_equal(
      image, transforms.CenterCrop(32, 1.0)(dict(image=decode.image(source[int(place)]['image'])), None)['image']
    )


def test_a_tokenizer_that_was_trained_on_is_spoken_of(runs, tmp_path, capsys):
  shutil.copytree(runs[0] / 'tokenizer', tmp_path / 'tokenizer')
  again = dict(tokenizer_from=str(tmp_path / 'tokenizer'), mesh__data=1)
  loop.run(smoke('pretrain', steps=2, **again), tmp_path / 'run')
  loop.run(smoke('pretrain', steps=3, **again), tmp_path / 'run')
  assert 'has other weights' not in capsys.readouterr().err
  loop.run(smoke('tokenizer', steps=7), tmp_path / 'tokenizer')
  loop.run(smoke('pretrain', steps=4, **again), tmp_path / 'run')
  assert f'the tokenizer in {tmp_path}/tokenizer has other weights than when this run was last started' in ' '.join(capsys.readouterr())
