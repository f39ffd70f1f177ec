"""What one record becomes: small callables (record, rng) → record. Images are uint8 arrays [h, w, 3], RGB, all the way.

Pillow is the yardstick: JPEGs decode to its bits (libjpeg-turbo's exact transforms), evaluation resizes with it, and the training crop
stays within one grey level of its antialiased bicubic, done columns first. Only numpy and image libraries are imported here, so that
worker processes start fast.
"""

import dataclasses
import functools
import math
import threading
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageEnhance, ImageStat

try:
  import cykooz_resizer as fast
except ImportError:  # no wheel for this machine
  fast: Any = None

Record = dict
Rng = np.random.Generator
Size = tuple[int, int]
Box = tuple[int, int, int, int]  # left, top, width, height
MAX_RESIZED = 2**26  # pixels: what is longer and thinner is cropped before it is resized


@functools.cache
def _slow() -> None:
  logging.warning('cykooz-resizer is not installed (no wheel for this machine?): Pillow resizes the crops, about three times slower.')


_local = threading.local()


def _resizer():
  if not hasattr(_local, 'resizer'):
    _local.resizer = fast.Resizer()
    _local.options = fast.ResizeOptions(fast.ResizeAlg.convolution(fast.FilterType.catmull_rom))  # Pillow's BICUBIC, a = -0.5
  return _local.resizer, _local.options


def resize(image: np.ndarray, size: Size, exact: bool = False) -> np.ndarray:
  """Antialiased bicubic to (h, w): Pillow's, or (not `exact`) a vectorised one in about a third of the time."""
  if image.shape[:2] == size:
    return image
  if fast is None and not exact:
    _slow()
  if exact or fast is None:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
  resizer, options = _resizer()
  pixels = fast.ImageData(image.shape[1], image.shape[0], fast.PixelType.U8x3, image.tobytes())
  for h, w in ((image.shape[0], size[1]), size):  # one axis at a time, rounding in between as Pillow does
    if (pixels.height, pixels.width) != (h, w):
      out = fast.ImageData(w, h, fast.PixelType.U8x3)
      resizer.resize(pixels, out, options)
      pixels = out
  return np.frombuffer(pixels.get_buffer(), np.uint8).reshape(*size, 3)


def pair(size: int | Size) -> Size:
  """A side, or (h, w)."""
  return (size, size) if isinstance(size, int) else tuple(size)


