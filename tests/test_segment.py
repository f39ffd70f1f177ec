"""Segmentation: data, exact metrics and windows, training and prediction."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beitv2_jax.configs import ade20k_b16, ade20k_l16
from PIL import Image

import beitv2_jax
from beitv2_jax import commands
from beitv2_jax.data import decode, scenes, sources
from beitv2_jax.downstream import segmentation
from beitv2_jax.errors import UserError
from beitv2_jax.models.upernet import linear_weights
from beitv2_jax.tasks import scores
from beitv2_jax.training import loop
from tests.conftest import smoke

CLASSES = 3


def scene(seed):
  """An image whose left part is dark and class 0, whose right part is bright and class 1; a stripe of class 2, one of none."""
  rng = np.random.default_rng(seed)
  h, w = 40 + seed % 5, 56 + 3 * (seed % 4)
  mask = np.zeros((h, w), np.uint8)
  mask[:, w // 2 :] = 1
  mask[: h // 5] = 2
  mask[-3:] = 9
  image = np.array([[20, 30, 40], [200, 180, 190], [10, 220, 30]], np.uint8)[np.minimum(mask, 2)] + rng.integers(0, 20, (h, w, 3), np.uint8)
  return image, mask


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('scenes')
  for split, count in (('train', 8), ('val', 5)):
    for kind in ('images', 'masks'):
      (root / split / kind).mkdir(parents=True)
    for i in range(count):
      image, mask = scene(i + 10 * (split == 'val'))
      Image.fromarray(image).save(root / split / 'images' / f'{i}.png')
      Image.fromarray(mask).save(root / split / 'masks' / f'{i}.png')
  (root / 'classes.txt').write_text('dark\nbright\nsky\n')
  return root


def recipe(folder, **changes):
  more = dict(data__source=f'scenes:{folder}', model__classes=CLASSES, labels__reduce_zero=False, labels__ignore=(9, 255))
  return smoke('segmenter', **(more | changes))


@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('segmenter')
  c = recipe(folder, steps=60, optim__lr=3e-3, optim__warmup_steps=5, optim__layer_decay=1.0, checkpoint__every=100, log_every=30)
  return workdir, loop.run(c, workdir)


def test_metrics_by_hand():
  """Two classes and one that is nowhere; pixels of no class don't count."""
  label = np.array([[0, 0, 1, 1], [0, scenes.IGNORE, 1, scenes.IGNORE]])
  predicted = np.array([[0, 1, 1, 1], [0, 0, 0, 1]])
  matrix = scores.confusion(label, predicted, 3)
  np.testing.assert_array_equal(matrix, [[2, 1, 0], [1, 2, 0], [0, 0, 0]])
  s = scores.segmentation_scores(matrix)
  assert s['miou'] == pytest.approx(50) and s['macc'] == pytest.approx(200 / 3) and s['aacc'] == pytest.approx(200 / 3)
  np.testing.assert_allclose(s['iou'], [50, 50, np.nan])


def test_window_starts_are_clamped_to_the_border():
  assert segmentation.window_starts(512, 512, 341) == [0]
  assert segmentation.window_starts(683, 512, 341) == [0, 171]
  assert segmentation.window_starts(1200, 512, 341) == [0, 341, 682, 688]
  assert segmentation.window_starts(300, 512, 341) == [0]


@pytest.mark.parametrize('length, window, stride, out', [(20, 8, 5, 33), (8, 8, 5, 8), (6, 8, 5, 11), (17, 8, 5, 17)])
def test_the_axis_matrices_are_upsampling_averaging_and_resizing(length, window, stride, out):
  """Against doing it step by step, with each window's scores upsampled, added up, divided by the cover and resized."""
  starts, cells = segmentation.window_starts(length, window, stride), 2
  scores = np.random.default_rng(0).normal(size=(len(starts), cells)).astype(np.float32)
  total, cover = np.zeros(length), np.zeros(length)
  for s, x in zip(starts, scores):
    up = (linear_weights(cells, window) @ x)[: length - s]
    total[s : s + window] += up
    cover[s : s + window] += 1
  by_hand = linear_weights(length, out) @ (total / cover)
  matrices = segmentation.axis_matrices(length, window, cells, starts, out)
  np.testing.assert_allclose(np.einsum('woc,wc->o', matrices, scores), by_hand, atol=1e-5)


