"""Images in tars: webdataset shards, tars of classes, tars in tars, folders in a tar."""

import concurrent.futures
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from beitv2_jax import commands
from beitv2_jax.data import decode, sources, tars
from beitv2_jax.errors import UserError


def picture(value):
  out = io.BytesIO()
  Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(out, 'PNG')
  return out.getvalue()


def write(path, files):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def values(source):
  return [(int(decode.image(source[i]['image'])[0, 0, 0]), source[i].get('label')) for i in range(len(source))]


def test_webdataset_shards(tmp_path):
  for split, shards in {'train': 3, 'validation': 1, 'test': 1}.items():
    for n in range(shards):
      samples = {f'{i:03d}': 40 * n + 10 * i for i in range(4)}
      files = {}
      for key, value in samples.items():
        files |= {f'{key}.png': picture(value), f'{key}.cls': str(value // 10 % 2).encode(), f'{key}.json': b'{"filename": "x"}'}
      write(tmp_path / f'imagenet1k-{split}-{n:04d}.tar', files)
  train, evaluation = (sources.make(f'tars:{tmp_path}', split) for split in ('train', 'eval'))
  assert values(train) == [(10 * i, i % 2) for i in range(12)] and train.classes == ['0', '1']
  assert len(evaluation) == 4 and 'validation' in evaluation.name(0) and evaluation.file_name(1) == '001.png'
  assert values(sources.make(f'tars:{tmp_path}/*train*.tar', 'train', holdout=0.25))  # a pattern
  assert commands.run('prepare', [f'tars:{tmp_path}', '--out', str(tmp_path / 'out'), '--name', 'mine', '--workers', '1']) == 0
  assert sorted(values(sources.make('tfds:mine', 'eval', str(tmp_path / 'out')))) == values(evaluation)


@pytest.mark.parametrize('form', ['folders', 'wnids', 'nested', 'json'])
def test_classes_from_where_an_image_lies(tmp_path, form):
  classes = {'n01440764': (10, 20), 'n01443537': (30,)}
  if form == 'wnids':  # ImageNet-21k, winter21: a tar a class
    for name, found in classes.items():
      write(tmp_path / 'all' / f'{name}.tar', {f'{name}_{v}.PNG': picture(v) for v in found})
  elif form == 'nested':  # fall11: one tar of them
    inner = {}
    for name, found in classes.items():
      write(tmp_path / 'inner.tar', {f'{name}_{v}.PNG': picture(v) for v in found})
      inner[f'{name}.tar'] = (tmp_path / 'inner.tar').read_bytes()
    write(tmp_path / 'all' / 'fall11_whole.tar', inner)
  elif form == 'folders':
    write(
      tmp_path / 'all' / 'mine.tar',
      {f'./{name}/{v}.png': picture(v) for name, found in classes.items() for v in found} | {'./__MACOSX/x.png': b'', './.hidden.png': b''},
    )
  else:
    samples = [(f'{v}.png', name, v) for name, found in classes.items() for v in found]
    files = {n: picture(v) for n, _, v in samples} | {f'{v}.json': json.dumps(dict(label=c)).encode() for _, c, v in samples}
    write(tmp_path / 'all' / 'mine.tar', files)
  source = sources.make(f'tars:{tmp_path / "all"}', 'eval', holdout=1)
  assert source.classes == list(classes)
  assert sorted(values(source)) == [(10, 0), (20, 0), (30, 1)]


def test_images_without_classes(tmp_path):
  write(tmp_path / 'a.tar', {f'{v}.png': picture(v) for v in (1, 2, 3)})
  source = sources.make(f'tars:{tmp_path / "a.tar"}', 'train', holdout=0.4)
  assert source.classes is None and len(source) == 2 and 'label' not in source[0]


@pytest.mark.parametrize(
  'files, reason',
  [
    ({'a.png': picture(1), 'a.cls': b'0', 'b.png': picture(2)}, '1 of 2 images have no class'),
    ({'a.png': picture(1), 'a.cls': b'-1', 'b.png': picture(2), 'b.cls': b'0'}, "class '-1' among the classes"),
    ({'a.txt': b'x'}, 'hold no images'),
    ({'a.png': picture(1), 'a.json': b'{'}, r'a.json does not read'),
  ],
)
def test_tars_that_cannot_be_meant(tmp_path, files, reason):
  write(tmp_path / 'train' / 'a.tar', files)
  with pytest.raises(UserError, match=reason):
    sources.make(f'tars:{tmp_path}', 'train')


def test_a_tar_that_is_cut_or_none_is_named(tmp_path):
  whole = write(tmp_path / 'train.tar', {f'{v}.png': picture(v) for v in range(20)}).read_bytes()
  for size in (0, 100, 700, 5000, len(whole) // 2):
    (tmp_path / 'train.tar').write_bytes(whole[:size])
    with pytest.raises(UserError, match=r'train.tar'):
      sources.make(f'tars:{tmp_path}', 'train')
  with pytest.raises(UserError, match='no tars in'):
    sources.make(f'tars:{tmp_path / "none"}', 'train')
  with pytest.raises(UserError, match='has no eval tars'):
    (tmp_path / 'train.tar').write_bytes(whole)
    sources.make(f'tars:{tmp_path}', 'eval')


def test_more_tars_than_a_process_may_open(tmp_path, monkeypatch):
  """Threads share the open ones, and open the others for each image."""
  monkeypatch.setattr(tars, 'MOST_OPEN', 3)
  for i in range(10):
    write(tmp_path / f'{i}.tar', {'a.png': picture(i)})
  expected = values(sources.make(f'tars:{tmp_path}', 'eval', holdout=1.0))
  source = sources.make(f'tars:{tmp_path}', 'eval', holdout=1.0)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda i: int(decode.image(source[i]['image'])[0, 0, 0]), [*range(10)] * 5))
  assert found == [value for value, _ in expected] * 5
  assert len(source._open) == 3
  assert values(pickle.loads(pickle.dumps(source))) == expected
