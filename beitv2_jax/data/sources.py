"""Where images come from. A source is indexable: source[i] → dict(image, and label where there is one).

`image` is encoded bytes or a uint8 array [h, w, 3]; decoding happens in the pipeline. `classes` names the labels, or is
None for unlabelled images; `name(i)` names a record in messages. A source is written as one string, `kind:location`:

  digits               scikit-learn's 1,797 handwritten digits (embedded in that package)
  fake:COUNT           smooth random images of 10 classes, for smoke tests
  folder:PATH          a folder of class folders, or a flat folder of unlabelled images
  list:FILE            lines of `path` or `path label`, or of JSON {"class": ..., "files": [...]}
  parquet:PATH         a folder of Hugging Face image parquet files
  fake-scenes:COUNT    the same with masks of 5 classes
  scenes:PATH          images with masks, for segmentation (data/scenes.py)
  tfds:NAME            a prepared TensorFlow Datasets data set (array_record; read without TensorFlow)
"""

import bisect
import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.data import scenes
from beitv2_jax.data.listing import EXTENSIONS, SPLITS, Names, held_out, image_folders, split_indices
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
    'tfds': Tfds,
  }
  if kind not in makers or split not in SPLITS:
    known = 'digits, fake:COUNT, fake-scenes:COUNT, folder:PATH, list:FILE, parquet:PATH, scenes:PATH, tfds:NAME'
    raise UserError(f'no data source {spec!r}; use one of {known} (split train or eval).')
  return makers[kind](where, split, data_dir=data_dir, holdout=holdout)


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


class Files:
  """Image files under `root`, with labels where there are any; `keep` are the ones that count, all by default."""

  def __init__(self, root: Path, names: Sequence[str], labels: Any, classes: list[str] | None, keep: np.ndarray | None = None):
    self.root, self.names, self.classes = str(root), Names(names), classes
    self.labels = None if labels is None else np.asarray(labels, np.int32)
    self.keep = np.arange(len(names)) if keep is None else keep

  def __len__(self) -> int:
    return len(self.keep)

  def __getitem__(self, i: int) -> dict:
    with open(self.name(i), 'rb') as f:
      record = dict(image=f.read())
    return record if self.labels is None else record | dict(label=int(self.labels[self.keep[i]]))

  def name(self, i: int) -> str:
    return os.path.join(self.root, self.names[int(self.keep[i])])


class Folder(Files):
  """PATH/class/*.jpg, PATH/{train,val}/class/*.jpg, or a flat PATH/*.jpg without labels."""

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    root = Path(where).expanduser()
    if not root.is_dir():
      raise UserError(f'no folder {root.absolute()}: data.source=folder:PATH needs a folder of images or of class folders.')
    splits = {s: next((root / n for n in SPLITS[s] if (root / n).is_dir()), None) for s in SPLITS}
    own = splits[split]
    if own is None and any(splits.values()):
      only = next(filter(None, splits.values()))
      raise UserError(
        f'{root} has {only.name} but none of {", ".join(SPLITS[split])} for {split}: add one, or point at {only} to hold out a share of it.'
      )
    base = own or root
    found = image_folders(base)
    if not found:
      raise UserError(f'no images under {base}: looked for {" ".join(sorted(EXTENSIONS))} in it and its sub-folders.')
    if len(found) > 1 and not found[0][0]:
      found = found[1:]  # stray images beside class folders have no label
    files = [n for folder, names in found for n in (map(f'{folder}{os.sep}'.__add__, names) if folder else names)]
    classes, labels = None, None
    if found[0][0]:
      classes, index = np.unique([folder.partition(os.sep)[0] for folder, _ in found], return_inverse=True)
      classes, labels = classes.tolist(), np.repeat(index, [len(names) for _, names in found])
      if split == 'eval' and own:
        known = sorted({d.name for d in splits['train'].iterdir() if d.is_dir()}) if splits['train'] else classes
        strange = sorted(set(classes) - set(known))
        if strange:
          raise UserError(
            f'{own} has class folders that {splits["train"]} has not: {", ".join(strange[:5])}. Their labels would mean nothing.'
          )
        labels, classes = np.searchsorted(known, classes)[labels], known
    super().__init__(base, files, labels, classes, held_out(len(files), split, holdout) if own is None else None)


