"""What a model says of single images: the best classes, or a mask drawn over them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.downstream import segmentation, trained
from beitv2_jax.downstream.classes import model_classes
from beitv2_jax.downstream.image_files import decoded, prepared


def classes(model: Any, paths: list[Path], top: int = 5, crop_pct: float | None = None, batch: int = 32) -> Iterator[dict]:
  """Yields dict(file, classes=[(name, probability), ...]) of every image that decodes."""
  names = model_classes(model.config)
  how = config_lib.preparation(model.config) | (dict(crop_pct=crop_pct) if crop_pct else {})
  for files, images in prepared(paths, model.config.data.image_size, batch, **how):
    probabilities = np.asarray(jax.nn.softmax(trained.in_batches(model.logits, images, batch=batch)))
    for file, p in zip(files, probabilities):
      best = np.argsort(-p, kind='stable')[:top]
      yield dict(file=str(file), classes=[dict(name=names[i], probability=round(float(p[i]), 5)) for i in best])


def palette(count: int) -> np.ndarray:
  """uint8 [count, 3]: colours that differ in hue and lightness."""
  hues = (np.arange(count) * 0.61803399) % 1
  hsv = np.stack([hues * 255, np.full(count, 200), 140 + 115 * (np.arange(count) % 3) / 2], -1).astype(np.uint8)
  return np.array(Image.fromarray(hsv[None], 'HSV').convert('RGB'))[0]


def masks(model: Any, paths: list[Path], out: Path, mode: str = 'slide', flip: bool = False) -> Iterator[dict]:
  """Writes mask and overlay of every image that decodes; yields dict(file, mask, overlay, classes={name: share in %})."""
  names, colours = model_classes(model.config), palette(model.config.model.classes)
  out.mkdir(parents=True, exist_ok=True)
  parent = lambda path: Path(os.path.abspath(path)).parent  # without .., which would lead out of `out`
  above = os.path.commonpath([parent(path) for path in paths])  # its folders are mirrored below `out`
  number = np.uint8 if len(names) <= 256 else np.uint16
  taken: set[Path] = set()
  for path, image in decoded(paths, **config_lib.reading(model.config)):
    best = segmentation.predict(model.logits, image, config_lib.image_shape(model.config)[:2], mode=mode, flip=flip)
    folder = out / parent(path).relative_to(above)
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / path.stem if folder / path.stem not in taken else folder / path.name.replace('.', '_')  # view.png beside view.jpg
    taken.add(plain)
    files = [plain.with_name(f'{plain.name}_{what}.png') for what in ('mask', 'overlay')]
    Image.fromarray(best.astype(number)).save(files[0])
    Image.fromarray((0.5 * image + 0.5 * colours[best]).astype(np.uint8)).save(files[1])
    share = 100 * np.bincount(best.ravel(), minlength=len(names)) / best.size
    yield dict(
      file=str(path),
      mask=str(files[0]),
      overlay=str(files[1]),
      classes={names[i]: round(float(share[i]), 2) for i in np.argsort(-share) if share[i]},
    )
