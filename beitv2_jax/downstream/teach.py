"""A teacher's features of all images, written once, for tokenizers that learn from files (data/taught.py)."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, taught, transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models.images import unit_images
from beitv2_jax.progress import bar
from beitv2_jax.tasks import teachers


def write(config: Any, sources: dict[str, Any], out: Path, batch: int = 64) -> dict[str, int]:
  """Features of the centre crop of each image, on the patch grid of the tokenizer's `config`; returns {split: images}.

  An image that does not decode has those of the next one, as training takes that for it. Raises UserError.
  """
  if any(hasattr(source, 'mask_names') for source in sources.values()):
    raise UserError('these are images with masks: give --data folder:PATH of the images alone.')
  teacher, frozen = teachers.opened(config, 'float32')
  apply = jax.jit(lambda frozen, images: teacher.apply(frozen, unit_images(images)).astype(jnp.bfloat16))
  size = config_lib.image_shape(config)[:2]
  steps = [transforms.CenterCrop(size, config.data.crop_pct)]
  out.mkdir(parents=True, exist_ok=True)
  (out / taught.NAME).unlink(missing_ok=True)  # while the files are not whole
  splits = {}
  for split, source in sources.items():
    rows = pipeline.eval_batches(source, steps, seed=0, batch=batch, reading=config_lib.reading(config), max_bad=config.data.max_bad)
    left = len(source)
    with (out / f'{split}.bf16').open('wb') as file:
      for part in bar(rows, 'batches', math.ceil(len(source) / batch), f'features of {len(source):,} {split} images'):
        count = min(left, batch)
        file.write(np.asarray(apply(frozen, part['image']))[:count].tobytes())
        left -= count
    splits[split] = dict(images=len(source), fingerprint=taught.fingerprint(source))
  about = dict(
    teacher=dict(kind=config.teacher.kind, name=str(config.teacher.name), layers=list(config.teacher.get('layers', ()))),
    grid=list(config_lib.patch_grid(config)), image_size=list(size), width=teacher.width, source=config.data.source, splits=splits,
    crop_pct=config.data.crop_pct,
  )  # fmt: skip
  (out / taught.NAME).write_text(json.dumps(about, indent=2) + '\n')
  return {split: len(source) for split, source in sources.items()}
