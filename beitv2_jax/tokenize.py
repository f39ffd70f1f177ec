"""python -m beitv2_jax.tokenize --tokenizer DIR IMAGE-OR-FOLDER ...: the codes of images, printed or saved.

Images are prepared as for evaluation: shorter side to 256/224 of the model's size (Pillow's bicubic), centre crop, fp32.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from beitv2_jax import api
from beitv2_jax.data import sources, transforms
from beitv2_jax.errors import UserError, one_line
from beitv2_jax.main import use_compilation_cache


def find_images(paths: list[str]) -> list[Path]:
  """The files named, and all images in the folders named, in order. Raises UserError for what does not exist or is empty."""
  out = []
  for path in map(Path, paths):
    if path.is_dir():
      found = [path / name for name in sources.images_under(path)]
      if not found:
        raise UserError(f'no images under {path}: looked for {" ".join(sorted(sources.EXTENSIONS))}.')
      out += found
    elif path.is_file():
      out.append(path)
    else:
      raise UserError(f'no file or folder {path}.')
  return out


def prepared(paths: list[Path], size: int, batch: int, crop_pct: float = 0.875) -> Iterator[tuple[list[Path], np.ndarray]]:
  """(paths, uint8 [b, size, size, 3]) in batches; a file that does not decode is named on stderr and left out."""
  crop, names, images = transforms.CenterCrop(size, crop_pct), [], []
  for path in tqdm(paths, unit=' images', disable=len(paths) < 2 * batch):
    try:
      image = transforms.decode(path.read_bytes())
    except transforms.UNDECODABLE as e:
      print(f'warning: {path} does not decode ({type(e).__name__}); left out.', file=sys.stderr)
      continue
    images.append(crop(dict(image=image), None)['image'])
    names.append(path)
    if len(images) == batch:
      yield names, np.stack(images)
      names, images = [], []
  if images:
    yield names, np.stack(images)


def tokenize(model: api.Model, paths: list[Path], batch: int = 32) -> tuple[list[Path], np.ndarray]:
  """(files that decode, their codes int32 [n, Gh, Gw])."""
  if model.kind != 'tokenizer':
    raise UserError(f'{model.kind} models have no codes; give a tokenizer.')
  size = model.config.data.image_size
  if not isinstance(size, int):
    raise UserError(f'the tokenizer takes {size} images; only square ones are prepared here. Use model.tokens(images).')
  names, codes = [], []
  for part, images in prepared(paths, size, batch):
    names += part
    codes.append(api.in_batches(model.tokens, images, batch=batch))
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
    raise UserError(f'--save {path}: give a name that ends in .npz or .parquet.')


@one_line
def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m beitv2_jax.tokenize', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('paths', nargs='+', help='images, or folders of images')
  parser.add_argument('--tokenizer', required=True, help='a workdir, or a directory made by beitv2_jax.convert')
  parser.add_argument('--save', type=Path, help='a .npz or .parquet file instead of printing')
  parser.add_argument('--batch', type=int, default=32)
  args = parser.parse_args(argv)
  use_compilation_cache()
  if args.save and args.save.suffix not in ('.npz', '.parquet'):
    raise UserError(f'--save {args.save}: give a name that ends in .npz or .parquet.')
  if args.save and not args.save.expanduser().absolute().parent.is_dir():
    raise UserError(f'--save {args.save}: there is no such folder.')
  if args.batch < 1:
    raise UserError(f'--batch {args.batch}: at least 1.')
  names, codes = tokenize(api.load(args.tokenizer), find_images(args.paths), args.batch)
  if args.save:
    save(args.save, names, codes)
    print(f'wrote {len(names)} x {codes.shape[1]} x {codes.shape[2]} codes to {args.save}')
  else:
    for name, grid in zip(names, codes):
      print(name)
      print('\n'.join(' '.join(f'{c:4d}' for c in row) for row in grid))


if __name__ == '__main__':
  sys.exit(main())
