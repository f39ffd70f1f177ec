"""The codes of all images in a folder, with the share of each image's patches that have its most frequent code, as a parquet file.

python examples/codes_to_parquet.py TOKENIZER FOLDER codes.parquet
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

import beitv2_jax
from beitv2_jax.downstream import codes, image_files


def main(tokenizer: str, folder: str, out: str) -> None:
  if not Path(folder).is_dir():
    sys.exit(f'{folder} is no folder')
  model = beitv2_jax.load(tokenizer)
  files, grids = codes.tokenize(model, image_files.find_images([folder]))
  counts = [np.bincount(grid.ravel()) for grid in grids]
  table = dict(
    file=[str(Path(file).relative_to(folder)) for file in files],
    codes=[grid.ravel().tolist() for grid in grids],  # row by row
    rows=[grid.shape[0] for grid in grids],
    most_frequent=[int(count.argmax()) for count in counts],
    share=[float(count.max() / count.sum()) for count in counts],
  )
  parquet.write_table(pyarrow.table(table), out)
  print(f'{len(files)} images with {len(np.unique(grids))} different codes in {out}')


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
