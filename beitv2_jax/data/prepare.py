"""ImageNet's tars, or any source → array_record shards (a few large files instead of many small ones), in the layout of TFDS.

A folder holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as image-net.org gives them. What comes out is what
tfds.builder('imagenet2012', data_dir=...) reads, in the array_record format; TensorFlow is not needed. Shards are written one by one
and renamed when complete: the same command goes on after a stop. A `short_side` of 256 stores smaller images for faster epochs, as
the data set imagenet2012_256; that is not what the paper trained on.
"""

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitv2_jax.data import decode, shards, sources, tars, transforms
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar

COUNTS = {'train': 1_281_167, 'validation': 50_000}
TARS = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
VERSION = '5.1.0'


@dataclasses.dataclass(frozen=True)
class Index:
  """Where every image of a split lies in its tar: `names`, and `places` [n, 3] of offset, bytes, label."""

  tar: str
  names: list[str]
  places: np.ndarray


def build_index(split: str, path: Path, wnids: list[str], validation_labels: list[str]) -> Index:
  """Reads the headers of a tar (training: of the thousand tars in it)."""
  label = {w: i for i, w in enumerate(wnids)}
  names, places = [], []
  with open(path, 'rb') as file:
    outer = tars.members(file, path.name)
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
        for image in tars.members(tars.Part(file, m.offset_data, m.size), m.name):
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


@dataclasses.dataclass(frozen=True)
class TarRecords:
  """The images of a split in ImageNet's tars."""

  index: Index
  short_side: int

  def __len__(self) -> int:
    return len(self.index.names)

  @property
  def bytes(self) -> int:
    return int(self.index.places[:, 1].sum())

  def read(self, rows: range) -> Iterator[shards.Record]:
    with open(self.index.tar, 'rb') as tar:
      for i in rows:
        offset, size, label = (int(x) for x in self.index.places[i])
        tar.seek(offset)
        try:
          image = stored(tar.read(size), self.short_side)
        except decode.UNDECODABLE as e:
          raise UserError(f'{self.index.names[i]} in {self.index.tar} does not decode ({e}): the tar is damaged.') from e
        yield shards.Record(image, label, self.index.names[i])


@dataclasses.dataclass(frozen=True)
class SourceRecords:
  """The images of any source, in an order that mixes its classes; those that do not decode are left out and named."""

  source: Any
  short_side: int

  def __len__(self) -> int:
    return len(self.source)

  @property
  def bytes(self) -> int:
    """About: by a sample."""
    sample = np.unique(np.linspace(0, len(self.source) - 1, 32).astype(int))
    sizes = [len(image) if isinstance(image := self.source[int(i)]['image'], bytes) else image.size // 2 for i in sample]
    return int(np.mean(sizes) * len(self.source))

  def read(self, rows: range) -> Iterator[shards.Record]:
    order = np.random.default_rng(0).permutation(len(self.source))
    for i in rows:
      place = int(order[i])
      name = getattr(self.source, 'name', str)(place)
      try:
        record = self.source[place]
        image = _encoded(record['image'])
        decode.image(image) if not self.short_side else None  # what does not decode now would not later
        yield shards.Record(stored(image, self.short_side) if self.short_side else image, record.get('label'), name)
      except decode.UNDECODABLE as e:
        yield shards.Record(b'', None, f'{name} ({" ".join(str(e).split())[:100]})')


def _encoded(image: bytes | np.ndarray) -> bytes:
  if isinstance(image, bytes):
    return image
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'PNG')
  return out.getvalue()


def prepare_source(
  spec: str, out: Path, name: str, short_side: int = 0, workers: int = 0, data_dir: str = '', holdout: float = 0.1
) -> Path:
  """Writes a source's training and evaluation parts as shards; returns the data set's directory. Raises UserError."""
  _check_short_side(short_side)
  opened = {split: sources.make(spec, split, data_dir, holdout) for split in ('train', 'eval')}
  if hasattr(opened['train'], 'mask_names'):
    raise UserError(f'{spec} has masks, which are read from their folders; only images with or without labels are prepared.')
  records = {tfds_name: SourceRecords(opened[split], short_side) for split, tfds_name in (('train', 'train'), ('eval', 'validation'))}
  made_of = {split: [spec, len(source), short_side] for split, source in opened.items()}
  return shards.write(out / name / '1.0.0', name, records, opened['train'].classes, made_of, workers, f'{spec}, prepared by beitv2_jax')


def _check_short_side(short_side: int) -> None:
  if short_side and not 64 <= short_side <= 1024:
    raise UserError(f'--short-side {short_side}: between 64 and 1024 (256 to 320 make sense).')


def prepare_imagenet(tars: Path, out: Path, short_side: int = 0, workers: int = 0, partial: bool = False) -> Path:
  """Builds both splits; returns the data set's directory. Raises UserError for missing, damaged or incomplete tars."""
  import tensorflow_datasets as tfds

  lists = Path(tfds.__file__).parent / 'datasets' / 'imagenet2012'
  wnids, validation_labels = ((lists / n).read_text().split() for n in ('labels.txt', 'validation_labels.txt'))
  missing = [n for n in TARS.values() if not (tars / n).is_file()]
  if missing:
    raise UserError(
      f'no {" and no ".join(missing)} in {tars.absolute()}: get them at https://image-net.org/download-images (free for research).'
    )
  _check_short_side(short_side)
  name = f'imagenet2012_{short_side}' if short_side else 'imagenet2012'
  folder = out / name / VERSION
  indices = {split: build_index(split, tars / tar, wnids, validation_labels) for split, tar in TARS.items()}
  for split, index in indices.items():
    if len(index.names) != COUNTS[split] and not partial:
      raise UserError(
        f'{TARS[split]} holds {len(index.names):,} images; ImageNet-1k has {COUNTS[split]:,} there. --partial takes it as it is.'
      )
  made_of = {split: [len(i.names), int(i.places[:, 1].sum()), (tars / TARS[split]).stat().st_size] for split, i in indices.items()}
  records = {split: TarRecords(index, short_side) for split, index in indices.items()}
  about = 'ILSVRC 2012' + f', images reduced to a short side of {short_side} px' * bool(short_side)
  return shards.write(folder, name, records, wnids, made_of, workers, about)