def test_prediction_follows_the_scores():
  """A network that sees the class in the colour: all ways to look agree with it, at the original size."""

  def logits_of(images):
    dark = images.astype(np.float32).mean(-1) < 100
    small = jax.image.resize(jnp.asarray(np.stack([dark, ~dark], -1), jnp.float32), (len(images), 8, 8, 2), 'linear')
    return 20 * small

  image = np.zeros((50, 90, 3), np.uint8)
  image[:, 45:] = 255
  for how in (dict(), dict(mode='whole'), dict(flip=True), dict(scales=(0.75, 1.5), flip=True)):
    best = segmentation.predict(logits_of, image, (32, 32), **how)
    assert best.shape == (50, 90) and (best[:, :36] == 0).all() and (best[:, 54:] == 1).all(), how


def test_sources_with_masks(folder, tmp_path):
  train_set, held = (sources.make(f'scenes:{folder}', s) for s in ('train', 'eval'))
  assert len(train_set) == 8 and len(held) == 5 and train_set.classes == ['dark', 'bright', 'sky']
  record = decode.Decoded(train_set)[3]
  np.testing.assert_array_equal(record['mask'], scene(3)[1])
  with pytest.raises(UserError, match='looked for images/training'):
    sources.make(f'scenes:{tmp_path}', 'train')
  (tmp_path / 'images').mkdir()
  (tmp_path / 'masks').mkdir()
  Image.fromarray(scene(0)[0]).save(tmp_path / 'images' / 'x.jpg')
  with pytest.raises(UserError, match='1 of the 1 images .* have no mask .*x.jpg'):
    sources.make(f'scenes:{tmp_path}', 'train')


def test_ade20k_layout_and_labels(tmp_path):
  for split in ('training', 'validation'):
    for kind in ('images', 'annotations'):
      (tmp_path / kind / split).mkdir(parents=True)
    Image.fromarray(scene(0)[0]).save(tmp_path / 'images' / split / 'ADE_1.jpg')
    Image.fromarray(np.array([[0, 1], [150, 2]], np.uint8)).save(tmp_path / 'annotations' / split / 'ADE_1.png')
  source = sources.make(f'scenes:{tmp_path}', 'eval')
  mask = decode.Decoded(source)[0]['mask']
  record = dict(mask=mask, image=np.zeros((2, 2, 3), np.uint8))
  np.testing.assert_array_equal(scenes.Labels(150, reduce_zero=True)(record, None)['mask'], [[scenes.IGNORE, 0], [149, 1]])
  with pytest.raises(UserError, match='a mask holds 150, but there are 100 classes counted from 1'):
    scenes.Labels(100, reduce_zero=True)(record, None)
  with pytest.raises(UserError, match='a mask is 2x2, its image 3x2'):
    scenes.Labels(151)(record | dict(image=np.zeros((3, 2, 3), np.uint8)), None)
  with pytest.raises(ValueError, match='mode RGB'):
    decode.mask((tmp_path / 'images' / 'validation' / 'ADE_1.jpg').read_bytes())


def test_ade20k_full_set(tmp_path):
  """Its class numbers are in the red and green of NAME_seg.png, beside parts and instances that are no scenes."""
  numbers = np.array([[0, 1, 2], [255, 256, 3687]])
  for split in ('training', 'validation'):
    folder = tmp_path / 'images' / 'ADE' / split / 'urban' / 'street'
    (folder / 'ADE_1').mkdir(parents=True)
    Image.fromarray(scene(0)[0][:2, :3]).save(folder / 'ADE_1.jpg')
    Image.fromarray(np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], -1).astype(np.uint8)).save(folder / 'ADE_1_seg.png')
    Image.fromarray(scene(0)[0]).save(folder / 'ADE_1_parts_1.png')
    Image.fromarray(scene(0)[0][..., 0]).save(folder / 'ADE_1' / 'instance_000_ADE_1.png')
  source = sources.make(f'scenes:{tmp_path}', 'train')
  assert len(source) == 1
  record = decode.Decoded(source)[0]
  np.testing.assert_array_equal(record['mask'], numbers)
  expected = np.where(numbers == 0, scenes.IGNORE, numbers - 1)
  np.testing.assert_array_equal(scenes.Labels(3687, reduce_zero=True, ignore=())(record, None)['mask'], expected)


