"""ImageNet's tars, in their real layout, through prepare and back out of the pipeline."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from beitv2_jax import commands
from beitv2_jax.data import decode, pipeline, sources, transforms
from beitv2_jax.data import shards as shard_files
from beitv2_jax.errors import UserError

WNIDS = ('n01440764', 'n01443537', 'n15075141')  # labels 0, 1 and 999
VALIDATION = ('n01751748', 'n09193705', 'n02105855')  # what the first three validation images are


def jpeg(value, mode='RGB', form='JPEG'):
  out = io.BytesIO()
  Image.new('RGB', (400, 300), (value, 10, 10)).convert(mode).save(out, form)
  return out.getvalue()


def add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tars')
  with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as outer:
    for c, wnid in enumerate(WNIDS):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as tar:
        for i in range(4):
          kind = {(1, 2): ('CMYK', 'JPEG'), (2, 1): ('RGB', 'PNG')}.get((c, i), ('RGB', 'JPEG'))  # ImageNet has both
          add(tar, f'{wnid}_{i}.JPEG', jpeg(60 * c + 10 * i, *kind))
      add(outer, f'{wnid}.tar', inner.getvalue())
  with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as tar:
    for i in range(3):
      add(tar, f'ILSVRC2012_val_{i + 1:08d}.JPEG', jpeg(200 + 10 * i))
  return folder


def run(tars, out, *extra):
  return commands.run('prepare', ['imagenet2012', '--from', str(tars), '--out', str(out), '--workers', '2', *extra])


def test_what_is_prepared_reads_back(tars, tmp_path, monkeypatch):
  monkeypatch.setattr(shard_files, 'SHARD_BYTES', 15_000)
  assert run(tars, tmp_path, '--partial') == 0
  folder = tmp_path / 'imagenet2012' / '5.1.0'
  shards = sorted(folder.glob('*train.array_record-*-of-?????'))
  assert len(shards) > 1
  train, held = (sources.make('tfds:imagenet2012', s, data_dir=str(tmp_path)) for s in ('train', 'eval'))
  assert (len(train), len(held), len(train.classes)) == (12, 3, 1000)
  assert sorted({r['label'] for r in (train[i] for i in range(12))}) == [0, 1, 999]
  seen = sorted(int(decode.image(train[i]['image'])[0, 0, 0]) for i in range(12))
  assert np.abs(np.array(seen) - sorted(60 * c + 10 * i for c in range(3) for i in range(4))).max() <= 4
  assert all(Image.open(io.BytesIO(train[i]['image'])).mode == 'RGB' for i in range(12))  # CMYK and PNG were made RGB JPEGs
  by_value = {round(int(decode.image(r['image'])[0, 0, 0]) / 10) * 10: r['label'] for r in (held[i] for i in range(3))}
  assert [train.classes[by_value[v]] for v in (200, 210, 220)] == list(VALIDATION)
  assert train[0]['label'] != train[11]['label'] or train[0]['label'] != train[5]['label']  # classes are mixed on disk
  batch = next(pipeline.train_batches(train, [transforms.RandomResizedCrop(32)], seed=0, batch=4, workers=-1))
  assert batch['image'].shape == (4, 32, 32, 3) and batch['image'].dtype == np.uint8
  # A stop in the middle: metadata and a shard are not there yet. The other shards are kept as they are.
  (folder / 'dataset_info.json').unlink()
  before = {s: s.stat().st_mtime_ns for s in shards[1:]}
  shards[0].unlink()
  with pytest.raises(UserError, match='nothing is prepared there. Prepare it'):
    sources.make('tfds:imagenet2012', 'train', data_dir=str(tmp_path))
  assert run(tars, tmp_path, '--partial') == 0
  assert {s: s.stat().st_mtime_ns for s in shards[1:]} == before and shards[0].exists()
  again = sources.make('tfds:imagenet2012', 'train', data_dir=str(tmp_path))
  assert [again[i]['image'] for i in range(12)] == [train[i]['image'] for i in range(12)]


def test_the_standard_builder_reads_it(tars, tmp_path):
  import tensorflow_datasets as tfds

  assert run(tars, tmp_path, '--partial') == 0
  builder = tfds.builder('imagenet2012', data_dir=str(tmp_path), file_format='array_record')
  assert builder.info.splits['train'].num_examples == 12
  record = builder.as_data_source(split='validation')[0]
  assert record['image'].shape == (300, 400, 3) and record['file_name'].startswith(b'ILSVRC2012_val_')


def test_smaller_images(tars, tmp_path):
  assert run(tars, tmp_path, '--partial', '--short-side', '128') == 0
  source = sources.make('tfds:imagenet2012_128', 'train', data_dir=str(tmp_path))
  assert {decode.image(source[i]['image']).shape for i in range(len(source))} == {(128, 170, 3)}


def test_bad_tars(tars, tmp_path, capsys):
  def error(folder, *extra):
    assert run(folder, tmp_path / 'out', *extra) == 2
    return capsys.readouterr().err

  assert 'holds 12 images; ImageNet-1k has 1,281,167 there. --partial' in error(tars)
  assert 'no ILSVRC2012_img_train.tar and no ILSVRC2012_img_val.tar in' in error(tmp_path)
  for name in ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'):
    (tmp_path / name).write_bytes((tars / name).read_bytes())
  whole = (tars / 'ILSVRC2012_img_train.tar').read_bytes()
  (tmp_path / 'ILSVRC2012_img_train.tar').write_bytes(whole[: len(whole) // 2])
  assert 'cut off' in error(tmp_path, '--partial')
  (tmp_path / 'ILSVRC2012_img_train.tar').write_bytes((tars / 'ILSVRC2012_img_val.tar').read_bytes())
  assert 'expected one tar a class, such as n01440764.tar' in error(tmp_path, '--partial')
  assert not list((tmp_path / 'out').rglob('dataset_info.json'))


def test_shards_of_other_tars_and_tars_that_stop_early(tars, tmp_path, capsys):
  assert run(tars, tmp_path / 'out', '--partial') == 0
  other = tmp_path / 'tars'
  other.mkdir()
  for tar in tars.iterdir():
    (other / tar.name).write_bytes(tar.read_bytes())
  with tarfile.open(other / 'ILSVRC2012_img_val.tar', 'a') as tar:
    add(tar, 'ILSVRC2012_val_00000004.JPEG', jpeg(9))
  assert run(other, tmp_path / 'out', '--partial') == 2 and 'shards of other images' in capsys.readouterr().err
  with tarfile.open(other / 'ILSVRC2012_img_val.tar') as tar:
    end = tar.getmembers()[1].offset  # cut between two images
  whole = (other / 'ILSVRC2012_img_val.tar').read_bytes()
  for damaged in (whole[:end], whole[:end] + b'x' * 512 + whole[end + 512 :]):
    (other / 'ILSVRC2012_img_val.tar').write_bytes(damaged)
    assert run(other, tmp_path / 'new', '--partial') == 2 and 'without the mark of a whole tar' in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()  # both tars are read before anything is written


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two classes of ten images in several formats, one of them broken."""
  root = tmp_path_factory.mktemp('images')
  for i, name in enumerate(('cat', 'dog')):
    (root / name).mkdir()
    for j in range(10):
      image = Image.fromarray(np.full((40 + j, 60, 3), 100 * i + 10 * j, np.uint8))
      image.convert('CMYK' if j == 1 else 'RGB').save(root / name / f'{j}.{"jpg" if j < 3 else "png" if j < 6 else "webp"}')
  (root / 'cat' / '5.png').write_bytes(b'no image')
  return root


