"""Patches with the same code as one patch of a photo: a picture of them, the photo's patch first.

python examples/nearest_patches.py TOKENIZER FOLDER PHOTO ROW COLUMN patches.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import beitv2_jax
from beitv2_jax.downstream import image_files
from beitv2_jax.reports import draw


def main(tokenizer: str, folder: str, photo: str, row: str, column: str, out: str) -> None:
  model = beitv2_jax.load(tokenizer)
  if model.kind != 'tokenizer' or not (0 <= int(row) < model.grid[0] and 0 <= int(column) < model.grid[1]):
    sys.exit(f'{tokenizer} is a {model.kind} with rows and columns 0 to {model.grid[0] - 1}')
  size, patch = model.config.data.image_size, model.config.model.patch_size
  wanted, found = (0, int(row), int(column)), []
  for files, images in image_files.prepared([Path(photo), *image_files.find_images([folder])], size, batch=32):
    codes, cosines = map(np.array, model.assignments(images))
    if not found:  # the photo is the first of all
      if files[0] != Path(photo):
        sys.exit(f'{photo} does not decode')
      code, cosines[wanted] = codes[wanted], 2.0
    found += [(float(cosines[at]), draw.patches_of(images, patch)[at]) for at in zip(*np.nonzero(codes == code))]
  nearest = [tile for _, tile in sorted(found, key=lambda pair: -pair[0])][:64]
  Image.fromarray(np.concatenate(nearest, 1)).resize((4 * patch * len(nearest), 4 * patch), Image.Resampling.NEAREST).save(out)
  print(f'code {code}: {len(found) - 1} patches have it; the {len(nearest) - 1} nearest to it are in {out}')


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 7 else sys.exit(__doc__)
