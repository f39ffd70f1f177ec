"""Fine-tuning: what it starts from, what it refuses, and the evaluation of classifiers on other sets."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beitv2_jax.configs import finetune_b16, finetune_l16
from PIL import Image

import beitv2_jax
from beitv2_jax import commands, config, tasks
from beitv2_jax.data import sources
from beitv2_jax.downstream import classes, robustness
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.tasks import classify
from beitv2_jax.training import loop, metrics, optim, sharding
from beitv2_jax.weights.stages import load_variables, write_variables
from tests.conftest import smoke

TINY = dict(model__width=32, model__depth=3)


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
  """Untrained stages of one size, as directories: what init_from takes."""
  root = tmp_path_factory.mktemp('stages')
  out = {}
  for task in ('pretrain', 'tokenizer'):
    c = smoke(task).unlock()
    if task == 'tokenizer':
      c.model.encoder.update(depth=3)
      c.model.teacher_width = 8
    else:
      c.model.vocab = 32
    variables = from_config.fresh_variables(c, seed=3)
    out[task] = root / task
    out[task].mkdir()
    config.save(c, out[task])
    write_variables(out[task], 0, variables)
  return out


@pytest.fixture(scope='module')
def tuned(stages, tmp_path_factory):
  """A classifier trained for six steps from the pretrained stage."""
  workdir = tmp_path_factory.mktemp('tuned')
  results = loop.run(smoke('classifier', init_from=str(stages['pretrain']), ema_decay=0.5), workdir)
  return workdir, results


def test_fine_tuning_starts_from_pretraining(stages):
  c = smoke('classifier', init_from=str(stages['pretrain']))
  task, _ = tasks.make(c, source=sources.make('fake:20', 'train'))
  theirs, variables, _ = load_variables(stages['pretrain'])
  fresh = sharding.unbox(task.init(jax.random.key(0)))
  ours = task.adopt(theirs, variables, fresh)['params']
  assert jax.tree.structure(ours) == jax.tree.structure(fresh['params'])
  np.testing.assert_array_equal(ours['backbone']['block_2']['attn']['qkv'], variables['params']['backbone']['block_2']['attn']['qkv'])
  np.testing.assert_array_equal(
    ours['backbone']['block_1']['attn']['rel_pos_bias']['table'], variables['params']['backbone']['rel_pos_bias']['table']
  )
  np.testing.assert_array_equal(ours['fc_norm']['scale'], 1.0)  # not pretraining's norm
  np.testing.assert_array_equal(ours['head']['kernel'], fresh['params']['head']['kernel'])


def test_another_image_size_resamples_the_tables(stages):
  c = smoke('classifier', init_from=str(stages['pretrain']), data__image_size=48)
  task, _ = tasks.make(c, source=sources.make('fake:20', 'train'))
  theirs, variables, _ = load_variables(stages['pretrain'])
  ours = task.adopt(theirs, variables, sharding.unbox(task.init(jax.random.key(0))))['params']
  assert ours['backbone']['block_0']['attn']['rel_pos_bias']['table'].shape[0] == (2 * 6 - 1) ** 2 + 3


def test_a_tokenizers_encoder_can_be_fine_tuned(stages, tmp_path):
  c = finetune_b16.get_config('encoder,smoke').unlock()
  c.init_from = str(stages['tokenizer'])
  c.mesh.data = 1
  results = loop.run(c.lock(), tmp_path)
  assert np.isfinite(results['loss'])
  with pytest.raises(UserError, match='recipe argument encoder'):
    loop.run(smoke('classifier', init_from=str(stages['tokenizer'])), tmp_path / 'b')


def test_it_trains_and_keeps_an_average_of_its_weights(tuned):
  workdir, results = tuned
  assert {'acc1', 'acc5', 'loss', 'ema_acc1', 'ema_loss'} <= set(results)
  model, average = beitv2_jax.load(workdir), beitv2_jax.load(workdir, ema=True)
  a, b = (m.variables['params']['head']['kernel'] for m in (model, average))
  assert np.abs(a - b).max() > 0
  images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
  assert model.logits(images).shape == (2, 10) and model.config.class_names[3] == 'class 3'


def test_the_first_loss_is_that_of_a_guess(tuned):
  """The head starts at a thousandth: log 10 whatever the targets are mixed of."""
  first = metrics.read(tuned[0])[0]
  assert first['step'] == 1 and first['loss'] == pytest.approx(np.log(10), abs=2e-3)
  assert finetune_l16.get_config('smoke').model.width == 32  # shrinks itself


def test_the_average_is_a_running_one(stages):
  c = smoke('classifier', ema_decay=0.9)
  task, _ = tasks.make(c, source=sources.make('fake:20', 'train'))
  new, _ = task.update({'ema': dict(w=jnp.ones(2))}, {}, None, dict(w=jnp.zeros(2)))
  np.testing.assert_allclose(new['ema']['w'], 0.9)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(model__width=64), 'width 32 there, 64 here'),
    (dict(model__classes=7), 'has 10 classes; leave it 0'),
    (dict(batch_size=5), 'pair images: batch_size=5'),
  ],
)
def test_what_does_not_fit_is_said_in_words(stages, tmp_path, changes, words):
  c = smoke('classifier', init_from=str(stages['pretrain']), **changes)
  with pytest.raises(UserError, match=words):
    loop.run(c, tmp_path)


def test_another_number_of_classes_needs_a_fresh_head(tuned, tmp_path):
  for name in ('a', 'b', 'c'):
    (tmp_path / 'data' / name).mkdir(parents=True)
    for i in range(8):
      Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(tmp_path / 'data' / name / f'{i}.png')
  more = dict(init_from=str(tuned[0]), data__source=f'folder:{tmp_path}/data', batch_size=4, eval_batch_size=4, steps=2)
  with pytest.raises(UserError, match='knows 10 classes, .* has 3.*fresh_head=True'):
    loop.run(smoke('classifier', **more), tmp_path / 'run')
  assert np.isfinite(loop.run(smoke('classifier', **more, fresh_head=True), tmp_path / 'run')['loss'])


def test_unlabelled_images_are_refused(tmp_path):
  Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / '0.png')
  Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / '1.png')
  with pytest.raises(UserError, match='has no labels'):
    loop.run(smoke('classifier', data__source=f'folder:{tmp_path}'), tmp_path / 'run')


@pytest.mark.parametrize('pixels', [1, 8])
def test_evaluation_is_the_same_on_any_number_of_devices(tuned, tmp_path, pixels):
  """50 images in batches of 16 on 1 and on 8 devices: a ragged last batch, and every image once."""
  c = smoke('classifier', init_from=str(tuned[0]), steps=0, data__source='fake:50', mesh__data=pixels)
  results = loop.run(c, tmp_path)
  model = beitv2_jax.load(tuned[0])
  source = sources.make('fake:50', 'eval')
  logits, labels, _ = robustness.all_logits(model, source, 0.875, 7)
  by_hand = 100 * (logits.argmax(1) == labels).mean()
  assert results['acc1'] == pytest.approx(by_hand, abs=1e-4) and len(labels) == 50


@pytest.mark.parametrize(
  'recipe, arg, wanted',
  [
    (finetune_b16, '', dict(lr=5e-4, epochs=100, layer_decay=0.6, drop_path=0.2, mixup=0.8, crop=0.875, batch=1024)),
    (finetune_b16, 'pretrained=300', dict(lr=5e-4, epochs=100, layer_decay=0.65, drop_path=0.1, mixup=0.8, crop=0.875, batch=1024)),
    (finetune_b16, 'pretrained=21k', dict(lr=5e-5, epochs=30, layer_decay=0.75, drop_path=0.1, mixup=0.0, crop=0.875, batch=1024)),
    (finetune_b16, 'data=in21k', dict(lr=6e-4, epochs=90, layer_decay=0.75, drop_path=0.1, mixup=0.8, crop=0.875, batch=4096)),
    (finetune_b16, 'size=384,crop=timm', dict(lr=5e-4, epochs=100, layer_decay=0.6, drop_path=0.2, mixup=0.8, crop=0.9, batch=1024)),
    (finetune_l16, '', dict(lr=2e-4, epochs=50, layer_decay=0.8, drop_path=0.2, mixup=0.8, crop=0.875, batch=1024)),
    (finetune_l16, 'pretrained=21k,size=512', dict(lr=7e-5, epochs=20, layer_decay=0.8, drop_path=0.25, mixup=0.0, crop=1.0, batch=1024)),
    (finetune_l16, 'data=in21k', dict(lr=6e-4, epochs=90, layer_decay=0.75, drop_path=0.2, mixup=0.8, crop=0.875, batch=4096)),
  ],
)
def test_recipes(recipe, arg, wanted):
  c = recipe.get_config(arg)
  have = dict(
    lr=c.optim.lr, epochs=c.epochs, layer_decay=c.optim.layer_decay, drop_path=c.model.drop_path, mixup=c.mixup, crop=c.data.crop_pct, batch=c.batch_size
  )  # fmt: skip
  assert have == wanted
  assert c.optim.min_lr == 1e-6 and c.optim.weight_decay == 0.05 and c.label_smoothing == 0.1 and c.random_erasing == 0.25


def test_parameter_counts_at_384(monkeypatch):
  c = finetune_b16.get_config('size=384').unlock()
  task, _ = classify.make(c)
  shapes = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == 86_744_104  # as timm counts them
  assert optim.layer_scales(shapes['params'], 0.6)['backbone']['patch_embed']['kernel'] == pytest.approx(0.00130607, rel=1e-5)


def test_subset_of_classes_is_judged_among_itself(tuned, tmp_path):
  names = [f'n{i:08d}' for i in range(10)]
  assert classes.class_subset(['n00000002', 'n00000007'], names).tolist() == [2, 7]
  assert classes.class_subset(['0', '1', '10'], [f'n{i:08d}' for i in range(11)]).tolist() == [0, 1, 10]
  with pytest.raises(UserError, match='does not know 1 of the 2 classes'):
    classes.class_subset(['n00000002', 'dog'], names)
  logits = np.array([[9, 1, 2, 3.0], [9, 5, 2, 3], [0, 0, 0, 9]])
  result = robustness.accuracy(logits, np.array([1, 0, 1]), np.array([1, 3]))
  assert result['acc1'] == 100 and result['classes'] == 2
  real = robustness.real_accuracy(logits, [[0, 2], [], [1]])
  assert real == dict(acc1=50.0, images=2)


def test_imagenets_classes_stand_where_the_official_lists_have_them():
  """The first three of ImageNet-A: stingray, goldfinch, junco are classes 6, 11 and 13."""
  wnids = classes.imagenet_classes()
  assert len(wnids) == 1000 and wnids == sorted(wnids)
  assert classes.class_subset(['n01498041', 'n01531178', 'n01534433'], wnids).tolist() == [6, 11, 13]


def test_robustness_from_one_command(tuned, tmp_path, capsys):
  """Sets named one by one, and the same from a recipe."""
  for name in ('class 2', 'class 5'):
    (tmp_path / 'a' / name).mkdir(parents=True)
    for i in range(3):
      Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(tmp_path / 'a' / name / f'ILSVRC2012_val_{i + 1:08d}.png')
  (tmp_path / 'real.json').write_text(json.dumps([[2], [], [2, 5]]))
  data = f'folder:{tmp_path}/a'
  common = ['--from', str(tuned[0]), '--json', f'{tmp_path}/out.json']
  named = ['--data', f'a={data}', '--data', f'imagenet={data}', '--real', f'{tmp_path}/real.json']
  recipe = [
    '--config=configs/robustness.py',
    f'--config.sets.a={data}',
    f'--config.sets.imagenet={data}',
    f'--config.real={tmp_path}/real.json',
  ]
  results = []
  for args in (named, recipe):
    assert commands.run('robustness', [*common, *args]) == 0
    results.append(json.loads((tmp_path / 'out.json').read_text()))
  assert results[0] == results[1]
  out = results[0]
  assert out['a']['classes'] == 2 and out['a']['images'] == 6 and out['real']['images'] == 4
  capsys.readouterr()
  assert commands.run('robustness', common) == 2 and 'name at least one set' in capsys.readouterr().err
  assert commands.run('robustness', [*common, '--data', data]) == 2 and '--data a=folder:PATH' in capsys.readouterr().err


def test_predicted_classes(tuned, tmp_path, capsys):
  Image.fromarray(np.full((50, 40, 3), 90, np.uint8)).save(tmp_path / '0.png')
  (tmp_path / '1.jpg').write_bytes(b'broken')
  assert commands.run('predict', ['--from', str(tuned[0]), str(tmp_path), '--top', '3']) == 0
  out = capsys.readouterr()
  (line,) = out.out.strip().splitlines()
  best = json.loads(line)['classes']
  assert len(best) == 3 and best[0]['probability'] >= best[1]['probability'] and best[0]['name'].startswith('class ')
  assert '1.jpg does not decode' in out.err


def test_one_command_probes_every_block(tuned, capsys, tmp_path):
  args = ['--from', str(tuned[0]), '--data', 'fake:40', '--epochs', '3', '--shots', '1', '--attentive', '--views', '2']
  assert commands.run('probe', [*args, '--json', f'{tmp_path}/p.json']) == 0
  out = capsys.readouterr().out
  assert out.count('\n') >= 6 and 'best linear probe' in out and 'k-NN' in out and 'attentive' in out
  figures = json.loads((tmp_path / 'p.json').read_text())
  assert np.shape(figures['layers']) == (3, 3) and figures['probe'] == np.max(figures['layers'])
  assert commands.run('probe', [*args, '--untrained']) == 0
  (tmp_path / 'flat').mkdir()
  for i in range(4):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / 'flat' / f'{i}.png')
  assert commands.run('probe', ['--from', str(tuned[0]), '--data', f'folder:{tmp_path}/flat']) == 2
  assert 'probes need labels' in capsys.readouterr().err


def test_real_leaves_out_an_image_that_does_not_decode(tmp_path, monkeypatch):
  """The labels of those after it stay theirs: the model here sees an image's brightness as its class, and is always right."""
  for i in range(6):
    path = tmp_path / 'data' / f'class {i // 3}' / f'ILSVRC2012_val_{i + 1:08d}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(path)
  (tmp_path / 'data' / 'class 0' / 'ILSVRC2012_val_00000002.png').write_bytes(b'no image')
  (tmp_path / 'real.json').write_text(json.dumps([[i] for i in range(6)]))
  monkeypatch.setattr(robustness, 'model_classes', lambda config: [f'class {i}' for i in range(6)])
  model = types.SimpleNamespace(kind='classifier', config=smoke('classifier'), logits=lambda images: np.eye(6)[images[:, 0, 0, 0]])
  found = robustness.run(model, dict(imagenet=f'folder:{tmp_path}/data'), real=str(tmp_path / 'real.json'), batch=4)
  assert found['real'] == dict(acc1=100.0, images=5) and found['imagenet']['images'] == 5