def test_an_archive_is_to_be_unpacked(tmp_path):
  (tmp_path / 'ADEChallengeData2016.zip').write_bytes(b'PK')
  with pytest.raises(UserError, match='is a file; unpack it .* and name the folder'):
    sources.make(f'scenes:{tmp_path}/ADEChallengeData2016.zip', 'train')
  for kind in ('images', 'annotations'):  # unpacked into a folder made for it
    (tmp_path / 'ADEChallengeData2016' / kind / 'training').mkdir(parents=True)
    Image.fromarray(scene(0)[0][..., 0]).save(tmp_path / 'ADEChallengeData2016' / kind / 'training' / 'x.png')
  assert len(sources.make(f'scenes:{tmp_path}', 'train')) == 1


def test_augmentation_keeps_image_and_mask_together():
  """The class can still be read off the colour after resizing, cropping and mirroring; padding is marked."""
  steps = [
    scenes.Labels(CLASSES, ignore=(9, 255)),
    scenes.RandomResize(32),
    scenes.RandomCrop((32, 32)),
    scenes.FlipBoth(),
    scenes.Pad((32, 32)),
  ]
  small = 0
  for seed in range(30):
    image, mask = scene(seed)
    record, rng = dict(image=image, mask=mask.astype(np.int32)), np.random.default_rng(seed)
    for step in steps:
      record = step(record, rng)
    x, m = record['image'].astype(int), record['mask']
    assert x.shape == (32, 32, 3) and m.shape == (32, 32) and set(np.unique(m)) <= {0, 1, 2, scenes.IGNORE}
    bright = x[..., 0] > 120
    known = m < 2
    assert (bright[known] == (m[known] == 1)).mean() > 0.93
    small += (m[-1] == scenes.IGNORE).all()
  assert 3 < small < 29  # images are made smaller than the crop as well as larger


def test_photometric_distortion_moves_colours_and_not_too_far():
  image = np.full((8, 8, 3), (90, 120, 150), np.uint8)
  out = [scenes.PhotometricDistortion()(dict(image=image), np.random.default_rng(i))['image'][0, 0] for i in range(200)]
  same = np.mean([np.array_equal(x, image[0, 0]) for x in out])
  assert same == pytest.approx(1 / 16, abs=0.06)  # brightness, contrast, saturation and hue, each half of the time
  assert np.std(out, 0).min() > 10


def test_training_learns_and_the_exact_scores_agree(trained, folder):
  workdir, quick = trained
  model = beitv2_jax.load(workdir)
  labels = scenes.Labels(CLASSES, ignore=(9, 255))
  exact = segmentation.evaluate(model, sources.make(f'scenes:{folder}', 'eval'), labels)
  whole = segmentation.evaluate(model, sources.make(f'scenes:{folder}', 'eval'), labels, mode='whole', flip=True)
  assert quick['quick_miou'] > 50 and exact['miou'] > 50 and whole['miou'] > 50, (quick, exact, whole)
  assert model.config.class_names == ['dark', 'bright', 'sky']
  stats = model.variables['batch_stats']['psp_bottleneck']['bn']
  assert np.abs(stats['mean']).max() > 0  # the running statistics moved


def test_a_pair_that_does_not_decode_is_left_out(trained, folder, tmp_path):
  """It has the place of no other: the scores are those of the set without it."""
  labels, model = scenes.Labels(CLASSES, ignore=(9, 255)), beitv2_jax.load(trained[0])
  shutil.copytree(folder, tmp_path / 'broken')
  (tmp_path / 'broken' / 'val' / 'images' / '1.png').write_bytes(b'no image')
  shutil.copytree(folder, tmp_path / 'without')
  for kind in ('images', 'masks'):
    (tmp_path / 'without' / 'val' / kind / '1.png').unlink()
  found = [segmentation.evaluate(model, sources.make(f'scenes:{tmp_path}/{name}', 'eval'), labels) for name in ('broken', 'without')]
  assert found[0]['images'] == 4 and found[0]['miou'] == found[1]['miou'] and found[0]['aacc'] == found[1]['aacc']


def test_scales_below_one_do_not_look_beyond_the_image():
  """As in the official multi-scale test. This network knows only where a pixel lies in its window."""
  place = np.stack([np.linspace(0, 5, 64).reshape(8, 8), np.linspace(5, 0, 64).reshape(8, 8)], -1)
  logits_of = lambda images: np.tile(place[None].astype(np.float32), (len(images), 1, 1, 1))
  image = np.zeros((50, 90, 3), np.uint8)
  small, one = (np.asarray(segmentation.probabilities(logits_of, image, (32, 32), scale=scale)) for scale in (0.5, 1.0))
  np.testing.assert_array_equal(small, one)


