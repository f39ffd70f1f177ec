import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import tifffile
from PIL import Image, ImageEnhance
from pyarrow import parquet

from beitv2_jax.data import augment, decode, folders, pipeline, randaugment, sources, transforms
from beitv2_jax.data.masking import BlockMask
from beitv2_jax.errors import UserError

STEPS = [transforms.RandomResizedCrop(24), transforms.Flip(), BlockMask((4, 4), 6, 2)]


class Numbered(sources.Fake):
  """Fake images that know their index."""

  def __getitem__(self, i):
    return super().__getitem__(i) | dict(index=i)


def take(n, **kwargs):
  args = dict(seed=3, batch=8, workers=-1) | kwargs
  stream = pipeline.train_batches(Numbered('20', 'train'), STEPS, **args)
  return [next(stream) for _ in range(n)]


def same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_array_equal(a[k], b[k])


def test_stream_is_a_function_of_seed_and_step():
  whole = take(7)
  for a, b in zip(whole[4:], take(3, start=4)):
    same(a, b)
  for a, b in zip(whole, take(7, workers=0)):  # threads
    same(a, b)
  halves = [take(7, process=p, processes=2) for p in (0, 1)]
  for a, *parts in zip(whole, *halves):
    same(a, {k: np.concatenate([p[k] for p in parts]) for k in a})
  assert any((a['index'] != b['index']).any() for a, b in zip(whole, take(7, seed=4)))


def test_worker_processes_give_the_same_stream():
  for a, b in zip(take(4, start=2), take(4, start=2, workers=2)):
    same(a, b)


def test_every_epoch_visits_every_record_once_in_a_new_order():
  order = np.concatenate([b['index'] for b in take(5)])  # 2 epochs of 20
  first, second = order[:20], order[20:]
  assert sorted(first) == sorted(second) == list(range(20))
  assert (first != second).any()


@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_counts_every_image_once(processes):
  parts = [
    list(pipeline.eval_batches(Numbered('20', 'eval'), [transforms.CenterCrop(24)], seed=0, batch=8, process=p, processes=processes))
    for p in range(processes)
  ]
  assert [len(p) for p in parts] == [3] * processes
  seen = [i for p in parts for b in p for i in b['index'][b['valid']]]
  assert sorted(seen) == list(range(20))


