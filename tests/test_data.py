import io

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data import pipeline, sources, transforms
from beitv2_jax.data.masking import BlockMask
from beitv2_jax.errors import UserError

STEPS = [transforms.Flip(), transforms.RandomResizedCrop(24), transforms.ToArray(), BlockMask((4, 4), 6, 2)]


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
    list(
      pipeline.eval_batches(
        Numbered('20', 'eval'), [transforms.CenterCrop(24), transforms.ToArray()], seed=0, batch=8, process=p, processes=processes
      )
    )
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
  out = transforms.CenterCrop(224)(dict(image=image), None)['image']
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


@pytest.mark.parametrize(
  'spec, words',
  [
    ('folder:/nowhere', 'no folder /nowhere'),
    ('folder:EMPTY', 'no images under'),
    ('imagenet', 'no data source'),
    ('tfds:imagenet2012', 'no prepared imagenet2012'),
  ],
)
def test_wrong_sources_say_what_was_looked_for(tmp_path, spec, words):
  with pytest.raises(UserError, match=words):
    sources.make(spec.replace('EMPTY', str(tmp_path)), 'train', data_dir=str(tmp_path))


def test_broken_images_are_replaced_by_their_neighbour(tmp_path, caplog):
  for i in range(4):
    save_jpeg(tmp_path / f'{i}.jpg', 60 * i)
  (tmp_path / '1.jpg').write_bytes(b'')
  (tmp_path / '2.jpg').write_bytes((tmp_path / '3.jpg').read_bytes()[:200])
  source = pipeline.Decoded(sources.Folder(str(tmp_path), 'train', holdout=0.0))
  for i in range(4):
    assert source[i]['image'].mode == 'RGB'
  assert source.bad >= 2
  for f in tmp_path.glob('*.jpg'):
    f.write_bytes(b'no image')
  with pytest.raises(UserError, match='do not decode'):
    source[0]


def test_grey_palette_and_cmyk_become_rgb():
  for mode in ('L', 'P', 'CMYK', 'RGBA', '1'):
    buffer = io.BytesIO()
    Image.new(mode, (9, 7)).save(buffer, 'JPEG' if mode == 'CMYK' else 'PNG')
    image = transforms.decode(buffer.getvalue())
    assert image.mode == 'RGB' and image.size == (9, 7)