class ListFile(Files):
  """Lines of `path`, of `path label` (a number or a name), or of JSON {"class": name, "files": [paths]} (ImageNet-21k's index).

  Paths are relative to the list's folder, or to data.dir where that is given. FILE,FILE names a list for training and one for evaluation.
  """

  def __init__(self, where: str, split: str, data_dir: str = '', holdout: float = 0.1, **_):
    lists = [Path(p.strip()).expanduser() for p in where.split(',')]
    for path in lists:
      if not path.is_file():
        raise UserError(f'no list {path.absolute()}: data.source=list:FILE needs a text file with one image a line.')
    parsed = [self._read(p) for p in lists[:2]]
    classes = sorted(
      {c for _, labels in parsed for c in labels if c is not None}, key=lambda c: (not c.isdigit(), int(c) if c.isdigit() else 0, c)
    )
    if classes and all(c.isdigit() for c in classes):
      if int(classes[-1]) > 10**6:
        raise UserError(f'{lists[0]}: a label of {classes[-1]} is no class number; labels count from 0.')
      classes = [str(i) for i in range(int(classes[-1]) + 1)]  # numbers are the labels themselves
    own = len(lists) > 1
    path, (names, labels) = (lists[split == 'eval'], parsed[split == 'eval']) if own else (lists[0], parsed[0])
    if not names:
      raise UserError(f'{path} names no images.')
    if any(x is None for x in labels) and any(x is not None for x in labels):
      raise UserError(f'{path}: some lines have a label and some have none.')
    number = {c: i for i, c in enumerate(classes)}
    labels = None if labels[0] is None else [number[x] for x in labels]
    root = Path(data_dir).expanduser() if data_dir else path.parent
    if not (root / names[0]).is_file():
      raise UserError(f'{path} names {names[0]}, but there is no {root / names[0]}; --config.data.dir=DIR says where its paths begin.')
    super().__init__(root, names, labels, classes or None, None if own else held_out(len(names), split, holdout))

  @staticmethod
  def _read(path: Path) -> tuple[list[str], list[str | None]]:
    names, labels = [], []
    try:
      text = path.read_text('utf-8-sig')
    except UnicodeDecodeError as e:
      raise UserError(f'{path} is not UTF-8: save it in that encoding.') from e
    for number, line in enumerate(text.splitlines(), 1):
      line = line.strip()
      if line.startswith('{'):
        try:
          entry = json.loads(line)
          names += entry['files']
          labels += [str(entry['class'])] * len(entry['files'])
        except (ValueError, KeyError, TypeError) as e:
          raise UserError(f'{path}, line {number}: expected {{"class": ..., "files": [...]}}.') from e
      elif line:
        head, _, tail = line.rpartition('\t') if '\t' in line else line.rpartition(' ')
        labelled = head and os.path.splitext(tail)[1].lower() not in EXTENSIONS  # file names may hold blanks
        names.append(head.strip() if labelled else line)
        labels.append(tail if labelled else None)
    return names, labels


