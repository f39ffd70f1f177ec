"""Images in tar files, read where they lie: webdataset shards, ImageNet-21k's tars of classes, any tar of class folders.

The headers are read once, some ten thousand a second and tar; then an image is one read at a known place.
"""

import dataclasses
import functools
import glob
import io
import json
import os
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from beitv2_jax.data.listing import EXTENSIONS, SPLITS, Names, held_out, is_hidden
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar

WNID = re.compile(r'n\d{8}')
MOST_OPEN = 64  # tars of a source; some systems let a process open 256 files


class Part(io.RawIOBase):
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


def members(file, name: str) -> list[tarfile.TarInfo]:
  """The files in a tar. Raises UserError if it is no tar, or cut off."""
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      found = [m for m in tar.getmembers() if m.isfile()]
      at = tar.offset
  except (tarfile.TarError, ValueError, OverflowError) as e:  # the last two from numbers that are damaged
    raise UserError(f'{name} is no tar, or cut off: {e}. Download it again; a compressed one must be unpacked first.') from e
  end = file.seek(0, 2)
  file.seek(min(at, end))
  if any(file.read(512)) or at >= end:  # what follows the last member of a whole tar is a block of zeros
    raise UserError(f'{name} ends at {at:,} bytes without the mark of a whole tar: it is cut off, or damaged there. Download it again.')
  if found and found[-1].offset_data + found[-1].size > end:
    raise UserError(f'{name} is cut off after {end:,} bytes. Download it again.')
  return found


@dataclasses.dataclass(frozen=True)
class Index:
  """The images of one tar: their names, places [n, 2] of offset and bytes, and what the tar says of their classes ('' is nothing)."""

  names: Names
  places: np.ndarray
  labels: list[str]


class Tars:
  """A tar, a folder of tars, or a pattern with *. An image's class is what stands beside it in its tar (KEY.cls, or "label" in KEY.json), else
  the folder it lies in, else the tar inside the tar, else the tar where that is named like ImageNet's classes (n01440764.tar).

  Splits are told by words in the names of tars and their folders (imagenet1k-train-0000.tar). All images have classes, or none.
  """

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    files = _files(where)
    of = {s: [f for f in files if _words(f, where) & set(SPLITS[s])] for s in SPLITS}
    evaluation = next((word for word in SPLITS['eval'] if any(word in _words(f, where) for f in of['eval'])), '')
    of['eval'] = [f for f in of['eval'] if evaluation in _words(f, where)]
    by_name = any(of.values())
    own = of[split] if by_name else files
    if not own:
      raise UserError(f'{where} has no {split} tars: looked for names with one of {", ".join(SPLITS[split])}.')
    read = list(dict.fromkeys([*of['train'], *of['eval']])) if by_name else files
    indices = {f: _index(str(f), f.stat().st_mtime_ns) for f in bar(read, 'tars', title='reading the headers')}
    self.files = [str(f) for f in own]
    self.names, self.places = [indices[f].names for f in own], [indices[f].places for f in own]
    self.ends = np.cumsum([len(x) for x in self.places])
    if not self.ends[-1]:
      raise UserError(f'the {split} tars of {where} hold no images.')
    self.rows = np.arange(self.ends[-1]) if by_name else held_out(int(self.ends[-1]), split, holdout)
    self.classes, numbers = _classes({str(f): x.labels for f, x in indices.items()}, self.files)
    self.labels = np.concatenate([numbers[f] for f in self.files]) if self.classes else None
    self._begin()

  def _begin(self) -> None:
    self._open: dict[int, io.FileIO] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_open', '_lock')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._begin()

  def __len__(self) -> int:
    return len(self.rows)

  def _place(self, i: int) -> tuple[int, int, int]:
    """(row, number of its tar, place in that tar)."""
    row = int(self.rows[i])
    number = int(np.searchsorted(self.ends, row, 'right'))
    return row, number, row - (int(self.ends[number - 1]) if number else 0)

  def __getitem__(self, i: int) -> dict:
    row, number, at = self._place(i)
    offset, size = self.places[number][at]
    record = dict(image=self._read(number, int(size), int(offset)))
    return record if self.labels is None else record | dict(label=int(self.labels[row]))

  def _read(self, number: int, size: int, offset: int) -> bytes:
    """From a tar that stays open, for all threads; with more than MOST_OPEN tars the others are opened for each image."""
    with self._lock:
      if number not in self._open and len(self._open) < MOST_OPEN:
        self._open[number] = open(self.files[number], 'rb', buffering=0)  # noqa: SIM115  # open as long as the source is
    if number in self._open:
      return os.pread(self._open[number].fileno(), size, offset)
    with open(self.files[number], 'rb', buffering=0) as file:
      return os.pread(file.fileno(), size, offset)

  def name(self, i: int) -> str:
    _, number, at = self._place(i)
    return f'{self.files[number]}: {self.names[number][at]}'

  def file_name(self, i: int) -> str:
    _, number, at = self._place(i)
    return os.path.basename(self.names[number][at])


