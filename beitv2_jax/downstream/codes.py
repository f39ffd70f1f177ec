"""The codes of image files.

Images are prepared as for the tokenizer's evaluation: resized by its data.crop_pct, centre crop, fp32.
"""

from pathlib import Path

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.downstream import trained
from beitv2_jax.downstream.image_files import prepared
from beitv2_jax.errors import UserError


def tokenize(model: trained.Model, paths: list[Path], batch: int = 32) -> tuple[list[Path], np.ndarray]:
  """(files that decode, their codes int32 [n, Gh, Gw])."""
  if model.kind != 'tokenizer':
    raise UserError(f'{model.kind} models have no codes; give a tokenizer.')
  size = model.config.data.image_size
  if not isinstance(size, int):
    raise UserError(f'the tokenizer takes {size} images; only square ones are prepared here. Use model.tokens(images).')
  names, codes = [], []
  for part, images in prepared(paths, size, batch, **config_lib.preparation(model.config)):
    names += part
    codes.append(trained.in_batches(model.tokens, images, batch=batch))
  if not names:
    raise UserError('none of the images decodes.')
  return names, np.concatenate(codes)


def save(path: Path, names: list[Path], codes: np.ndarray) -> None:
  """.npz (`files`, `codes` [n, Gh, Gw]) or .parquet (`file`, `codes` as a flat list, row by row)."""
  if path.suffix == '.npz':
    np.savez_compressed(path, files=np.array([str(n) for n in names]), codes=codes)
  elif path.suffix == '.parquet':
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({'file': [str(n) for n in names], 'codes': [c.ravel().tolist() for c in codes]}), path)
  else:
    raise UserError(f'--out {path}: give a name that ends in .npz or .parquet.')
