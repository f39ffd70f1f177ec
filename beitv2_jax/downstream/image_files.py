"""Image files and folders that a command was given, found and prepared for a model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.data import decode, transforms
from beitv2_jax.data.folders import read_file
from beitv2_jax.data.listing import EXTENSIONS, images_under
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar


def find_images(paths: list[str]) -> list[Path]:
  """The files named, and all images in the folders named, in order. Raises UserError for what does not exist or is empty."""
  out = []
  for path in map(Path, paths):
    if path.is_dir():
      found = [path / name for name in images_under(path)]
      if not found:
        raise UserError(f'no images under {path}: looked for {" ".join(sorted(EXTENSIONS))}.')
      out += found
    elif path.is_file():
      out.append(path)
    else:
      raise UserError(f'no file or folder {path}.')
  return out


def decoded(paths: list[Path], **reading: Any) -> Iterator[tuple[Path, np.ndarray]]:
  """(path, uint8 [h, w, 3]) of each image, `reading` being arguments of decode.image; a file that does not decode is named on stderr and left out."""
  for path in bar(paths, 'images'):
    try:
      yield path, decode.image(read_file(str(path)), **reading)
    except decode.UNDECODABLE as e:
      print(f'warning: {path} does not decode ({str(e)[:200] or type(e).__name__}); left out.', file=sys.stderr)


def prepared(paths: list[Path], size: int, batch: int, crop_pct: float = 0.875, **reading: Any) -> Iterator[tuple[list[Path], np.ndarray]]:
  """(paths, uint8 [b, size, size, 3]) in batches of those that decode."""
  crop, names, images = transforms.CenterCrop(size, crop_pct), [], []
  for path, image in decoded(paths, **reading):
    images.append(crop(dict(image=image), None)['image'])
    names.append(path)
    if len(images) == batch:
      yield names, np.stack(images)
      names, images = [], []
  if images:
    yield names, np.stack(images)