def test_a_set_that_names_more_classes_than_it_has_is_judged_among_those_it_has(tmp_path, monkeypatch):
  """As ImageNet-A and -R of TFDS, which name 1,000 and have 200. The model takes every image for class 0, and then for 5 rather than 1."""
  for label in (1, 5):
    Image.fromarray(np.full((40, 40, 3), label, np.uint8)).save(tmp_path / f'{label}.png')
  (tmp_path / 'list.txt').write_text('1.png 1\n5.png 5\n')
  monkeypatch.setattr(robustness, 'model_classes', lambda config: [str(i) for i in range(6)])
  logits = lambda images: np.tile([[9.0, 1, 2, 3, 4, 5]], (len(images), 1))
  model = types.SimpleNamespace(kind='classifier', config=smoke('classifier'), logits=logits)
  found = robustness.run(model, dict(a=f'list:{tmp_path}/list.txt'))
  assert found['a']['classes'] == 2 and found['a']['acc1'] == 50


def test_what_is_given_beside_a_recipe_of_sets_counts_more(monkeypatch, tmp_path):
  given = {}
  monkeypatch.setattr(robustness, 'run', lambda model, **options: given.update(options) or {})
  monkeypatch.setattr('beitv2_jax.downstream.trained.load', lambda source: None)
  args = ['--from', 'x', '--config=configs/robustness.py', '--config.sets.a=folder:a', '--crop-pct', '0.95', '--real', 'r.json']
  assert commands.run('robustness', args) == 0
  assert (given['crop_pct'], given['real'], given['sets']['a'], given['batch']) == (0.95, 'r.json', 'folder:a', 64)
