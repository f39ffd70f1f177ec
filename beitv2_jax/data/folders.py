"""Image files in folders, whose names are the classes. The same list of classes serves training and evaluation."""

import csv
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from beitv2_jax.data.listing import EXTENSIONS, SPLITS, Names, held_out, image_folders, is_hidden
from beitv2_jax.errors import UserError

KAGGLE_LABELS = 'LOC_val_solution.csv'


def read_file(path: str) -> bytes:
  """A file's bytes. Raises OSError, also for what is no file: a named pipe would wait for ever."""
  with open(os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0)), 'rb') as f:
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
      raise OSError('not a regular file')
    return f.read()


class Files:
  """Image files under `root`, with labels where there are any; `keep` are the ones that count, all by default."""

  def __init__(self, root: Path, names: Sequence[str], labels: Any, classes: list[str] | None, keep: np.ndarray | None = None):
    self.root, self.names, self.classes = str(root), Names(names), classes
    self.labels = None if labels is None else np.asarray(labels, np.int32)
    self.keep = np.arange(len(names)) if keep is None else keep

  def __len__(self) -> int:
    return len(self.keep)

  def __getitem__(self, i: int) -> dict:
    record = dict(image=read_file(self.name(i)))
    return record if self.labels is None else record | dict(label=int(self.labels[self.keep[i]]))

  def name(self, i: int) -> str:
    return os.path.join(self.root, self.names[int(self.keep[i])])


class Folder(Files):
  """PATH/class/*.jpg, PATH/{train,val}/class/*.jpg, or a flat PATH/*.jpg without labels.

  Also ImageNet as Kaggle has it: train/class/*.JPEG, a flat val/, and LOC_val_solution.csv beside or above them.
  """

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
    found = _found(base, announce=split == 'train' or own is not None)
    files = [n for folder, names in found for n in (map(f'{folder}{os.sep}'.__add__, names) if folder else names)]
    counts = [len(names) for _, names in found]
    classes, labels = None, None
    if found[0][0]:
      folders = [folder.partition(os.sep)[0] for folder, _ in found]
      classes = _classes(splits['train']) if split == 'eval' and own and splits['train'] else sorted(set(folders))
      _check_known(folders, classes, base, splits['train'])
      labels = np.repeat(np.searchsorted(classes, folders), counts)
    elif split == 'eval' and own and splits['train'] and (solution := _solution(root)):
      classes = _classes(splits['train'])
      labels = _solved(solution, files, classes)
    super().__init__(base, files, labels, classes, held_out(len(files), split, holdout) if own is None else None)


def _found(base: Path, announce: bool) -> list[tuple[str, list[str]]]:
  """(folder, its images) under `base`: class folders, or `base` itself if it is flat. Says what is left out."""
  found = image_folders(base)
  if not found:
    raise UserError(f'no images under {base}: looked for {" ".join(sorted(EXTENSIONS))} in it and its sub-folders.')
  tops: dict[str, set[str]] = {}
  for folder, _ in found:
    top, _, rest = folder.partition(os.sep)
    tops.setdefault(top, set()).add(rest.partition(os.sep)[0])
  for top, below in tops.items():
    if top and len(tops.keys() - {''}) == 1 and all(below & set(SPLITS[s]) for s in SPLITS):
      raise UserError(f'{base} holds one folder, {top}, with {" and ".join(sorted(below))} in it: point at {base / top}.')
  if len(found) > 1 and not found[0][0]:  # stray images beside class folders have no label
    stray, inside = len(found[0][1]), sum(len(names) for _, names in found[1:])
    if stray > inside:
      raise UserError(
        f'{base} has {stray} images of its own and {inside} in the sub-folders {", ".join(sorted(tops.keys() - {""})[:3])}: is it one flat folder, or one folder '
        'a class? Move one kind away.'
      )
    if announce:
      logging.warning('left out %d images that lie in %s itself, beside the class folders', stray, base)
    found = found[1:]
  if announce and found[0][0]:
    empty = sorted(d.name for d in base.iterdir() if d.is_dir() and not is_hidden(d.name) and d.name not in tops)
    if empty:
      logging.warning('%d class folders of %s have no images and are no classes: %s', len(empty), base, ', '.join(empty[:5]))
  return found


def _classes(train: Path) -> list[str]:
  """The classes of a folder of class folders: those that have images, as `Folder` for training takes them."""
  return sorted(d.name for d in train.iterdir() if d.is_dir() and not is_hidden(d.name) and image_folders(d, first=True))


def _check_known(folders: list[str], classes: list[str], base: Path, train: Path | None) -> None:
  strange = sorted(set(folders) - set(classes))
  if strange:
    raise UserError(f'{base} has class folders that {train} has not: {", ".join(strange[:5])}. Their labels would mean nothing.')


def _solution(root: Path) -> Path | None:
  """Kaggle's file of labels of its flat `val`, beside it or up to three folders above."""
  above = [root.absolute(), *root.absolute().parents][:4]
  return next((d / KAGGLE_LABELS for d in above if (d / KAGGLE_LABELS).is_file()), None)


def _solved(solution: Path, files: list[str], classes: list[str]) -> np.ndarray:
  with solution.open(newline='') as f:
    label = {row[0]: row[1].split()[0] for row in csv.reader(f) if len(row) == 2 and row[1].strip()}
  number = {name: i for i, name in enumerate(classes)}
  lacking = [n for n in files if label.get(Path(n).stem) not in number]
  if lacking:
    raise UserError(f'{solution} gives no class of the training folder to {len(lacking)} of {len(files)} images, such as {lacking[0]}.')
  return np.array([number[label[Path(n).stem]] for n in files])
