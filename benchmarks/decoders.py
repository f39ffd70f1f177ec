"""JPEG bytes → a 224 px crop, one core: the decoders and resizers tried, their speed, and their distance from Pillow's pixels.

  python benchmarks/decoders.py FOLDER [--images 300]

OpenCV's rows appear where opencv-python-headless is installed (pip install opencv-python-headless).
"""

import argparse
import io
import itertools
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from beitv2_jax.data import decode, listing, transforms

SIZE = (224, 224)


def pillow_decode(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def simplejpeg_fast(data):
  return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)


def pillow_resize(crop):
  return transforms.resize(crop, SIZE, exact=True)


def vectorised_one_call(crop):
  resizer, options = transforms._resizer()
  fast = transforms.fast
  out = fast.ImageData(*SIZE, fast.PixelType.U8x3)
  resizer.resize(fast.ImageData(crop.shape[1], crop.shape[0], fast.PixelType.U8x3, crop.tobytes()), out, options)
  return np.frombuffer(out.get_buffer(), np.uint8).reshape(*SIZE, 3)


def main(folder: str, count: int) -> None:
  names = listing.images_under(Path(folder))[:count]
  data = [Path(folder, n).read_bytes() for n in names]
  data = [d for d in data if Image.open(io.BytesIO(d)).mode == 'RGB']
  rng = np.random.default_rng(0)
  boxes = [transforms.random_box(*Image.open(io.BytesIO(d)).size, (0.08, 1.0), (3 / 4, 4 / 3), rng) for d in data]
  decoders = {'Pillow': pillow_decode, 'simplejpeg, exact (ours)': decode.image, 'simplejpeg, fast': simplejpeg_fast}
  resizers = {
    'Pillow bicubic': pillow_resize,
    'vectorised, two passes (ours)': lambda crop: transforms.resize(crop, SIZE),
    'vectorised, one call': vectorised_one_call,
  }
  try:
    import cv2

    cv2.setNumThreads(1)
    decoders['OpenCV'] = lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR_RGB)
    resizers['OpenCV cubic (no antialias)'] = lambda crop: cv2.resize(crop, SIZE, interpolation=cv2.INTER_CUBIC)
    resizers['OpenCV area'] = lambda crop: cv2.resize(crop, SIZE, interpolation=cv2.INTER_AREA)
  except ImportError:
    pass

  def crop(image, box):
    left, top, w, h = box
    return image[top : top + h, left : left + w]

  def columns_then_rows(data, box):  # Pillow's order of old; newer versions pick the order by the sizes
    image = Image.fromarray(crop(pillow_decode(data), box))
    return np.asarray(image.resize((224, image.height), Image.Resampling.BICUBIC).resize(SIZE, Image.Resampling.BICUBIC)).astype(int)

  expected = [columns_then_rows(d, b) for d, b in zip(data, boxes)]
  print(f'{len(data)} images of {np.mean([len(d) for d in data]) / 1e3:.0f} kB\n')
  print('decoder                    resizer                          images/s a core   mean |difference|   share > 2')
  for (dn, decoder), (rn, resize) in itertools.product(decoders.items(), resizers.items()):
    best = np.inf
    for _ in range(3):
      start = time.process_time()
      out = [resize(crop(decoder(d), b)) for d, b in zip(data, boxes)]
      best = min(best, time.process_time() - start)
    difference = np.abs(np.stack(out).astype(int) - np.stack(expected))
    print(f'{dn:27s}{rn:33s}{len(data) / best:15.0f}{difference.mean():20.3f}{100 * (difference > 2).mean():10.2f} %')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder')
  parser.add_argument('--images', type=int, default=300)
  args = parser.parse_args()
  main(args.folder, args.images)
