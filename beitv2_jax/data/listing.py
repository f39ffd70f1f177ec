"""Lists of image files: found in folders, kept small in memory, and cut into a part for training and one that is held out."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from beitv2_jax.errors import UserError

EXTENSIONS = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'}
HIDDEN = {'__macosx', '@eadir', 'lost+found', '$recycle.bin', 'system volume information', '__pycache__'}  # as systems leave them
SPLITS = {'train': ('train', 'training'), 'eval': ('val', 'validation', 'valid', 'test', 'eval')}


def split_indices(count: int, split: str, held_out: int) -> np.ndarray:
  """The same random part of range(count) on every machine: the last `held_out` of a fixed permutation, or the rest."""
  order = np.random.default_rng(0).permutation(count)
  return order[count - held_out :] if split == 'eval' else order[: count - held_out]


def held_out(count: int, split: str, holdout: float) -> np.ndarray:
  """The records of a source without splits that belong to `split`."""
  keep = split_indices(count, split, max(1, int(count * holdout)))  # holdout=1: all are for evaluation
  if not len(keep):
    raise UserError(f'{count} images are too few to hold some out for evaluation: none are left for the {split} split.')
  return keep


class Names:
  """Many strings in one block of memory: a million paths as Python objects would be copied into every worker."""

  def __init__(self, names: Sequence[str]):
    block = ''.join(names)
    if not block.isascii():
      lengths = [len(n.encode('utf-8', 'surrogateescape')) for n in names]
    else:
      lengths = map(len, names)
    self.ends = np.cumsum(np.fromiter(lengths, np.int64, len(names)))
    self.block = block.encode('utf-8', 'surrogateescape')

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, i: int) -> str:
    return self.block[self.ends[i - 1] if i else 0 : self.ends[i]].decode('utf-8', 'surrogateescape')


def is_hidden(name: str) -> bool:
  """A file or folder that is a system's business: .ipynb_checkpoints, __MACOSX, ._photo.jpg."""
  return name.startswith('.') or name.lower() in HIDDEN


def image_folders(root: Path, first: bool = False) -> list[tuple[str, list[str]]]:
  """(folder relative to `root`, its images' names, sorted) for `root` and all its sub-folders that hold any, in order.

  Hidden ones do not count. With `first` it stops at the first folder with images.
  """
  out, endings, seen = [], tuple(EXTENSIONS), set()

  def walk(folder: str) -> None:
    real = os.path.realpath(os.path.join(root, folder))
    if real in seen:  # a link to where we have been
      return logging.warning('left out %s: a link to %s, which is taken already', os.path.join(root, folder), real)
    seen.add(real)
    try:
      names = sorted(os.listdir(os.path.join(root, folder)))
    except OSError as e:
      return logging.warning('left out %s: %s', e.filename, e.strerror)
    images = [n for n in names if n.lower().endswith(endings) and n[0] != '.']  # no look at each file: a million of them takes seconds
    if images:
      out.append((folder, images))
    for name in names if len(images) < len(names) else ():
      if first and out:
        return
      if not name.lower().endswith(endings) and not is_hidden(name) and os.path.isdir(os.path.join(root, folder, name)):
        walk(os.path.join(folder, name))

  walk('')
  return out


def images_under(root: Path) -> list[str]:
  """Paths, relative to `root`, of all images in it and its sub-folders."""
  return [os.path.join(folder, n) for folder, names in image_folders(root) for n in names]
