"""Where images come from. A source is indexable: source[i] → dict(image, and label where there is one).

`image` is encoded bytes or a uint8 array [h, w, 3]; decoding happens in the transforms. `classes` names the labels, or is
None for unlabelled images. A source is written as one string, `kind:location`:

  digits               scikit-learn's 1,797 handwritten digits (embedded in that package)
  fake:COUNT           smooth random images of 10 classes, for smoke tests
  folder:PATH          a folder of class folders, or a flat folder of unlabelled images
  tfds:NAME            a prepared TensorFlow Datasets data set (array_record; read without TensorFlow)
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError

EXTENSIONS = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
SPLITS = {'train': ('train', 'training'), 'eval': ('val', 'validation', 'valid', 'test', 'eval')}


def make(spec: str, split: str, data_dir: str = '', holdout: float = 0.1) -> Any:
  """Opens `spec` for `split` ('train' or 'eval'). Raises UserError with what was looked for.

  Sources without an evaluation split of their own hold out a fixed share (`holdout`) of their images.
  """
  kind, _, where = spec.partition(':')
  makers = {'digits': Digits, 'fake': Fake, 'folder': Folder, 'tfds': Tfds}
  if kind not in makers or split not in SPLITS:
    raise UserError(f'no data source {spec!r}; use one of digits, fake:COUNT, folder:PATH, tfds:NAME (split train or eval).')
  return makers[kind](where, split, data_dir=data_dir, holdout=holdout)


def split_indices(count: int, split: str, held_out: int) -> np.ndarray:
  """The same random part of range(count) on every machine: the last `held_out` of a fixed permutation, or the rest."""
  order = np.random.default_rng(0).permutation(count)
  return order[count - held_out :] if split == 'eval' else order[: count - held_out]


class Digits:
  """8x8 grey digits with values 0 to 16, as RGB; 500 of them are held out. Images stay 8x8: the crop enlarges them."""

  def __init__(self, where: str, split: str, **_):
    try:
      from sklearn.datasets import load_digits
    except ImportError as e:
      raise UserError("the digits come with scikit-learn: pip install 'beitv2_jax[demo]'.") from e
    data = load_digits()
    indices = split_indices(len(data.target), split, 500)
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

  def __init__(self, where: str, split: str, size: int = 48, **_):
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


class Folder:
  """PATH/class/*.jpg, PATH/{train,val}/class/*.jpg, or a flat PATH/*.jpg without labels."""

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    root = Path(where).expanduser()
    if not root.is_dir():
      raise UserError(f'no folder {root.absolute()}: data.source=folder:PATH needs a folder of images or of class folders.')
    own = next((root / n for n in SPLITS[split] if (root / n).is_dir()), None)
    has_train = any((root / n).is_dir() for n in SPLITS['train'])
    if own is None and has_train:
      raise UserError(
        f'{root} has a train folder but none of {", ".join(SPLITS["eval"])} for evaluation: add one, or point at {root}/train to hold out a share of it.'
      )
    base = own or root
    files = images_under(base)
    folders = sorted({f.parent.relative_to(base).parts[0] for f in files if f.parent != base})
    if not files:
      raise UserError(f'no images under {base}: looked for {" ".join(sorted(EXTENSIONS))} in it and its sub-folders.')
    self.classes = folders or None
    if folders:
      files = [f for f in files if f.parent != base]  # stray images beside class folders have no label
      label = {name: i for i, name in enumerate(folders)}
      labels = [label[f.relative_to(base).parts[0]] for f in files]
    if own is None:
      keep = split_indices(len(files), split, max(1, int(len(files) * holdout)))
      files = [files[i] for i in keep]
      labels = [labels[i] for i in keep] if folders else None
    if not files:
      raise UserError(f'{base} leaves no images for the {split} split.')
    self.files = files
    self.labels = np.asarray(labels) if folders else None

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> dict:
    record = dict(image=self.files[i].read_bytes())
    return record if self.labels is None else record | dict(label=int(self.labels[i]))

  def name(self, i: int) -> str:
    return str(self.files[i])


def images_under(root: Path) -> list[Path]:
  """All files with an image's extension in `root` and its sub-folders, sorted."""
  walk = os.walk(root, followlinks=True)
  return sorted(Path(folder, n) for folder, _, names in walk for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS)


class Tfds:
  """A prepared data set with an `image` feature. The encoded bytes are handed on as they are."""

  def __init__(self, where: str, split: str, data_dir: str = '', **_):
    import tensorflow_datasets as tfds

    builder = tfds.builder(where, data_dir=data_dir or None)
    split = next((n for n in SPLITS[split] if n in builder.info.splits), None)
    if split is None:
      raise UserError(
        f'no prepared {where} in {builder.data_dir}. Prepare it with tfds (file_format array_record), '
        'and name its directory with --config.data.dir=DIR.'
      )
    decoders = {'image': tfds.decode.SkipDecoding()}
    self.source = builder.as_data_source(split=split, decoders=decoders)
    label = builder.info.features.get('label')
    self.classes = list(label.names) if label is not None else None

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    record = self.source[i]
    return {k: record[k] for k in ('image', 'label') if k in record}


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