def labelled(source):
  """[(a grey value, label)] of all its images."""
  return sorted((int(decode.image(r['image']).mean().round(-1)), r.get('label')) for r in (source[i] for i in range(len(source))))


def test_any_source_becomes_shards(folder, tmp_path, monkeypatch, capfd, caplog):
  monkeypatch.setattr(shard_files, 'SHARD_BYTES', 800)
  arguments = ['prepare', f'folder:{folder}', '--out', str(tmp_path), '--name', 'mine', '--holdout', '0.2', '--workers', '2']
  assert commands.run(arguments[0], arguments[1:]) == 0
  out = capfd.readouterr().out
  assert '--config.data.source=tfds:mine' in out and 'left out' in caplog.text and 'cat/5.png' in caplog.text
  for split, count in (('train', 16), ('eval', 4)):
    plain, prepared = sources.make(f'folder:{folder}', split, holdout=0.2), sources.make('tfds:mine', split, data_dir=str(tmp_path))
    found = {decode.Decoded(plain)[i]['image'].tobytes() for i in range(len(plain))}
    assert len(plain) == count and {decode.image(prepared[i]['image']).tobytes() for i in range(len(prepared))} <= found
    assert prepared.classes == ['cat', 'dog'] and len(prepared) in (count, count - 1)
    assert all((value >= 100) == label for value, label in labelled(prepared))
  shards = sorted((tmp_path / 'mine' / '1.0.0').glob('*train.array_record-*-of-?????'))
  assert len(shards) > 1
  before = {s: s.stat().st_mtime_ns for s in shards[1:]}
  shards[0].unlink()
  assert commands.run(arguments[0], arguments[1:]) == 0  # goes on
  assert {s: s.stat().st_mtime_ns for s in shards[1:]} == before and shards[0].exists()
  data = bytearray(shards[1].read_bytes())
  data[len(data) // 2] ^= 1
  shards[1].write_bytes(data)
  assert commands.run(arguments[0], arguments[1:]) == 2
  assert 'Remove it and run this again' in capfd.readouterr().err
  assert commands.run('prepare', [f'folder:{folder}/cat', *arguments[2:]]) == 2  # other images in the same place
  assert 'shards of other images' in capfd.readouterr().err


def test_smaller_images_without_labels(folder, tmp_path):
  assert commands.run('prepare', [f'folder:{folder}/dog', '--out', str(tmp_path), '--short-side', '64', '--workers', '1']) == 0
  source = sources.make('tfds:images', 'train', data_dir=str(tmp_path))
  assert source.classes is None and len(source) == 9


def test_damaged_shards_are_a_line_or_counted_and_labels_have_names(tmp_path):
  made = tmp_path / 'images' / '1.0.0'
  assert commands.run('prepare', ['fake:64', '--out', str(tmp_path), '--workers', '1']) == 0
  shard = next(made.glob('images-train.array_record-*-of-00001'))
  whole = shard.read_bytes()
  for damaged in (whole[:100], b'x' * 1000):
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match='train shards of images .* do not open'):
      sources.make('tfds:images', 'train', str(tmp_path))
  shard.unlink()
  with pytest.raises(UserError, match='do not open: 1 are missing'):
    sources.make('tfds:images', 'train', str(tmp_path))
  shard.write_bytes(whole)
  (made / 'label.labels.txt').write_text('only\n')
  source = sources.make('tfds:images', 'train', str(tmp_path))
  with pytest.raises(UserError, match='names 1 classes'):
    [source[i] for i in range(64)]