@dataclasses.dataclass(frozen=True)
class Flip:
  """Left-right with probability 1/2. Comes after the crop, which is as random either way, and has fewer pixels to move."""

  def __call__(self, record: Record, rng: Rng) -> Record:
    if rng.random() < 0.5:
      flipped = np.empty_like(record['image'])
      for c in range(3):  # a channel at a time is three times faster than all at once
        flipped[..., c] = record['image'][:, ::-1, c]
      record = record | dict(image=flipped)
    return record


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: Rng) -> Box:
  """The crop box of torchvision's RandomResizedCrop: ten tries, then the centre."""
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
  w, h = width, height
  if width / height < ratio[0]:
    h = max(round(width / ratio[0]), 1)
  elif width / height > ratio[1]:
    w = max(round(height * ratio[1]), 1)
  return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A box of area U(scale) and log-uniform aspect, resized to `size`. Where the record has a `box` already it is that one."""

  size: int | Size
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  exact: bool = False

  def box(self, image: np.ndarray, rng: Rng) -> Box:
    return random_box(image.shape[1], image.shape[0], self.scale, self.ratio, rng)

  def __call__(self, record: Record, rng: Rng) -> Record:
    record = dict(record)
    image = record['image']
    left, top, w, h = record.pop('box', None) or self.box(image, rng)
    return record | dict(image=resize(image[top : top + h, left : left + w], pair(self.size), self.exact))


BRIGHTNESS, CONTRAST, SATURATION = range(3)
RAMP = Image.frombytes('L', (256, 1), bytes(range(256)))


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """Brightness, contrast and saturation factors from U(1-s, 1+s), in random order (paper: 0.4, before the crop).

  `crop` is the one that comes next: its box is drawn here already, and only what it keeps is worked on; the pixels are those of the whole
  image. Without it only the draw is made here, as `jitter` [3] and `jitter_order` [3], and data/augment.py applies it to the crop on the device.
  """

  strength: float
  crop: RandomResizedCrop | None = None

  def __call__(self, record: Record, rng: Rng) -> Record:
    order = rng.permutation(3)
    factors = rng.uniform(1 - self.strength, 1 + self.strength, 3)
    if self.crop is None:
      return record | dict(jitter=factors.astype(np.float32), jitter_order=order.astype(np.int32))
    image = record['image']
    box = self.crop.box(image, rng)
    return record | dict(image=jittered(image, factors, order, box), box=(0, 0, *box[2:]))


def jittered(image: np.ndarray, factors: np.ndarray, order: np.ndarray, box: Box) -> np.ndarray:
  """What is inside `box` after ImageEnhance's brightness, contrast and saturation of the whole image by `factors` [3], in `order`.

  Contrast turns on the mean grey of the whole image: what comes before it is done everywhere, the rest inside the box.
  """
  part = Image.fromarray(image)
  for i in order:
    if i == CONTRAST:
      mean = int(ImageStat.Stat(part.convert('L')).mean[0] + 0.5)
      part = part.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
      part = part.point(blended(mean, factors[i]))
    elif i == BRIGHTNESS:
      part = part.point(blended(0, factors[i]))
    else:
      part = ImageEnhance.Color(part).enhance(factors[i])
  return np.asarray(part)


def blended(grey: int, factor: float) -> list[int]:
  """Pillow's blend of one grey with each of the 256 values, three times over: a table is as good as the arithmetic, and faster."""
  return 3 * list(Image.blend(Image.new('L', RAMP.size, grey), RAMP, factor).tobytes())


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """The smallest resize that covers size / crop_pct, then the central `size`. Pillow's own resize: codes depend on it."""

  size: int | Size
  crop_pct: float = 0.875

  def __call__(self, record: Record, rng: Rng | None) -> Record:
    image, (h, w) = record['image'], pair(self.size)
    tall, wide = int(h / self.crop_pct), int(w / self.crop_pct)
    # The covering side is exact and the other one rounded down, as torchvision's Resize(shorter side) does.
    by_height = (tall, int(tall * image.shape[1] / image.shape[0]))
    by_width = (int(wide * image.shape[0] / image.shape[1]), wide)
    size = by_width if by_height[1] < wide else by_height
    size = max(size[0], h), max(size[1], w)
    top, left = round((size[0] - h) / 2), round((size[1] - w) / 2)
    if size[0] * size[1] > MAX_RESIZED:  # an image of 1 x 5,000 pixels would become one of 256 x 1,280,000
      rows, cols = image.shape[0] / size[0], image.shape[1] / size[1]
      box = (left * cols, top * rows, (left + w) * cols, (top + h) * rows)
      return record | dict(image=np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC, box)))
    return record | dict(image=resize(image, size, exact=True)[top : top + h, left : left + w])


def image_transforms(data, train: bool, jitter: float = 0.0, on_device: bool = False) -> list:
  """The standard list for a config's `data` section: [jitter], random crop, [flip]; or resize and centre crop."""
  size = data.image_size if isinstance(data.image_size, int) else tuple(data.image_size)
  if not train:
    return [CenterCrop(size, data.crop_pct)]
  crop = RandomResizedCrop(size, tuple(data.crop_scale), tuple(data.crop_ratio), data.resize == 'pillow')
  return [
    *([ColorJitter(jitter, None if on_device else crop)] if jitter else []),
    crop,
    *([Flip()] if data.flip else []),
  ]