class Parquet:
  """A folder of parquet files as Hugging Face writes them: a column `image` of {bytes, path} and a column `label`, if any.

  Files of an evaluation split are told by their names (validation-00000-of-00014.parquet). Reading one image reads its row
  group, a hundred images in Hugging Face's files: fine for small sets; for large ones prepare array_record.
  """

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    from pyarrow import parquet

    root = Path(where).expanduser()
    files = sorted(root.rglob('*.parquet')) if root.is_dir() else [root] if root.is_file() else []
    if not files:
      raise UserError(f'no parquet files in {root.absolute()}: data.source=parquet:PATH needs a folder of *.parquet files.')
    of = {s: [f for f in files if f.name.startswith(SPLITS[s])] for s in SPLITS}
    own = of[split] or (files if not of['train'] and not of['eval'] else [])
    if not own:
      raise UserError(f'{root} has no {split} files: looked for names that begin with {", ".join(SPLITS[split])}.')
    self.files, self.groups, self.starts, total = [str(f) for f in own], [], [], 0
    for number, file in enumerate(self.files):
      try:
        meta = parquet.read_metadata(file)
      except Exception as e:  # pyarrow raises its own types
        raise UserError(f'{file} is not a whole parquet file: {str(e).splitlines()[0]}.') from e
      for group in range(meta.num_row_groups):
        self.groups.append((number, group))
        self.starts.append(total)
        total += meta.row_group(group).num_rows
    schema = parquet.read_schema(self.files[0])
    if 'image' not in schema.names:
      raise UserError(f'{self.files[0]} has the columns {", ".join(schema.names)}; expected one called image.')
    self.labelled = 'label' in schema.names
    features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}')).get('info', {}).get('features', {})
    self.classes = features.get('label', {}).get('names') if self.labelled else None
    self.rows = np.arange(total)
    if not of['train'] and not of['eval']:
      self.rows = held_out(total, split, holdout)
    if self.labelled and not self.classes:
      labels = parquet.read_table(self.files[0], columns=['label']).column('label').to_pylist()
      if not all(isinstance(x, int) and x >= 0 for x in labels):
        raise UserError(
          f'{self.files[0]}: labels must be class numbers from 0 on; here they are such as {next(x for x in labels if not isinstance(x, int) or x < 0)!r}.'
        )
      self.classes = [str(i) for i in range(max(labels) + 1)]
    self._open = threading.local()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_open'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open = threading.local()

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> dict:
    from pyarrow import parquet

    row = int(self.rows[i])
    group = bisect.bisect_right(self.starts, row) - 1
    if getattr(self._open, 'group', None) != group:
      number, index = self.groups[group]
      file = parquet.ParquetFile(self.files[number], memory_map=True)
      self._open.table = file.read_row_group(index, columns=['image', 'label'] if self.labelled else ['image'])
      self._open.group = group
    table, at = self._open.table, row - self.starts[group]
    image = table.column('image')[at].as_py()
    image = image['bytes'] if isinstance(image, dict) else image
    record = dict(image=image or b'')
    return record | dict(label=int(table.column('label')[at].as_py())) if self.labelled else record

  def name(self, i: int) -> str:
    row = int(self.rows[i])
    group = bisect.bisect_right(self.starts, row) - 1
    return f'{self.files[self.groups[group][0]]}, row {row}'


class Tfds:
  """A prepared data set with an `image` feature, by name or by its directory. The encoded bytes are handed on as they are."""

  def __init__(self, where: str, split: str, data_dir: str = '', **_):
    import tensorflow_datasets as tfds

    how = 'Prepare it (for ImageNet: python -m beitv2_jax prepare imagenet2012 --from DIR --out DIR) and name the directory with --config.data.dir=DIR.'
    folders = [
      f
      for base in (where, os.path.join(data_dir, where))
      for f in (Path(base).expanduser(), *sorted(Path(base).expanduser().glob('*.*.*')))
    ]
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
    self.source: Any = builder.as_data_source(split=found, decoders={'image': tfds.decode.SkipDecoding()})  # ty: ignore[missing-argument]
    self.keys = [k for k in ('image', 'label') if k in builder.info.features]
    self.classes = list(builder.info.features['label'].names) if 'label' in self.keys else None
    self.where = f'{where} {found}'

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    record = self.source[i]
    return {k: record[k] for k in self.keys}

  def name(self, i: int) -> str:
    return f'{self.where} record {i}'

  def file_name(self, i: int) -> str:
    """What the image was called in the original data set; '' where that is not kept."""
    name = self.source[i].get('file_name', b'')
    return name.decode() if isinstance(name, bytes) else name


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
