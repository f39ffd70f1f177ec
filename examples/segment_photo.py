"""A photo with the classes of its pixels drawn over it, and how much of it each class covers.

python examples/segment_photo.py SEGMENTER PHOTO overlay.png
"""

import sys

import numpy as np
from PIL import Image

import beitv2_jax
from beitv2_jax.downstream import classes, predictions, segmentation


def main(segmenter: str, photo: str, out: str) -> None:
  model = beitv2_jax.load(segmenter)
  image = np.asarray(Image.open(photo).convert('RGB'))
  side = model.config.data.image_size
  window = (side, side) if isinstance(side, int) else tuple(side)
  numbers = segmentation.predict(model.logits, image, window)  # [h, w]: a window slides over what is larger
  names = classes.model_classes(model.config)
  colours = predictions.palette(len(names))
  Image.fromarray((0.5 * image + 0.5 * colours[numbers]).astype(np.uint8)).save(out)
  share = 100 * np.bincount(numbers.ravel(), minlength=len(names)) / numbers.size
  for i in np.argsort(-share):
    if share[i] > 0:
      print(f'{names[i]:20} {share[i]:5.1f} %')


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