def test_mask_has_exactly_its_count_and_the_official_distribution():
  """Frequencies of 20,000 masks of the official generator: corner 0.045, edge middle 0.19, centre 0.717."""
  draw = BlockMask((14, 14), 75)
  masks = np.stack([draw.draw(np.random.default_rng(i)) for i in range(3000)])
  assert (masks.sum((1, 2)) == 75).all()
  mean = masks.mean(0)
  assert abs(mean[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.045) < 0.01
  assert abs(mean[[0, 0, 13, 13, 6, 7, 6, 7], [6, 7, 6, 7, 0, 0, 13, 13]].mean() - 0.19) < 0.015
  assert abs(mean[6:8, 6:8].mean() - 0.717) < 0.015
  record = draw({}, np.random.default_rng(0))
  np.testing.assert_array_equal(record['mask_index'], np.flatnonzero(masks[0]))


@pytest.mark.parametrize('grid, count, block', [((4, 4), 6, 2), ((8, 8), 26, 16), ((6, 10), 24, 4), ((3, 3), 8, 16)])
def test_mask_at_any_grid(grid, count, block):
  for i in range(50):
    assert BlockMask(grid, count, block).draw(np.random.default_rng(i)).sum() == count


def test_random_box_distribution():
  rng = np.random.default_rng(0)
  boxes = np.array([transforms.random_box(500, 400, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(2000)])
  left, top, w, h = boxes.T
  assert (left >= 0).all() and (top >= 0).all() and (left + w <= 500).all() and (top + h <= 400).all()
  share = w * h / (500 * 400)
  assert 0.19 < share.min() < 0.25 and share.max() > 0.9
  assert 0.74 < (w / h).min() and (w / h).max() < 1.34
  assert transforms.random_box(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3), rng) == (0, 493, 10, 13)  # the clamped centre


def test_centre_crop_is_torchvisions_geometry():
  image = Image.fromarray(np.arange(500 * 381 * 3, dtype=np.uint32).astype(np.uint8).reshape(381, 500, 3))
  out = transforms.CenterCrop(224)(dict(image=np.asarray(image)), None)['image']
  expected = image.resize((335, 256), Image.Resampling.BICUBIC).crop((56, 16, 280, 240))
  np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


def save_jpeg(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)


def test_folder_of_class_folders(tmp_path):
  for i in range(10):
    save_jpeg(tmp_path / f'{"ab"[i % 2]}' / f'{i}.jpg', i)
  train, held = (sources.make(f'folder:{tmp_path}', s, holdout=0.2) for s in ('train', 'eval'))
  assert train.classes == ['a', 'b'] and (len(train), len(held)) == (8, 2)
  assert not {train.name(i) for i in range(8)} & {held.name(i) for i in range(2)}
  assert train[0]['label'] == 'ab'.index(train.name(0)[-7])


def test_folder_with_splits_and_flat_folder(tmp_path):
  for split, n in (('train', 3), ('val', 2)):
    for i in range(n):
      save_jpeg(tmp_path / 'split' / split / 'x' / f'{i}.png', i)
  assert [len(sources.make(f'folder:{tmp_path}/split', s)) for s in ('train', 'eval')] == [3, 2]
  flat = sources.make(f'folder:{tmp_path}/split/train/x', 'train')
  assert flat.classes is None and 'label' not in flat[0]


def test_folders_whose_splits_do_not_fit(tmp_path):
  for split, names in (('train', 'abc'), ('val', 'bc')):
    for name in names:
      (tmp_path / split / name).mkdir(parents=True)
      save_jpeg(tmp_path / split / name / '0.jpg', 9)
  held = sources.make(f'folder:{tmp_path}', 'eval')
  assert held.classes == ['a', 'b', 'c'] and [held[i]['label'] for i in range(2)] == [1, 2]  # as in training
  (tmp_path / 'val' / 'd').mkdir()
  save_jpeg(tmp_path / 'val' / 'd' / '0.jpg', 9)
  with pytest.raises(UserError, match='has not: d'):
    sources.make(f'folder:{tmp_path}', 'eval')
  (tmp_path / 'train').rename(tmp_path / 'other')
  with pytest.raises(UserError, match='has val but none of train, training'):
    sources.make(f'folder:{tmp_path}', 'train')


def test_a_link_back_does_not_multiply_a_folder(tmp_path):
  for name in 'ab':
    (tmp_path / name).mkdir()
    for i in range(5):
      save_jpeg(tmp_path / name / f'{i}.jpg', 9)
  (tmp_path / 'a' / 'up').symlink_to(tmp_path)
  assert sum(len(sources.make(f'folder:{tmp_path}', s)) for s in ('train', 'eval')) == 10


@pytest.mark.parametrize(
  'spec, words',
  [
    ('folder:/nowhere', 'no folder /nowhere'),
    ('folder:EMPTY', 'no images under'),
    ('imagenet', 'no data source'),
    ('tfds:imagenet2012', 'no train split of imagenet2012 in .*nothing is prepared there. Prepare it'),
    ('tfds:nothing_of_the_kind', "tfds cannot open 'nothing_of_the_kind'"),
  ],
)
def test_wrong_sources_say_what_was_looked_for(tmp_path, spec, words):
  with pytest.raises(UserError, match=words):
    sources.make(spec.replace('EMPTY', str(tmp_path)), 'train', data_dir=str(tmp_path))


def fresh(tmp_path, count=6):
  for i in range(count):
    save_jpeg(tmp_path / f'{i}.jpg', 40 * i)
  return sources.Folder(str(tmp_path), 'train', holdout=0.0)


def test_broken_images_are_replaced_by_their_neighbour_and_counted(tmp_path):
  source = fresh(tmp_path)
  broken = pathlib.Path(source.name(1))
  broken.write_bytes(b'')
  pathlib.Path(source.name(2)).write_bytes(pathlib.Path(source.name(3)).read_bytes()[:200])  # cut off
  decoded = decode.Decoded(source)
  assert [int(decoded[i]['bad']) for i in range(4)] == [0, 2, 1, 0]
  np.testing.assert_array_equal(decoded[1]['image'], decoded[3]['image'])
  steps = [transforms.CenterCrop(16)]
  batches = pipeline.train_batches(source, steps, seed=0, batch=5, workers=-1, max_bad=1.0)
  assert all('bad' not in next(batches) for _ in range(4)) and batches.seen == 20 and batches.bad == 12  # four epochs of 3
  strict = pipeline.train_batches(source, steps, seed=0, batch=5, workers=-1, max_bad=0.005)  # 5 of the first 1,000
  with pytest.raises(UserError, match=r'of the first \d+ images do not decode, more than data.max_bad=0.005 allows'):
    for _ in range(4):
      next(strict)
  for f in tmp_path.glob('*.jpg'):
    f.write_bytes(b'no image')
  with pytest.raises(UserError, match='16 images in a row do not decode; the last was .*jpg'):
    decoded[0]


def encoded(image, **kwargs):
  buffer = io.BytesIO()
  image.save(buffer, **kwargs)
  return buffer.getvalue()


def noise(h, w, smooth=4):
  rng = np.random.default_rng(h * w)
  coarse = rng.integers(0, 256, (h // smooth + 1, w // smooth + 1, 3), dtype=np.uint8)
  return Image.fromarray(np.kron(coarse, np.ones((smooth, smooth, 1), np.uint8))[:h, :w])


def test_every_kind_of_image_decodes_as_pillow_does():
  """Also greys, palettes under a JPEG's name, CMYK, progressive and EXIF rotation, which the official code ignores."""
  picture, exif = noise(61, 47), Image.Exif()
  exif[0x0112] = 6
  kinds = [encoded(picture.convert(m), format='PNG') for m in ('L', 'P', 'RGBA', '1', 'LA')]
  kinds += [encoded(picture.convert(m), format='JPEG') for m in ('L', 'CMYK')]
  kinds += [encoded(picture, format='JPEG', subsampling=s, quality=q) for s in (0, 1, 2) for q in (40, 95)]
  kinds += [encoded(picture, format='JPEG', progressive=True), encoded(picture, format='JPEG', exif=exif), encoded(picture, format='WEBP')]
  for data in kinds:
    np.testing.assert_array_equal(decode.image(data), np.asarray(Image.open(io.BytesIO(data)).convert('RGB')))
    assert decode.image(data).shape in ((61, 47, 3), (20, 30, 3))
  for data in (b'', b'x', kinds[-3][:300], kinds[0][:100]):
    with pytest.raises(decode.UNDECODABLE):
      decode.image(data)


@pytest.mark.skipif(transforms.fast is None, reason='cykooz-resizer has no wheel for this machine')
def test_the_fast_resize_stays_within_a_grey_level_of_pillow():
  """Columns first, then rows, each rounded. Pillow's own one-call resize picks the order by size and differs from itself as much."""
  rng, differing, pixels = np.random.default_rng(0), 0, 0
  for _ in range(30):
    h, w = rng.integers(40, 500, 2)
    image = noise(h, w, int(rng.integers(1, 6)))
    size = (int(rng.integers(24, 225)), int(rng.integers(24, 225)))
    expected = np.asarray(image.resize((size[1], h), Image.Resampling.BICUBIC).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(transforms.resize(np.asarray(image), size).astype(int) - expected)
    assert difference.max() <= 2
    differing, pixels = differing + (difference > 1).sum(), pixels + difference.size
  assert differing / pixels < 1e-3
  np.testing.assert_array_equal(transforms.resize(np.asarray(image), size, exact=True), image.resize(size[::-1], Image.Resampling.BICUBIC))


def test_crops_of_other_shapes():
  record = dict(image=np.asarray(noise(90, 120)))
  assert transforms.RandomResizedCrop((32, 48))(record, np.random.default_rng(0))['image'].shape == (32, 48, 3)
  for size in ((32, 48), (48, 32), 64):
    assert transforms.CenterCrop(size)(record, None)['image'].shape == (*transforms.pair(size), 3)
    assert transforms.CenterCrop(size)(dict(image=np.asarray(noise(120, 40))), None)['image'].shape == (*transforms.pair(size), 3)


def test_colour_jitter_is_pillows_inside_the_crop():
  image, crop, seen = np.asarray(noise(40, 50)), transforms.RandomResizedCrop(24, exact=True), set()
  for seed in range(30):
    rng = np.random.default_rng(seed)
    order, factors = rng.permutation(3), rng.uniform(0.6, 1.4, 3)
    expected = Image.fromarray(image)
    for i in order:
      expected = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i](expected).enhance(factors[i])
    expected = crop(dict(image=np.asarray(expected)), rng)
    ours = crop(transforms.ColorJitter(0.4, crop)(dict(image=image), rng := np.random.default_rng(seed)), rng)
    np.testing.assert_array_equal(ours.pop('image'), expected['image'])
    assert not ours  # no box in the batch
    seen.add(tuple(order))
  assert len(seen) == 6


def test_colour_jitter_on_the_device_is_pillows():
  image = np.asarray(noise(40, 50))
  drawn = transforms.ColorJitter(0.4)(dict(image=image), np.random.default_rng(3))
  ours = augment.color_jitter(image[None], drawn['jitter'][None], drawn['jitter_order'][None])[0]
  pillows = transforms.jittered(image, drawn['jitter'].astype(float), drawn['jitter_order'], (0, 0, 50, 40))
  difference = np.abs(np.asarray(ours).astype(int) - pillows.astype(int))
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01
  assert np.abs(image.astype(int) - ours).mean() > 1
  orders = {tuple(transforms.ColorJitter(0.4)(drawn, np.random.default_rng(i))['jitter_order']) for i in range(60)}
  assert len(orders) == 6


def test_rand_augment():
  image = np.asarray(noise(32, 40))
  for name, operation in randaugment.OPERATIONS.items():
    out = np.asarray(operation(Image.fromarray(image), 9.0, -1))
    assert out.shape == image.shape and out.dtype == np.uint8, name
    assert (out != image).any() or name in ('AutoContrast', 'Equalize'), name
  zero = {
    'Rotate',
    'Color',
    'Contrast',
    'Brightness',
    'Sharpness',
    'ShearX',
    'ShearY',
    'TranslateXRel',
    'TranslateYRel',
    'Solarize',
    'SolarizeAdd',
  }
  for name in zero:
    np.testing.assert_array_equal(np.asarray(randaugment.OPERATIONS[name](Image.fromarray(image), 0.0, 1)), image, err_msg=name)
  ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2))
  after = {
    k: np.asarray(randaugment.OPERATIONS[k](ramp, 9.0, 1))[0, :, 0].astype(int)
    for k in ('Posterize', 'Solarize', 'SolarizeAdd', 'Brightness')
  }
  np.testing.assert_array_equal(after['Posterize'], np.arange(256) & 0b10000000)  # 4 - int(3.6) = 1 bit
  np.testing.assert_array_equal(after['Solarize'], np.where(np.arange(256) < 26, np.arange(256), 255 - np.arange(256)))  # 256 - int(230.4)
  np.testing.assert_array_equal(after['SolarizeAdd'], np.where(np.arange(256) < 128, np.arange(256) + 99, np.arange(256)))
  np.testing.assert_array_equal(after['Brightness'], np.minimum((np.arange(256) * 1.81).astype(int), 255))
  shifted = np.asarray(randaugment.OPERATIONS['TranslateXRel'](Image.fromarray(image), 10.0, 1))  # 0.45 of 40 pixels to the left
  np.testing.assert_array_equal(shifted[:, :22], image[:, 18:])
  assert (shifted[:, 22:] == randaugment.FILL).all()
  draw = randaugment.RandAugment()
  unchanged = np.mean([(draw(dict(image=image), np.random.default_rng(i))['image'] == image).all() for i in range(400)])
  assert 0.2 < unchanged < 0.42  # both skipped in a quarter, and two operations may do nothing


def test_mixup_and_cutmix():
  images = jnp.stack([jnp.full((16, 16, 3), float(i)) for i in range(4)])
  targets = augment.smooth_targets(jnp.arange(4), 4, 0.1)
  np.testing.assert_allclose(targets[1], [0.025, 0.925, 0.025, 0.025], atol=1e-6)
  mixed = [augment.mix(jax.random.key(i), images, targets, 0.8, 1.0) for i in range(60)]
  cut = [len(np.unique(np.asarray(x[0]))) > 1 for x, _ in mixed]
  assert 18 < sum(cut) < 42
  for x, t in mixed:  # the share of the partner's pixels is the share of its label
    share = float(x[0].mean()) / 3
    np.testing.assert_allclose(t[0], (1 - share) * targets[0] + share * targets[3], atol=1e-5)
    np.testing.assert_allclose(t.sum(1), 1, atol=1e-5)
  assert augment.mix(jax.random.key(0), images, targets, 0, 0)[0] is images
  only = np.asarray(augment.mix(jax.random.key(1), images, targets, 0.8, 0)[0])
  assert all(len(np.unique(x)) == 1 for x in only)


def test_random_erasing():
  images = jnp.zeros((400, 32, 32, 3))
  out = np.asarray(augment.random_erasing(jax.random.key(0), images, 0.25))
  hit = (out != 0).any((1, 2, 3))
  assert 0.18 < hit.mean() < 0.32
  shares = []
  for x in out[hit]:
    rows, cols = (x != 0).any((1, 2)), (x != 0).any((0, 2))
    shares.append((x != 0).any(-1).mean())
    assert np.isclose(rows.sum() * cols.sum() / 1024, shares[-1], atol=1e-3) and rows.sum() < 32 and cols.sum() < 32  # one box
  assert 0.015 < min(shares) and max(shares) < 0.36 and 0.12 < np.mean(shares) < 0.23
  assert abs(out[hit][out[hit] != 0].std() - 1) < 0.05


def test_list_files(tmp_path):
  for i in range(6):
    save_jpeg(tmp_path / f'a b{i}.jpg', i)
  (tmp_path / 'plain.txt').write_text('\n'.join(f'a b{i}.jpg' for i in range(6)))
  (tmp_path / 'train.txt').write_text('\n'.join(f'a b{i}.jpg {i % 3}' for i in range(6)))
  (tmp_path / 'val.txt').write_text('a b0.jpg\t2\n')
  (tmp_path / 'index.jsonl').write_text('{"class": "n2", "files": ["a b0.jpg", "a b1.jpg"]}\n{"class": "n1", "files": ["a b2.jpg"]}\n')
  plain = sources.make(f'list:{tmp_path}/plain.txt', 'train', holdout=0.2)
  assert len(plain) == 5 and 'label' not in plain[0] and plain.classes is None
  both = f'list:{tmp_path}/train.txt,{tmp_path}/val.txt'
  train, held = (sources.make(both, s) for s in ('train', 'eval'))
  assert [train[i]['label'] for i in range(6)] == [0, 1, 2, 0, 1, 2] and held[0]['label'] == 2 and train.classes == ['0', '1', '2']
  index = sources.make(f'list:{tmp_path}/index.jsonl', 'train', holdout=0.4)
  assert index.classes == ['n1', 'n2'] and all(index[i]['label'] == (index.name(i)[-5] != '2') for i in range(len(index)))
  (tmp_path / 'gone.txt').write_text('x.jpg')
  for spec, words in (('gone.txt,val.txt', 'names x.jpg, but there is no'), ('none.txt', 'no list'), ('val.txt', '1 images are too few')):
    with pytest.raises(UserError, match=words):
      sources.make(f'list:{tmp_path}/{spec.replace(",", f",{tmp_path}/")}', 'train')


def test_hugging_face_parquet(tmp_path):
  def table(values):
    images = [dict(bytes=encoded(Image.new('RGB', (8, 6), (v, 0, 0)), format='PNG'), path=f'{v}.png') for v in values]
    info = {'info': {'features': {'image': {'_type': 'Image'}, 'label': {'names': ['cat', 'dog'], '_type': 'ClassLabel'}}}}
    return pyarrow.table({'image': images, 'label': [v % 2 for v in values]}).replace_schema_metadata({'huggingface': json.dumps(info)})

  parquet.write_table(table(range(0, 5)), tmp_path / 'train-00000-of-00002.parquet', row_group_size=2)
  parquet.write_table(table(range(5, 7)), tmp_path / 'train-00001-of-00002.parquet', row_group_size=2)
  parquet.write_table(table([9]), tmp_path / 'validation-00000-of-00001.parquet')
  train, held = (sources.make(f'parquet:{tmp_path}', s) for s in ('train', 'eval'))
  assert (len(train), len(held), train.classes) == (7, 1, ['cat', 'dog'])
  train = pickle.loads(pickle.dumps(train))  # as it goes to a worker
  for i in (6, 0, 3, 5, 1):
    assert decode.image(train[i]['image'])[0, 0, 0] == i and train[i]['label'] == i % 2
  assert train.name(6).endswith('train-00001-of-00002.parquet, row 6')
  alone = sources.make(f'parquet:{tmp_path}/validation-00000-of-00001.parquet', 'eval')
  assert len(alone) == 1
  (tmp_path / 'train-00000-of-00002.parquet').write_bytes(b'PAR1')
  with pytest.raises(UserError, match='not a whole parquet file'):
    sources.make(f'parquet:{tmp_path}', 'train')
  with pytest.raises(UserError, match='no parquet files'):
    sources.make(f'parquet:{tmp_path}/none', 'train')


@pytest.mark.parametrize('image', ['photo.jpg', dict(path='photo.jpg'), dict(bytes=1), [1, 2]])
def test_a_parquet_column_without_image_bytes(image, tmp_path):
  parquet.write_table(pyarrow.table({'image': [image] * 3, 'label': [0, 1, 0]}), tmp_path / 'x.parquet')
  with pytest.raises(UserError, match='the column image is .*; expected the bytes of an image file'):
    sources.make(f'parquet:{tmp_path}', 'train')


def test_a_source_is_small_in_a_workers_pickle(tmp_path):
  names = [f'n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG' for i in range(100_000)]
  files = folders.Files(tmp_path, names, np.zeros(len(names), np.int32), None)
  assert files.name(77) == f'{tmp_path}/{names[77]}' and files.names[len(names) - 1] == names[-1] and len(files) == len(names)
  assert len(pickle.dumps(files)) < 50 * len(names)


def test_bench_prints_stages_and_a_verdict():
  command = [sys.executable, '-m', 'beitv2_jax', 'bench', '--config=configs/beitv2_b16.py:smoke', '--images=64']
  run = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert run.returncode == 0, run.stderr
  for words in (
    'decode',
    'ColorJitter',
    'RandomResizedCrop',
    'BlockMask',
    'images/s a core',
    'pipeline with threads',
    'H100',
    'cores needed',
    'Not enough for 8 x TPU v5e (no accelerator here)',
    '--config.color_jitter_on=device',
  ):
    assert words in run.stdout, words
  run = subprocess.run([*command[:-1], '--config.data.source=folder:/nowhere'], capture_output=True, text=True, timeout=120)
  assert run.returncode == 2 and run.stderr.startswith('error: no folder /nowhere')


def test_images_of_16_bits_and_floats_need_a_range():
  ramp = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
  sixteen, floats = (
    encoded(Image.fromarray(ramp), format='PNG'),
    encoded(Image.fromarray((ramp / 60000 - 0.5).astype(np.float32)), format='TIFF'),
  )
  with pytest.raises(ValueError, match='says which become black and white'):
    decode.image(sixteen)
  for data, value_range in ((sixteen, (0, 60000)), (floats, (-0.5, 0.5))):
    np.testing.assert_allclose(decode.image(data, value_range)[..., 0], ramp * (255 / 60000), atol=0.51)
  np.testing.assert_array_equal(np.unique(decode.image(sixteen, (1000, 1100))), [0, 255])


def test_bands_by_index():
  bands = np.arange(4 * 6, dtype=np.uint8).reshape(2, 3, 4)
  data = encoded(Image.fromarray(bands, 'RGBA'), format='TIFF')
  np.testing.assert_array_equal(decode.image(data, channels=(3, 1, 1)), bands[..., [3, 1, 1]])
  with pytest.raises(ValueError, match='4 bands, so no data.channels'):
    decode.image(data, channels=(0, 1, 4))


@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_thirteen_bands(planar, compression, monkeypatch):
  """As Sentinel-2's: 16 bits, bands side by side or one after the other."""
  bands = np.random.default_rng(0).integers(0, 4000, (5, 7, 13), np.uint16)
  file = io.BytesIO()
  stored = bands if planar == 'contig' else np.moveaxis(bands, -1, 0)
  tifffile.imwrite(file, stored, photometric='minisblack', planarconfig=planar, compression=compression)
  found = decode.image(file.getvalue(), (0, 4000), (3, 2, 1))
  np.testing.assert_allclose(found, bands[..., [3, 2, 1]] * (255 / 4000), atol=0.51)
  with pytest.raises(ValueError, match='13 bands, so no data.channels'):
    decode.image(file.getvalue(), (0, 4000), (3, 2, 13))
  with pytest.raises(decode.UNDECODABLE):
    decode.image(file.getvalue()[:100], (0, 4000), (3, 2, 1))
  monkeypatch.setattr(decode, 'tifffile', None)
  with pytest.raises(ValueError, match=r'beitv2_jax\[tiff\]'):
    decode.image(file.getvalue(), (0, 4000), (3, 2, 1))


def claiming(data, size):
  """A JPEG or PNG whose header says another size."""
  if data[:2] == b'\xff\xd8':
    at = data.index(b'\xff\xc0') + 5
    return data[:at] + size[1].to_bytes(2, 'big') + size[0].to_bytes(2, 'big') + data[at + 4 :]
  header = data[12:16] + size[0].to_bytes(4, 'big') + size[1].to_bytes(4, 'big') + data[24:29]
  return data[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + data[33:]


@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_a_small_file_that_claims_to_be_huge_is_not_read(format):
  with pytest.raises(decode.UNDECODABLE, match='65500 x 65500 pixels|4290250000 pixels'):
    decode.image(claiming(encoded(noise(8, 8), format=format), (65500, 65500)))


@pytest.mark.parametrize('size', [(1, 20_000), (20_000, 1), (3, 900)])
def test_long_thin_images_are_cropped_before_they_are_resized(size):
  image = np.repeat(np.repeat(np.arange(size[0] * size[1], dtype=np.uint8).reshape(*size, 1), 3, 2), 1, 0)
  out = transforms.CenterCrop(224)(dict(image=image), None)['image']
  assert out.shape == (224, 224, 3)


def test_cropping_first_gives_the_same_pixels(monkeypatch):
  """But for rounding between Pillow's two passes, whose order depends on the sizes."""
  image = np.asarray(noise(300, 47))
  plain = transforms.CenterCrop(64)(dict(image=image), None)['image']
  monkeypatch.setattr(transforms, 'MAX_RESIZED', 0)
  difference = transforms.CenterCrop(64)(dict(image=image), None)['image'].astype(int) - plain
  assert np.abs(difference).mean() < 0.5  # of noise, which is the hardest


def test_a_named_pipe_among_the_images_does_not_hang(tmp_path):
  for i in range(20):
    noise(8, 8).save(tmp_path / f'{i:02}.png')
  os.mkfifo(tmp_path / '99.png')
  source = sources.make(f'folder:{tmp_path}', 'train', holdout=0.05)
  decoded = decode.Decoded(source)
  assert sum(int(decoded[i]['bad']) for i in range(len(source))) == 1


def test_a_crop_has_at_least_one_pixel():
  for size in ((1, 5000), (5000, 1), (1, 1)):
    for ratio in ((0.01, 0.01), (100.0, 100.0)):
      _, _, w, h = transforms.random_box(*size, (1e-4, 1e-4), ratio, np.random.default_rng(0))
      assert 1 <= w <= size[0] and 1 <= h <= size[1]


def test_validation_digits_leave_the_test_images_alone():
  test, train = sources.make('digits', 'eval'), sources.make('digits', 'train')
  parts = [sources.make('digits:validation', split) for split in ('train', 'eval')]
  assert [len(p) for p in parts] == [1047, 250] and len(train) == 1297 and len(test) == 500
  images = [{(image.tobytes(), int(label)) for image, label in zip(p.images, p.labels)} for p in (*parts, train)]
  assert images[0] | images[1] == images[2]
  np.testing.assert_array_equal(np.sort(np.concatenate([parts[0].labels, parts[1].labels])), np.sort(train.labels))
  with pytest.raises(UserError, match='use digits, or digits:validation'):
    sources.make('digits:other', 'train')


def test_a_limit_takes_the_same_images_each_time(tmp_path):
  import pickle

  whole = sources.make('digits', 'train')
  few = pickle.loads(pickle.dumps(sources.limited(whole, 100)))
  np.testing.assert_array_equal(few.keep, sources.limited(whole, 100).keep)
  assert len(few) == 100 == len(set(few.keep)) and few.classes == whole.classes and len(set(few[i]['label'] for i in range(100))) == 10
  np.testing.assert_array_equal(few[7]['image'], whole[int(few.keep[7])]['image'])
  from beitv2_jax.training import loop
  from tests.conftest import smoke

  loop.run(smoke('classifier', data__source='digits', data__limit=50, steps=1), tmp_path)
  assert '50 training and 500 evaluation images' in (tmp_path / 'data.txt').read_text()


def test_what_fills_a_batch_up_is_no_broken_image(tmp_path):
  """The first image is repeated 44 times, and does not decode."""
  for i in range(20):
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f'{i:02d}.png')
  source = sources.make(f'folder:{tmp_path}', 'eval', holdout=1.0)
  pathlib.Path(source.name(0)).write_bytes(b'no image')
  batches = pipeline.eval_batches(source, [transforms.CenterCrop(8, 1.0)], seed=0, batch=64)
  (batch,) = batches
  assert batch['valid'].tolist() == [False] + [True] * 19 + [False] * 44
