"""ImageNet's tars → the standard TFDS data set.

A folder holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as image-net.org gives them. What comes out is what
tfds.builder('imagenet2012', data_dir=...) reads, in the array_record format; TensorFlow is not needed. Shards are written one by one
and renamed when complete: the same command goes on after a stop. A `short_side` of 256 stores smaller images for faster epochs, as
the data set imagenet2012_256; that is not what the paper trained on.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from beitv2_jax.data import decode, transforms
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar

COUNTS = {'train': 1_281_167, 'validation': 50_000}
TARS = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
VERSION = '5.1.0'
SHARD_BYTES = 140 << 20  # 1,024 shards of training images, as TFDS makes them


@dataclasses.dataclass(frozen=True)
class Index:
  """Where every image of a split lies in its tar: `names`, and `places` [n, 3] of offset, bytes, label."""

  tar: str
  names: list[str]
  places: np.ndarray


class _Part(io.RawIOBase):
  """Bytes [start, start + size) of a file, as a file: a tar inside a tar."""

  def __init__(self, file, start: int, size: int):
    self.file, self.start, self.size, self.at = file, start, size, 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def seek(self, offset, whence=0):
    self.at = offset + {0: 0, 1: self.at, 2: self.size}[whence]
    return self.at

  def tell(self):
    return self.at

  def read(self, size=-1):
    size = min(self.size - self.at, size if size >= 0 else self.size)
    self.file.seek(self.start + self.at)
    data = self.file.read(max(size, 0))
    self.at += len(data)
    return data


def _members(file, name: str) -> list[tarfile.TarInfo]:
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      members = [m for m in tar.getmembers() if m.isfile()]
      at = tar.offset
  except tarfile.TarError as e:
    raise UserError(f'{name} is no tar, or cut off: {e}. Download it again.') from e
  end = file.seek(0, 2)
  file.seek(min(at, end))
  if any(file.read(512)) or at >= end:  # what follows the last member of a whole tar is a block of zeros
    raise UserError(f'{name} ends at {at:,} bytes without the mark of a whole tar: it is cut off, or damaged there. Download it again.')
  if members and members[-1].offset_data + members[-1].size > end:
    raise UserError(f'{name} is cut off after {end:,} bytes. Download it again.')
  return members


def build_index(split: str, path: Path, wnids: list[str], validation_labels: list[str]) -> Index:
  """Reads the headers of a tar (training: of the thousand tars in it)."""
  label = {w: i for i, w in enumerate(wnids)}
  names, places = [], []
  with open(path, 'rb') as file:
    outer = _members(file, path.name)
    if split == 'validation':
      for m in outer:
        stem = Path(m.name).stem
        number = stem.removeprefix('ILSVRC2012_val_')
        if not number.isdigit() or not 1 <= int(number) <= len(validation_labels):
          raise UserError(f'{path.name} holds {m.name}; expected ILSVRC2012_val_00000001.JPEG and so on.')
        names.append(Path(m.name).name)
        places.append((m.offset_data, m.size, label[validation_labels[int(number) - 1]]))
    else:
      for m in bar(outer, 'classes', title='reading the headers'):
        wnid = Path(m.name).stem
        if wnid not in label:
          raise UserError(f'{path.name} holds {m.name}; expected one tar a class, such as {wnids[0]}.tar.')
        for image in _members(_Part(file, m.offset_data, m.size), m.name):
          names.append(Path(image.name).name)
          places.append((m.offset_data + image.offset_data, image.size, label[wnid]))
  if not names:
    raise UserError(f'{path} holds no images.')
  order = np.argsort([hashlib.blake2b(n.encode(), digest_size=8).digest() for n in names])  # classes mixed, the same every time
  return Index(str(path), [names[i] for i in order], np.asarray(places, np.int64)[order])


def stored(data: bytes, short_side: int) -> bytes:
  """The bytes that go into the data set: the original ones, or an RGB JPEG of what no JPEG reader would open (CMYK, PNG) or is to be smaller."""
  image = Image.open(io.BytesIO(data))
  smaller = short_side and min(image.size) > short_side
  if image.format == 'JPEG' and image.mode in ('RGB', 'L') and not smaller:
    return data
  pixels = decode.image(data)
  if smaller:
    h, w = pixels.shape[:2]
    size = (short_side, int(short_side * w / h)) if h <= w else (int(short_side * h / w), short_side)
    pixels = transforms.resize(pixels, size, exact=True)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'JPEG', quality=95 if smaller else 100, subsampling=0)
  return out.getvalue()


def _feature(kind: str, value):
  from tensorflow_datasets.proto import tf_feature_pb2

  holder = {'bytes_list': tf_feature_pb2.BytesList, 'int64_list': tf_feature_pb2.Int64List}[kind]
  return tf_feature_pb2.Feature(**{kind: holder(value=[value])})


def write_shard(index: Index, rows: range, target: Path, short_side: int) -> int:
  """One shard of tf.Examples, beside its place and then renamed. Returns its bytes."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  beside = target.with_name(f'.{target.name}.{os.getpid()}')
  writer = array_record_module.ArrayRecordWriter(str(beside), 'group_size:1')
  total = 0
  try:
    with open(index.tar, 'rb') as tar:
      for i in rows:
        offset, size, label = (int(x) for x in index.places[i])
        tar.seek(offset)
        try:
          image = stored(tar.read(size), short_side)
        except decode.UNDECODABLE as e:
          raise UserError(f'{index.names[i]} in {index.tar} does not decode ({e}): the tar is damaged.') from e
        fields = dict(image=_feature('bytes_list', image), label=_feature('int64_list', label))
        fields['file_name'] = _feature('bytes_list', index.names[i].encode())
        record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=fields)).SerializeToString()
        writer.write(record)
        total += len(record)
    writer.close()
    beside.rename(target)
  finally:
    beside.unlink(missing_ok=True)
  return total


