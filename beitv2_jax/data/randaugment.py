"""RandAugment as fine-tuning uses it, `rand-m9-mstd0.5-inc1` of timm: two operations, each applied half of the time."""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # ImageNet's mean
Rng = np.random.Generator


def _affine(image: Image.Image, matrix: tuple) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
  return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * 3)


def _enhance(kind: type) -> Callable:
  return lambda image, m, sign: kind(image).enhance(1 + sign * 0.09 * m)


# (image, magnitude in [0, 10], sign ±1) → image
OPERATIONS: dict[str, Callable] = {
  'AutoContrast': lambda x, m, s: ImageOps.autocontrast(x),
  'Equalize': lambda x, m, s: ImageOps.equalize(x),
  'Invert': lambda x, m, s: ImageOps.invert(x),
  'Rotate': lambda x, m, s: x.rotate(s * 3 * m, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
  'Posterize': lambda x, m, s: x.point([v & -(1 << (4 + int(0.4 * m))) for v in range(256)] * 3),
  'Solarize': lambda x, m, s: ImageOps.solarize(x, 256 - int(25.6 * m)),
  'SolarizeAdd': lambda x, m, s: _solarize_add(x, min(128, int(11 * m))),
  'Color': _enhance(ImageEnhance.Color),
  'Contrast': _enhance(ImageEnhance.Contrast),
  'Brightness': _enhance(ImageEnhance.Brightness),
  'Sharpness': _enhance(ImageEnhance.Sharpness),
  'ShearX': lambda x, m, s: _affine(x, (1, s * 0.03 * m, 0, 0, 1, 0)),
  'ShearY': lambda x, m, s: _affine(x, (1, 0, 0, s * 0.03 * m, 1, 0)),
  'TranslateXRel': lambda x, m, s: _affine(x, (1, 0, s * 0.045 * m * x.size[0], 0, 1, 0)),
  'TranslateYRel': lambda x, m, s: _affine(x, (1, 0, 0, 0, 1, s * 0.045 * m * x.size[1])),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """`count` operations drawn with replacement, each applied with `probability` at a magnitude N(magnitude, std²) cut to [0, 10]."""

  magnitude: float = 9.0
  std: float = 0.5
  count: int = 2
  probability: float = 0.5

  def __call__(self, record: dict, rng: Rng) -> dict:
    drawn = [number for number in rng.integers(len(OPERATIONS), size=self.count) if rng.random() < self.probability]
    if not drawn:
      return record
    image = Image.fromarray(np.ascontiguousarray(record['image']))
    for number in drawn:
      magnitude = min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0)
      image = list(OPERATIONS.values())[number](image, magnitude, 1 if rng.random() < 0.5 else -1)
    return record | dict(image=np.asarray(image))
