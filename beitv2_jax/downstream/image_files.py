"""Image files and folders that a command was given, found and prepared for a model."""

import collections
import concurrent.futures
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.data import decode, transforms
from beitv2_jax.data.folders import read_file
from beitv2_jax.data.listing import EXTENSIONS, images_under
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar


def find_images(paths: str | Path | Sequence[str | Path]) -> list[Path]:
  """The files named, and all images in the folders named, in order. Raises UserError for what does not exist or is empty."""
  out, paths = [], [paths] if isinstance(paths, (str, Path)) else paths
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


def decoded(
  paths: list[Path], crop: transforms.CenterCrop | None = None, ahead: int = 0, **reading: Any
) -> Iterator[tuple[Path, np.ndarray]]:
  """(path, uint8 [h, w, 3]) of each image, `reading` being arguments of decode.image; a file that does not decode is named on stderr and
  left out. All cores decode, and `ahead` images more than they work on are made before they are asked for."""

  def read(path: Path) -> np.ndarray | Exception:
    try:
      image = decode.image(read_file(str(path)), **reading)
      return crop(dict(image=image), None)['image'] if crop else image
    except decode.UNDECODABLE as e:
      return e

  for path, image in zip(paths, in_threads(read, bar(paths, 'images'), ahead)):
    if isinstance(image, Exception):
      print(f'warning: {path} does not decode ({str(image)[:200] or type(image).__name__}); left out.', file=sys.stderr)
    else:
      yield path, image


def in_threads(function: Callable, items: Iterable, ahead: int) -> Iterator:
  """function(item) of each item, in order, by as many threads as there are cores."""
  workers = os.cpu_count() or 1
  pool, waiting = concurrent.futures.ThreadPoolExecutor(workers), collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > workers + ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def prepared(paths: list[Path], size: int, batch: int, crop_pct: float = 0.875, **reading: Any) -> Iterator[tuple[list[Path], np.ndarray]]:
  """(paths, uint8 [b, size, size, 3]) in batches of those that decode. The next batch is decoded while one is used."""
  names, images = [], []
  for path, image in decoded(paths, transforms.CenterCrop(size, crop_pct), ahead=batch, **reading):
    images.append(image)
    names.append(path)
    if len(images) == batch:
      yield names, np.stack(images)
      names, images = [], []
  if images:
    yield names, np.stack(images)
