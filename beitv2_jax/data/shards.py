"""array_record shards in the layout of TFDS: written by several processes, one shard after the other, and gone on with after a stop.

A shard is renamed when it is complete, with a file beside it that says how many records it has and their checksum; both are looked at
before it counts.
"""

import concurrent.futures
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar

SHARD_BYTES = 140 << 20  # 1,024 shards of ImageNet's training images, as TFDS makes them
MAX_BAD = 0.01  # share of the images that may be left out


class Record(NamedTuple):
  image: bytes  # encoded; empty for one that is left out
  label: int | None
  name: str


class Records(Protocol):
  """What goes into a split: how many, about how many bytes, and a part of them in order."""

  @property
  def bytes(self) -> int: ...

  def __len__(self) -> int: ...

  def read(self, rows: range) -> Iterator[Record]: ...


def write(folder: Path, name: str, records: dict[str, Any], classes: list[str] | None, made_of: dict, workers: int, about: str) -> Path:
  """Writes all splits, and what TFDS wants to know of them. `made_of` tells this data set from another. Raises UserError."""
  import tensorflow_datasets as tfds

  folder.mkdir(parents=True, exist_ok=True)
  _same_origin(folder / 'made_of.json', made_of)
  infos = []
  for split, rows in records.items():
    count = max(1, round(rows.bytes / SHARD_BYTES))
    bounds = np.linspace(0, len(rows), count + 1).astype(int)
    targets = [folder / f'{name}-{split}.array_record-{i:05d}-of-{count:05d}' for i in range(count)]
    jobs = [(target, range(bounds[i], bounds[i + 1])) for i, target in enumerate(targets)]
    _write_missing(rows, [(target, part) for target, part in jobs if not target.exists()], workers, f'{split}, {len(rows):,} images')
    lengths = [_checked_length(target) for target in targets]
    _check_left_out(split, len(rows), targets)
    naming = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
    size = sum(target.stat().st_size for target in targets)
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=naming))
  features: dict[str, Any] = dict(image=tfds.features.Image(), file_name=tfds.features.Text())
  if classes:
    features['label'] = tfds.features.ClassLabel(names=[str(c) for c in classes])
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder), features=tfds.features.FeaturesDict(features), split_infos=infos, version=folder.name, check_data=False,
    supervised_keys=('image', 'label') if classes else None, description=about,
  )  # fmt: skip
  return folder


def _write_missing(records: Any, jobs: list[tuple[Path, range]], workers: int, title: str) -> None:
  with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context('spawn')) as pool:
    futures = [pool.submit(write_shard, records, rows, target) for target, rows in jobs]
    try:
      for future in bar(concurrent.futures.as_completed(futures), 'shards', len(futures), title):
        future.result()
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise


def write_shard(records: Any, rows: range, target: Path) -> None:
  """One shard of tf.Examples, beside its place and then renamed."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  def feature(kind: str, value: Any) -> Any:
    holder = {'bytes_list': tf_feature_pb2.BytesList, 'int64_list': tf_feature_pb2.Int64List}[kind]
    return tf_feature_pb2.Feature(**{kind: holder(value=[value])})

  beside = target.with_name(f'.{target.name}.{os.getpid()}')
  writer = array_record_module.ArrayRecordWriter(str(beside), 'group_size:1')
  count, checksum, left_out = 0, 0, []
  try:
    for record in records.read(rows):
      if not record.image:
        left_out.append(record.name)
        continue
      fields = dict(
        image=feature('bytes_list', record.image), file_name=feature('bytes_list', record.name.encode('utf-8', 'surrogateescape'))
      )
      if record.label is not None:
        fields['label'] = feature('int64_list', record.label)
      data = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=fields)).SerializeToString(deterministic=True)
      writer.write(data)
      count, checksum = count + 1, zlib.crc32(data, checksum)
    writer.close()
    _beside(target).write_text(json.dumps(dict(records=count, crc32=checksum, left_out=left_out)))
    beside.rename(target)
  finally:
    beside.unlink(missing_ok=True)


def _beside(shard: Path) -> Path:
  return shard.with_name(f'{shard.name}.json')


def _checked_length(shard: Path) -> int:
  """The number of records in a shard, all of which are read. Raises UserError if it is not what was written."""
  from array_record.python import array_record_module

  try:
    expected = json.loads(_beside(shard).read_text())
    reader = array_record_module.ArrayRecordReader(str(shard))
    count, checksum = reader.num_records(), 0
    for first in range(0, count, 256):
      for data in reader.read(first, min(first + 256, count)):
        checksum = zlib.crc32(data, checksum)
    reader.close()
  except Exception as e:  # the library raises its own types
    raise UserError(f'{shard} is damaged. Remove it and run this again.') from e
  if (count, checksum) != (expected['records'], expected['crc32']):
    raise UserError(
      f'{shard} holds other records than were written ({count} instead of {expected["records"]}). Remove it and run this again.'
    )
  return count


def _check_left_out(split: str, images: int, shards: list[Path]) -> None:
  names = [name for shard in shards for name in json.loads(_beside(shard).read_text())['left_out']]
  if len(names) > max(MAX_BAD * images, 3):
    raise UserError(
      f'{len(names)} of {images} {split} images do not decode, such as {names[0]}: mend the data set, then remove its shards and run this again.'
    )
  for name in names[:20]:
    logging.warning('left out: %s', name)


def _same_origin(path: Path, now: dict) -> None:
  """Shards that are there must be of the same images: what they are made of is kept beside them."""
  if path.is_file() and json.loads(path.read_text()) != json.loads(json.dumps(now)):
    raise UserError(f'{path.parent} holds shards of other images. Remove it, or choose another --out.')
  path.write_text(json.dumps(now))
