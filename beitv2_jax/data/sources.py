"""Where images come from. A source is indexable: source[i] → dict(image, and label where there is one).

`image` is encoded bytes or a uint8 array [h, w, 3] (`decoded` says so of a source); decoding happens in the pipeline. `classes` names the labels, or is
None for unlabelled images; `name(i)` names a record in messages. A source is written as one string, `kind:location`:

  digits               scikit-learn's 1,797 handwritten digits (embedded in that package); digits:validation spares the 500 test images
  fake:COUNT           smooth random images of 10 classes, for smoke tests
  folder:PATH          a folder of class folders, or a flat folder of unlabelled images
  list:FILE            lines of `path` or `path label`, or of JSON {"class": ..., "files": [...]}
  parquet:PATH         a folder of Hugging Face image parquet files
  fake-scenes:COUNT    the same with masks of 5 classes
  scenes:PATH          images with masks, for segmentation (data/scenes.py)
  tfds:NAME            a prepared TensorFlow Datasets data set (array_record; read without TensorFlow)
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from beitv2_jax import storage
from beitv2_jax.data import scenes
from beitv2_jax.data.folders import Folder
from beitv2_jax.data.listing import SPLITS, split_indices
from beitv2_jax.data.lists import ListFile
from beitv2_jax.data.parquet import Parquet
from beitv2_jax.data.tars import Tars
from beitv2_jax.errors import UserError


def make(spec: str, split: str, data_dir: str = '', holdout: float = 0.1) -> Any:
  """Opens `spec` for `split` ('train' or 'eval'). Raises UserError with what was looked for.

  Sources without an evaluation split of their own hold out a fixed share (`holdout`) of their images.
  """
  kind, _, where = spec.partition(':')
  makers = {
    'digits': Digits,
    'fake': Fake,
    'fake-scenes': FakeScenes,
    'folder': Folder,
    'list': ListFile,
    'parquet': Parquet,
    'scenes': scenes.Scenes,
    'tars': Tars,
    'tfds': Tfds,
  }
  if kind not in makers or split not in SPLITS:
    known = 'digits, fake:COUNT, fake-scenes:COUNT, folder:PATH, list:FILE, parquet:PATH, scenes:PATH, tars:PATH, tfds:NAME'
    meant = f' Did you mean folder:{spec}?' if os.path.isdir(os.path.expanduser(spec)) else ''
    raise UserError(f'no data source {spec!r}; use one of {known}.{meant}')
  return makers[kind](where, split, data_dir=data_dir, holdout=holdout)


class Digits:
  """8x8 grey digits with values 0 to 16, as RGB; 500 of them are held out. Images stay 8x8: the crop enlarges them.

  `digits:validation` leaves those 500 alone: it trains on 1,047 of the others and evaluates on 250, for choosing settings.
  """

  decoded = True

  def __init__(self, where: str, split: str, **_):
    try:
      from sklearn.datasets import load_digits
    except ImportError as e:
      raise UserError("the digits come with scikit-learn: pip install 'beitv2_jax[demo]'.") from e
    if where not in ('', 'validation'):
      raise UserError(f'data.source=digits:{where}: use digits, or digits:validation.')
    data = load_digits()
    indices = split_indices(len(data.target), 'train' if where else split, 500)
    if where:
      indices = indices[split_indices(len(indices), split, 250)]
    grey = np.round(data.images[indices] * (255 / 16)).astype(np.uint8)
    self.images = np.repeat(grey[..., None], 3, -1)
    self.labels = data.target[indices]
    self.classes = 'zero one two three four five six seven eight nine'.split()

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, i: int) -> dict:
    return dict(image=self.images[i], label=int(self.labels[i]))


class Fake:
  """COUNT smooth images made from their index; the label shifts their colour, so that it can be learned."""

  decoded = True

  def __init__(self, where: str, split: str, size: int = 48, **_):
    if where and not (where.isdigit() and int(where)):
      raise UserError(f'data.source=fake:{where}: expected a number of images, such as fake:256.')
    self.count, self.size = int(where or 256), size
    self.offset = 10**6 * (split == 'eval')
    self.classes = [f'class {i}' for i in range(10)]

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, i: int) -> dict:
    rng = np.random.default_rng(i + self.offset)
    label = int(i % 10)
    coarse = rng.uniform(0, 200, (6, 6, 3)) + 55 * np.cos(label + np.arange(3))
    image = np.kron(coarse, np.ones((self.size // 6, self.size // 6, 1)))
    return dict(image=np.clip(image, 0, 255).astype(np.uint8), label=label)


class FakeScenes(Fake):
  """As Fake, with a mask of bands in as many colours as classes: 1 to 5, and 0 for none."""

  classes_in_masks = 5

  def __init__(self, where: str, split: str, **_):
    super().__init__(where, split)
    self.classes = None
    self.mask_names = [f'mask {i}' for i in range(self.count)]

  def __getitem__(self, i: int) -> dict:
    rng = np.random.default_rng(i + self.offset)
    mask = np.repeat(rng.integers(0, self.classes_in_masks + 1, 6), self.size // 6)[:, None] * np.ones((1, self.size), int)
    image = mask[..., None] * np.array([40, 50, 30]) + rng.integers(0, 20, (self.size, self.size, 3))
    return dict(image=image.astype(np.uint8), mask=mask.astype(np.int32))


class Tfds:
  """A prepared data set with an `image` feature, by name or by its directory. The encoded bytes are handed on as they are."""

  def __init__(self, where: str, split: str, data_dir: str = '', **_):
    import tensorflow_datasets as tfds

    how = 'Prepare it (for ImageNet: python -m beitv2_jax prepare imagenet2012 --from DIR --out DIR) and name the directory with --config.data.dir=DIR.'
    bases = [storage.place(where)] if '://' in where else [storage.place(base) for base in (where, os.path.join(data_dir, where))]
    with storage.reaching(where):
      folders = [f for base in bases for f in (base, *sorted(base.glob('*.*.*')))]
    prepared = [str(f) for f in folders if (f / 'dataset_info.json').is_file()]
    try:
      if prepared:  # the newest version
        builder = tfds.builder_from_directory(prepared[-1])
      else:
        builder = tfds.builder(where, data_dir=data_dir or None, file_format='array_record')
    except Exception as e:  # unknown names, missing packages, broken metadata: tfds raises many types
      raise UserError(
        f'tfds cannot open {where!r} in {data_dir or "its default directory"}: {str(e).strip().splitlines()[0][:200]}. {how}'
      ) from e
    if 'image' not in builder.info.features:
      raise UserError(f'{where} has the features {", ".join(builder.info.features)}; expected one called image.')
    found = next((n for n in SPLITS[split] if n in builder.info.splits), None)
    if found is None:
      have = f'it has the splits {", ".join(builder.info.splits)}' if builder.info.splits else 'nothing is prepared there'
      raise UserError(f'no {split} split of {where} in {builder.data_dir}: {have}. {how}')
    try:
      self.source: Any = builder.as_data_source(split=found, decoders={'image': tfds.decode.SkipDecoding()})  # ty: ignore[missing-argument]
      files = builder.info.splits[found].filepaths
      missing = sorted({f.name for f in files} - {f.name for f in files[0].parent.iterdir()})
      if missing:
        raise FileNotFoundError(f'{len(missing)} are missing, such as {missing[0]}')
      self.source[0]  # opens the first
    except Exception as e:  # shards that are missing or cut, metadata that name others
      reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
      raise UserError(
        f'the {found} shards of {where} in {builder.data_dir} do not open: {reason}. Bring them back, or prepare them again.'
      ) from e
    self.keys = [k for k in ('image', 'label') if k in builder.info.features]
    self.classes = list(builder.info.features['label'].names) if 'label' in self.keys else None
    self.where = f'{where} {found}'

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    try:
      record = self.source[i]
    except Exception as e:  # array_record and tfds raise their own types for a damaged record, which is left out like a damaged image
      raise ValueError(f'{type(e).__name__}: {e}') from e
    if self.classes is not None and not 0 <= record['label'] < len(self.classes):
      raise UserError(
        f'{self.name(i)} has label {record["label"]}, and label.labels.txt beside the shards names {len(self.classes)} classes.'
      )
    return {k: record[k] for k in self.keys}

  def name(self, i: int) -> str:
    return f'{self.where} record {i}'

  def file_name(self, i: int) -> str:
    """What the image was called in the original data set; '' where that is not kept."""
    name = self.source[i].get('file_name', b'')
    return name.decode() if isinstance(name, bytes) else name


def limited(source: Any, count: int) -> 'Picked':
  """`count` records of a source, drawn once: the same for every run."""
  return Picked(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


class Picked:
  """The records of a source at the places `keep`."""

  def __init__(self, source: Any, keep: np.ndarray):
    self.source, self.keep, self.classes = source, keep, getattr(source, 'classes', None)

  def __len__(self) -> int:
    return len(self.keep)

  def __getitem__(self, i: int) -> dict:
    return self.source[int(self.keep[i])]

  def __getattr__(self, name: str) -> Any:  # names of masks and the like
    if name in ('source', 'keep'):  # while it is unpickled
      raise AttributeError(name)
    return getattr(self.source, name)

  def name(self, i: int) -> str:
    return getattr(self.source, 'name', str)(int(self.keep[i]))


@dataclasses.dataclass(frozen=True)
class Padded:
  """`count` records from `source`, past its end the first one again with valid=False: whole batches for evaluation."""

  source: Sequence
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, i: int) -> dict:
    valid = i < len(self.source)
    return self.source[i if valid else 0] | dict(valid=np.bool_(valid))
