"""Where a model looks, and what its features say: a picture for each image.

  python -m beitv2_jax attention --from runs/b16 photos/ --out pictures --patch 6,7

Each picture shows the patch features coloured by their first three principal components (over all the images; --one-by-one: over each),
what the patch and [CLS] attend to, averaged over heads and head by head, and which patches are similar to the patch. --size takes other
image sizes than the model's; its position tables are resampled.
"""

import argparse
from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('attention', __doc__)
  arguments.add_from(parser)
  arguments.add_images(parser)
  arguments.add_out(parser, 'folder of the pictures', Path('attention'))
  parser.add_argument(
    '--patch', type=row_and_column, metavar='ROW,COLUMN', help='the patch that asks, counted from 0; without it [CLS] alone'
  )
  parser.add_argument('--block', type=arguments.at_least(0), default=0, help='block whose attention is drawn, from 1 (0: the last)')
  parser.add_argument('--size', type=arguments.at_least(1), help="side of the images in pixels (the model's own)")
  parser.add_argument('--one-by-one', action='store_true', help='principal components of each image alone')
  arguments.add_batch(parser, 16)
  args = parser.parse_args(argv)
  import numpy as np

  from beitv2_jax import config as config_lib
  from beitv2_jax.downstream import image_files, trained
  from beitv2_jax.pictures import attention
  from beitv2_jax.training import process

  process.use_compilation_cache()
  model = trained.load(args.source)
  model = model.at_size(args.size) if args.size else model
  h, w, _ = config_lib.image_shape(model.config)
  if h != w:
    raise UserError(f'the model takes {h} x {w} images; only square ones are prepared here: give --size, or use model.attention(images).')
  if args.patch and not (args.patch[0] < model.grid[0] and args.patch[1] < model.grid[1]):
    raise UserError(
      f'--patch {args.patch[0]},{args.patch[1]}: this model has rows 0 to {model.grid[0] - 1}, columns 0 to {model.grid[1] - 1}.'
    )
  out = args.out.expanduser()
  out.mkdir(parents=True, exist_ok=True)
  names, images, maps, features = [], [], [], []
  files = image_files.find_images(args.images)
  for part, prepared in image_files.prepared(files, h, args.batch, **config_lib.preparation(model.config)):
    names, images = names + part, [*images, prepared]
    maps.append(trained.in_batches(lambda x: model.attention(x, args.block), prepared, batch=min(args.batch, len(prepared))))
    features.append(trained.in_batches(model.features, prepared, batch=min(args.batch, len(prepared)))['patches'])
  if not names:
    raise UserError('none of the images decodes.')
  grids = np.concatenate(features).reshape(len(names), *model.grid, -1)
  pictures = attention.sheets(np.concatenate(images), np.concatenate(maps), grids, args.patch, args.one_by_one)
  for number, (name, picture) in enumerate(zip(names, pictures)):
    picture.save(out / f'{number:04d}_{name.stem}.png')
  print(f'wrote {len(pictures)} pictures to {args.out}')


def row_and_column(text: str) -> tuple[int, int]:
  parts = text.split(',')
  if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
    raise argparse.ArgumentTypeError(f'{text}: a row and a column, such as 6,7')
  return int(parts[0]), int(parts[1])