def _files(where: str) -> list[Path]:
  root = Path(where).expanduser()
  if '*' in where:
    found = [Path(f) for f in glob.glob(str(root))]
  else:
    found = list(root.rglob('*.tar')) if root.is_dir() else [root] if root.is_file() else []
  if not found:
    raise UserError(f'no tars in {root.absolute()}: data.source=tars:PATH takes a .tar, a folder of them, or a pattern with *.')
  return sorted(found)


def _words(file: Path, where: str) -> set[str]:
  """Words of a tar's name, and of the folders below `where` it lies in."""
  root = Path(where).expanduser()
  inside = file.relative_to(root) if root.is_dir() else Path(file.name)
  return set(re.split(r'[^a-z]+', str(inside).lower()))


@functools.cache  # both splits ask
def _index(file: str, changed: int) -> Index:
  names, places, labels = [], [], []
  with open(file, 'rb') as opened:
    for name, offset, size, label in _images(opened, file, 0, Path(file).stem if WNID.fullmatch(Path(file).stem) else ''):
      names.append(name)
      places.append((offset, size))
      labels.append(sys.intern(label))
  return Index(Names(names), np.asarray(places, np.int64).reshape(-1, 2), labels)


def _images(file, name: str, start: int, outside: str) -> Iterator[tuple[str, int, int, str]]:
  """(name, offset, bytes, class) of the images in a tar, and in those inside it."""
  found = [m for m in members(file, name) if not any(is_hidden(part) for part in Path(m.name).parts if part != '.')]
  beside = {}
  for m in found:
    if m.name.endswith(('.cls', '.json')):
      file.seek(m.offset_data)
      beside[_key(m.name)] = _beside(f'{name}: {m.name}', file.read(m.size)) or beside.get(_key(m.name), '')
  for m in found:
    path = Path(m.name)
    if path.suffix.lower() in EXTENSIONS:
      folder = '' if str(path.parent) == '.' else str(path.parent)
      yield m.name, start + m.offset_data, m.size, beside.get(_key(m.name)) or folder or outside
    elif path.suffix == '.tar':
      yield from _images(Part(file, m.offset_data, m.size), f'{name}: {m.name}', start + m.offset_data, path.stem)


def _key(name: str) -> str:
  """What the files of one sample share: their path up to the first dot of the name."""
  folder, _, last = name.rpartition('/')
  return f'{folder}/{last.split(".")[0]}'


def _beside(name: str, data: bytes) -> str:
  """The class that a .cls or .json file gives; '' for none."""
  try:
    if name.endswith('.cls'):
      return data.decode().strip()
    found = json.loads(data)
    return str(found['label']) if isinstance(found, dict) and found.get('label') is not None else ''
  except ValueError as e:
    raise UserError(f'{name} does not read ({type(e).__name__}).') from e


def _classes(labels: dict[str, list[str]], own: list[str]) -> tuple[list[str] | None, dict[str, np.ndarray]]:
  """(names of the classes of all tars, the number of each image's class), or (None, {}) if the images of `own` have no classes."""
  for file in own:
    if '' in labels[file] and any(labels[file]):
      raise UserError(f'{file}: {labels[file].count("")} of {len(labels[file])} images have no class, and the others have.')
  without = [file for file in own if labels[file] and '' in labels[file]]
  if without:
    have = [file for file in own if labels[file] and '' not in labels[file]]
    if have:
      raise UserError(f'{without[0]} has no classes, {have[0]} has.')
    return None, {}
  known = {file: x for file, x in labels.items() if '' not in x}
  names = sorted({name for x in known.values() for name in x})
  if all(re.fullmatch(r'0|[1-9]\d{0,5}', name) for name in names):  # class numbers
    names = [str(i) for i in range(max(map(int, names)) + 1)]
  elif any(re.fullmatch(r'-?\d+', name) for name in names):
    odd = next(name for name in names if re.fullmatch(r'-?\d+', name))
    raise UserError(f'class {odd!r} among the classes of {own[0]}: give numbers from 0 on, or names.')
  number = {name: i for i, name in enumerate(names)}
  return names, {file: np.asarray([number[name] for name in x], np.int32) for file, x in known.items()}