def prepare(tars: Path, out: Path, short_side: int = 0, workers: int = 0, partial: bool = False) -> Path:
  """Builds both splits; returns the data set's directory. Raises UserError for missing, damaged or incomplete tars."""
  import tensorflow_datasets as tfds

  lists = Path(tfds.__file__).parent / 'datasets' / 'imagenet2012'
  wnids, validation_labels = ((lists / n).read_text().split() for n in ('labels.txt', 'validation_labels.txt'))
  missing = [n for n in TARS.values() if not (tars / n).is_file()]
  if missing:
    raise UserError(
      f'no {" and no ".join(missing)} in {tars.absolute()}: get them at https://image-net.org/download-images (free for research).'
    )
  if short_side and not 64 <= short_side <= 1024:
    raise UserError(f'--short-side {short_side}: between 64 and 1024 (256 to 320 make sense).')
  name = f'imagenet2012_{short_side}' if short_side else 'imagenet2012'
  folder = out / name / VERSION
  template = f'{name}-{{}}.array_record-{{:05d}}-of-{{:05d}}'
  indices = {split: build_index(split, tars / tar, wnids, validation_labels) for split, tar in TARS.items()}
  for split, index in indices.items():
    if len(index.names) != COUNTS[split] and not partial:
      raise UserError(
        f'{TARS[split]} holds {len(index.names):,} images; ImageNet-1k has {COUNTS[split]:,} there. --partial takes it as it is.'
      )
  folder.mkdir(parents=True, exist_ok=True)
  _same_tars(
    folder / 'tars.json',
    {split: [len(i.names), int(i.places[:, 1].sum()), (tars / TARS[split]).stat().st_size] for split, i in indices.items()},
  )
  infos = []
  for split, index in indices.items():
    count = len(index.names)
    shards = max(1, round(int(index.places[:, 1].sum()) / SHARD_BYTES))
    bounds = np.linspace(0, count, shards + 1).astype(int)
    jobs = [(folder / template.format(split, i, shards), range(bounds[i], bounds[i + 1])) for i in range(shards)]
    open_jobs = [(target, rows) for target, rows in jobs if not target.exists()]
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=_spawn()) as pool:
      futures = [pool.submit(write_shard, index, rows, target, short_side) for target, rows in open_jobs]
      try:
        for future in bar(concurrent.futures.as_completed(futures), 'shards', len(futures), f'{split}, {count:,} images'):
          future.result()
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    lengths = [_checked_length(target, len(rows)) for target, rows in jobs]
    size = sum(target.stat().st_size for target, _ in jobs)
    infos.append(
      tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=_naming(tfds, folder, name, split))
    )
  features = tfds.features.FeaturesDict(
    dict(image=tfds.features.Image(encoding_format='jpeg'), label=tfds.features.ClassLabel(names=wnids), file_name=tfds.features.Text())
  )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder), features=features, split_infos=infos, version=VERSION, check_data=False, supervised_keys=('image', 'label'),
    description='ILSVRC 2012' + f', images reduced to a short side of {short_side} px' * bool(short_side),
  )  # fmt: skip
  return folder


def _checked_length(shard: Path, expected: int) -> int:
  """The number of records in a shard. Raises UserError if it is damaged or not the one expected."""
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(str(shard))
    length = reader.num_records()
    reader.close()
  except Exception as e:  # the library raises its own types
    raise UserError(f'{shard} is damaged. Remove it and run this again.') from e
  if length != expected:
    raise UserError(f'{shard} holds {length} records instead of {expected}: it is of another run. Remove it and run this again.')
  return length


def _same_tars(path: Path, now: dict) -> None:
  """Shards that are there must come from these tars: their counts and sizes are kept beside them."""
  if path.is_file() and json.loads(path.read_text()) != now:
    raise UserError(f'{path.parent} holds shards of other tars. Remove it, or choose another --out.')
  path.write_text(json.dumps(now))


def _spawn():
  import multiprocessing

  return multiprocessing.get_context('spawn')


def _naming(tfds, folder, name, split):
  return tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
