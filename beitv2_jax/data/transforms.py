"""What one record becomes: small callables (record, rng) → record. Images are PIL until `ToArray`, then uint8 [h, w, 3].

Resizing is Pillow's (antialiased bicubic, 8-bit), as in the official code: codes depend on it.
"""

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageEnhance

Record = dict
Rng = np.random.Generator


def decode(image: bytes | np.ndarray) -> Image.Image:
  """Encoded bytes or a uint8 array → RGB. Raises OSError for what is not an image."""
  if isinstance(image, np.ndarray):
    return Image.fromarray(image)
  return Image.open(io.BytesIO(image)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """Brightness, contrast and saturation factors from U(1-s, 1+s), in random order (paper: 0.4, before the crop)."""

  strength: float

  def __call__(self, record: Record, rng: Rng) -> Record:
    image = record['image']
    for i in rng.permutation(3):
      enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
      image = enhance(image).enhance(rng.uniform(1 - self.strength, 1 + self.strength))
    return record | dict(image=image)


@dataclasses.dataclass(frozen=True)
class Flip:
  """Left-right with probability 1/2."""

  def __call__(self, record: Record, rng: Rng) -> Record:
    if rng.random() < 0.5:
      record = record | dict(image=record['image'].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return record


def random_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: Rng):
  """The crop box (left, top, width, height) of torchvision's RandomResizedCrop: ten tries, then the centre."""
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
  w, h = width, height
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A box of area U(scale) and log-uniform aspect, resized to size x size."""

  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)

  def __call__(self, record: Record, rng: Rng) -> Record:
    image = record['image']
    left, top, w, h = random_box(*image.size, self.scale, self.ratio, rng)
    image = image.crop((left, top, left + w, top + h)).resize((self.size, self.size), Image.Resampling.BICUBIC)
    return record | dict(image=image)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """Shorter side to int(size / crop_pct), then the central size x size."""

  size: int
  crop_pct: float = 0.875

  def __call__(self, record: Record, rng: Rng) -> Record:
    image = record['image']
    short = int(self.size / self.crop_pct)
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((w - self.size) / 2), round((h - self.size) / 2)
    return record | dict(image=image.crop((left, top, left + self.size, top + self.size)))


@dataclasses.dataclass(frozen=True)
class ToArray:
  """PIL → uint8 [h, w, 3]."""

  def __call__(self, record: Record, rng: Rng) -> Record:
    return record | dict(image=np.asarray(record['image'], np.uint8))


def image_transforms(data, train: bool, jitter: float = 0.0) -> list:
  """The standard list for a config's `data` section: [jitter], [flip], random crop; or resize and centre crop."""
  if not train:
    return [CenterCrop(data.image_size, data.crop_pct), ToArray()]
  return [
    *([ColorJitter(jitter)] if jitter else []),
    *([Flip()] if data.flip else []),
    RandomResizedCrop(data.image_size, tuple(data.crop_scale), tuple(data.crop_ratio)),
    ToArray(),
  ]
