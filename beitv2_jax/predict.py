"""python -m beitv2_jax.predict --from DIR IMAGE-OR-FOLDER ...: classes, or masks, of images.

A classifier gives the best classes of each image with their probabilities, as JSON lines or into --json FILE. A segmenter writes
NAME_mask.png (class numbers) and NAME_overlay.png into --out, and the share of every class in an image as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from beitv2_jax.errors import UserError, one_line
from beitv2_jax.robustness import model_classes


def classes(model: Any, paths: list[Path], top: int = 5, crop_pct: float = 0.875, batch: int = 32):
  """Yields dict(file, classes=[(name, probability), ...]) of every image that decodes."""
  from beitv2_jax import api
  from beitv2_jax.tokenize import prepared

  names = model_classes(model.config)
  for files, images in prepared(paths, model.config.data.image_size, batch, crop_pct):
    probabilities = np.asarray(jax.nn.softmax(api.in_batches(model.logits, images, batch=batch)))
    for file, p in zip(files, probabilities):
      best = np.argsort(-p, kind='stable')[:top]
      yield dict(file=str(file), classes=[dict(name=names[i], probability=round(float(p[i]), 5)) for i in best])


def palette(count: int) -> np.ndarray:
  """uint8 [count, 3]: colours that differ in hue and lightness."""
  hues = (np.arange(count) * 0.61803399) % 1
  hsv = np.stack([hues * 255, np.full(count, 200), 140 + 115 * (np.arange(count) % 3) / 2], -1).astype(np.uint8)
  return np.array(Image.fromarray(hsv[None], 'HSV').convert('RGB'))[0]


def masks(model: Any, paths: list[Path], out: Path, mode: str = 'slide', flip: bool = False):
  """Writes mask and overlay of every image that decodes; yields dict(file, mask, overlay, classes={name: share in %})."""
  from beitv2_jax import config as config_lib
  from beitv2_jax import segmentation
  from beitv2_jax.data import transforms

  names, colours = model_classes(model.config), palette(model.config.model.classes)
  out.mkdir(parents=True, exist_ok=True)
  for path in paths:
    try:
      image = transforms.decode(path.read_bytes())
    except transforms.UNDECODABLE as e:
      print(f'warning: {path} does not decode ({type(e).__name__}); left out.', file=sys.stderr)
      continue
    best = segmentation.predict(model.logits, image, config_lib.image_shape(model.config)[:2], mode=mode, flip=flip)
    files = [out / f'{path.stem}_{what}.png' for what in ('mask', 'overlay')]
    Image.fromarray(best.astype(np.uint8)).save(files[0])
    Image.fromarray((0.5 * image + 0.5 * colours[best]).astype(np.uint8)).save(files[1])
    share = 100 * np.bincount(best.ravel(), minlength=len(names)) / best.size
    yield dict(
      file=str(path),
      mask=str(files[0]),
      overlay=str(files[1]),
      classes={names[i]: round(float(share[i]), 2) for i in np.argsort(-share) if share[i]},
    )


@one_line
def main(argv: list[str] | None = None) -> None:
  from beitv2_jax import api
  from beitv2_jax.main import use_compilation_cache
  from beitv2_jax.tokenize import find_images

  parser = argparse.ArgumentParser(
    prog='python -m beitv2_jax.predict', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('paths', nargs='+', help='images, or folders of images')
  parser.add_argument('--from', dest='source', required=True, help='workdir of a classifier or segmenter, or an imported one')
  parser.add_argument('--json', type=Path, help='write the results there instead of printing them')
  parser.add_argument('--top', type=int, default=5, help='classes an image')
  parser.add_argument('--crop-pct', type=float, default=0.875)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--out', type=Path, default=Path('runs/predictions'), help='folder for masks and overlays (runs/predictions)')
  parser.add_argument('--mode', choices=('slide', 'whole'), default='slide')
  parser.add_argument('--flip', action='store_true', help='average with the mirrored image')
  args = parser.parse_args(argv)
  if args.batch < 1 or args.top < 1 or not 0 < args.crop_pct <= 1:
    raise UserError('--batch and --top must be at least 1, --crop-pct in (0, 1].')
  use_compilation_cache()
  model, paths = api.load(args.source), find_images(args.paths)
  if model.kind == 'classifier':
    results = classes(model, paths, args.top, args.crop_pct, args.batch)
  elif model.kind == 'segmenter':
    results = masks(model, paths, args.out, args.mode, args.flip)
  else:
    raise UserError(f'a {model.kind} model predicts neither classes nor masks; give a classifier or a segmenter.')
  if args.json:
    results = list(results)
    args.json.write_text(json.dumps(results, indent=1))
    return print(f'wrote {len(results)} results to {args.json}')
  for result in results:
    print(json.dumps(result))


if __name__ == '__main__':
  sys.exit(main())
