"""Images in parquet files, as Hugging Face writes them."""

import bisect
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.data.listing import SPLITS, held_out
from beitv2_jax.errors import UserError

MAX_CLASSES = 10**6  # a larger label is no class number


class Parquet:
  """A folder of parquet files: a column `image` of {bytes, path} and a column `label`, if any. A label of -1 is none.

  Files of a split are told by their names (validation-00000-of-00014.parquet; where there are several evaluation splits, the first of
  val, validation, valid, test). Reading one image reads its row group, a hundred images in Hugging Face's files: fine for small sets; for
  large ones prepare array_record.
  """

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    root = Path(where).expanduser()
    files = sorted(root.rglob('*.parquet')) if root.is_dir() else [root] if root.is_file() else []
    if not files:
      raise UserError(f'no parquet files in {root.absolute()}: data.source=parquet:PATH needs a folder of *.parquet files.')
    of = {s: _of_split(files, s) for s in SPLITS}
    split_by_name = any(of.values())
    own = of[split] or ([] if split_by_name else files)
    if not own:
      raise UserError(f'{root} has no {split} files: looked for names that begin with {", ".join(SPLITS[split])}.')
    self.files, self.groups, self.starts, total = [str(f) for f in own], [], [], 0
    for number, file in enumerate(own):
      meta = _metadata(file)
      for group in range(meta.num_row_groups):
        self.groups.append((number, group))
        self.starts.append(total)
        total += meta.row_group(group).num_rows
    self.rows = np.arange(total) if split_by_name else held_out(total, split, holdout)
    read = [*of['train'], *of['eval']] if split_by_name else files
    self.labelled, self.classes = _labels(own, read)
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


def _of_split(files: list[Path], split: str) -> list[Path]:
  """The files of the first of a split's names that there is."""
  return next((own for name in SPLITS[split] if (own := [f for f in files if f.name.split('-')[0].split('.')[0] == name])), [])


def _metadata(file: Path) -> Any:
  from pyarrow import parquet

  try:
    metadata = parquet.read_metadata(file)
    metadata.schema.to_arrow_schema()
  except Exception as e:  # pyarrow raises its own types
    raise UserError(f'{file} is not a whole parquet file: {str(e).splitlines()[0]}.') from e
  rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
  if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows or metadata.num_rows > file.stat().st_size:  # an image has bytes
    raise UserError(f'{file} is damaged: {file.stat().st_size:,} bytes cannot hold {max(metadata.num_rows, sum(rows)):,} images.')
  return metadata


def _names(file: Path, schema: Any) -> list[str] | None:
  """The classes' names that Hugging Face keeps in a file."""
  try:
    features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}')).get('info', {}).get('features', {})
    names = features.get('label', {}).get('names')
  except (ValueError, AttributeError) as e:
    raise UserError(f'{file} is damaged: its description of the features does not read ({type(e).__name__}).') from e
  return [str(name) for name in names] if names else None


def _holds_bytes(kind: Any) -> bool:
  """Whether a column of this type has encoded images, as they are or in Hugging Face's struct<bytes, path>."""
  from pyarrow import types

  if types.is_struct(kind):
    index = kind.get_field_index('bytes')
    return index >= 0 and _holds_bytes(kind.field(index).type)
  return types.is_binary(kind) or types.is_large_binary(kind)


def _labels(own: list[Path], files: list[Path]) -> tuple[bool, list[str] | None]:
  """(do the images of the files `own` have labels, names of the classes of all `files`)."""
  from pyarrow import parquet

  names: tuple[list[str], Path] | None = None
  values: dict[Path, np.ndarray] = {}
  for file in files:
    schema = _metadata(file).schema.to_arrow_schema()
    if 'image' not in schema.names:
      raise UserError(f'{file} has the columns {", ".join(schema.names)}; expected one called image.')
    if not _holds_bytes(schema.field('image').type):
      raise UserError(
        f'{file}: the column image is {schema.field("image").type}; expected the bytes of an image file, or a struct with `bytes`.'
      )
    if 'label' not in schema.names:
      continue
    try:
      values[file] = np.asarray(parquet.read_table(file, columns=['label']).column('label').to_pylist(), object)
    except (OSError, ValueError, MemoryError) as e:  # pyarrow's own types are of these
      raise UserError(f'{file} is damaged: its labels do not read ({str(e).splitlines()[0][:200]}).') from e
    theirs = _names(file, schema)
    if theirs and names and theirs != names[0]:
      raise UserError(f'{names[1]} and {file} name their classes differently ({len(names[0])} and {len(theirs)} names).')
    if theirs and not names:
      names = theirs, file
  known = {file: x for file, x in values.items() if any(label != -1 for label in x)}
  for file, x in known.items():
    wrong = next((label for label in x if not isinstance(label, int) or not 0 <= label < (len(names[0]) if names else MAX_CLASSES)), None)
    if wrong is not None:
      limit = f' below {len(names[0])}' if names else ''
      raise UserError(f'{file}: labels must be class numbers from 0 on{limit}; here they are such as {wrong!r}.')
  labelled = [file in known for file in own]
  if any(labelled) and not all(labelled):
    raise UserError(f'{own[labelled.index(False)]} has no labels, {own[labelled.index(True)]} has.')
  if not any(labelled):
    return False, None
  count = 1 + max(int(x.max()) for x in known.values())
  return True, list(names[0]) if names else [str(i) for i in range(count)]