def test_images_without_masks_are_no_scenes(trained, folder, capsys):
  assert commands.run('segmentation', ['--from', str(trained[0]), '--data', f'folder:{folder}/val/images']) == 2
  assert 'these images have no masks: give scenes:PATH' in capsys.readouterr().err


def test_scores_from_the_command_line(trained, capsys, tmp_path):
  assert commands.run('segmentation', ['--from', str(trained[0]), '--json', f'{tmp_path}/s.json']) == 0
  assert 'dark' in capsys.readouterr().out
  assert set(json.loads((tmp_path / 's.json').read_text())['iou']) == {'dark', 'bright', 'sky'}


def test_predicted_masks(trained, folder, tmp_path):
  assert (
    commands.run(
      'predict', ['--from', str(trained[0]), f'{folder}/val/images/0.png', '--out', f'{tmp_path}/o', '--json', f'{tmp_path}/r.json']
    )
    == 0
  )
  (result,) = json.loads((tmp_path / 'r.json').read_text())
  mask = np.array(Image.open(result['mask']))
  assert mask.shape == scene(10)[1].shape and mask.max() < CLASSES
  assert np.array(Image.open(result['overlay'])).shape == (*mask.shape, 3)
  assert sum(result['classes'].values()) == pytest.approx(100, abs=0.1)


def test_masks_stay_below_the_folder_that_was_given(trained, folder, tmp_path, monkeypatch):
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  shutil.copytree(folder / 'val' / 'images', tmp_path / 'photos')
  shutil.copytree(folder / 'val' / 'images', tmp_path / 'here' / 'more')
  args = ['predict', ['--from', str(trained[0]), '../photos/0.png', 'more/1.png', '--out', 'o', '--json', 'r.json']]
  assert commands.run(*args) == 0
  written = [Path(row['mask']).resolve() for row in json.loads(Path('r.json').read_text())]
  assert len(written) == 2 and all((tmp_path / 'here' / 'o') in path.parents and path.exists() for path in written)


def test_masks_of_images_of_one_name_do_not_overwrite_each_other(trained, folder, tmp_path):
  images = [f'{folder}/{split}/images/0.png' for split in ('train', 'val')]
  assert commands.run('predict', ['--from', str(trained[0]), *images, '--out', f'{tmp_path}/o', '--json', f'{tmp_path}/r.json']) == 0
  first, second = json.loads((tmp_path / 'r.json').read_text())
  assert (first['mask'], second['mask']) == tuple(f'{tmp_path}/o/{split}/images/0_mask.png' for split in ('train', 'val'))
  assert np.array(Image.open(first['mask'])).shape == scene(0)[1].shape
  assert np.array(Image.open(second['mask'])).shape == scene(10)[1].shape


def test_other_sizes_and_data_are_said_in_words(trained, folder, tmp_path):
  with pytest.raises(UserError, match='depth 3 there, 5 here'):
    loop.run(recipe(folder, init_from=str(trained[0]), model__depth=5), tmp_path / 'x')
  with pytest.raises(UserError, match='names 3 classes, model.classes is 4'):
    loop.run(recipe(folder, model__classes=4), tmp_path / 'y')
  with pytest.raises(UserError, match='has no masks'):
    loop.run(recipe(folder, data__source='fake:20'), tmp_path / 'z')


def test_recipes_and_their_schedule():
  from beitv2_jax.training import optim

  for c, lr, decay, drop in ((ade20k_b16.get_config(), 5e-5, 0.75, 0.15), (ade20k_l16.get_config('pretrained=21k'), 3e-5, 0.9, 0.2)):
    assert (c.optim.lr, c.optim.layer_decay, c.model.drop_path, c.steps, c.batch_size) == (lr, decay, drop, 160_000, 16)
    _, schedule = optim.make(c.optim, 160_000, 1500)
    assert float(schedule(0)) == pytest.approx(lr * 1e-6, rel=1e-3)
    assert float(schedule(750)) == pytest.approx(lr * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)), rel=1e-5)
    assert float(schedule(80_000)) == pytest.approx(lr / 2, rel=1e-5)
  assert ade20k_l16.get_config('smoke').model.width == 32  # shrinks itself
