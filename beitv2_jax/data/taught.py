"""Images with what a teacher made of them beforehand, kept in files: no teacher is in memory while a tokenizer learns.

A folder holds `teaching.json` (what the features are of), and `train.bf16` and `eval.bf16`: bfloat16 [images, patches, width], in the source's
order. `python -m beitv2_jax teach` writes it; so may any program that keeps to this.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError

NAME = 'teaching.json'
SAMPLE = 1000  # images whose names are looked at


def fingerprint(source: Sequence) -> str:
  """Of how many images a source has, and of the names of up to SAMPLE of them, in their order."""
  digest, name = hashlib.sha256(str(len(source)).encode()), getattr(source, 'name', str)
  for i in np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)):
    digest.update(Path(str(name(int(i)))).name.encode() + b'\0')
  return digest.hexdigest()


def describe(folder: str | Path) -> dict[str, Any]:
  """What `teaching.json` says: teacher, grid, image_size, width, splits. Raises UserError."""
  path = Path(folder).expanduser() / NAME
  try:
    about = json.loads(path.read_text())
    assert {'teacher', 'grid', 'image_size', 'width', 'splits'} <= about.keys()
    return about
  except (OSError, ValueError, AssertionError, AttributeError) as e:
    raise UserError(
      f'no features of a teacher in {path.parent}: expected {NAME} and train.bf16, as `python -m beitv2_jax teach` writes them.'
    ) from e


class Taught:
  """`source` with `teacher` in each record: bfloat16 [patches, width] as uint16, which numpy can hold."""

  def __init__(self, source: Any, folder: str | Path, split: str):
    about, self.path = describe(folder), Path(folder).expanduser() / f'{split}.bf16'
    self.source, self.classes = source, getattr(source, 'classes', None)
    self.shape = (int(np.prod(about['grid'])), about['width'])
    found = about['splits'].get(split)
    if not found:
      raise UserError(f'{self.path.parent} has no features of the {split} images: teach with the same --data.')
    if found['fingerprint'] != fingerprint(source):
      raise UserError(
        f'{self.path} was made from other images, or in another order ({found["images"]:,}; the source has {len(source):,}): teach again from this one.'
      )
    needed = 2 * len(source) * int(np.prod(self.shape))
    if not self.path.is_file() or self.path.stat().st_size != needed:
      raise UserError(f'{self.path} is not whole: {needed:,} bytes were to be there. Teach again.')

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, i: int) -> dict:
    count = int(np.prod(self.shape))  # opened each time: decoding processes get a path, not the features
    features = np.fromfile(self.path, np.uint16, count, offset=2 * count * i).reshape(self.shape)
    return self.source[i] | dict(teacher=features)

  def name(self, i: int) -> str:
    return getattr(self.source, 'name', str)(i)
