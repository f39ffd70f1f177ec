"""Classes, or masks, of images.

  python -m beitv2_jax predict --from runs/b16_ft photos/
  python -m beitv2_jax predict --from runs/b16_ade photos/ --out masks

A classifier gives the best classes of each image with their probabilities, as JSON lines or into --json FILE. A segmenter writes
NAME_mask.png (class numbers) and NAME_overlay.png into --out, and the share of every class in an image as JSON.
"""

import json
from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('predict', __doc__)
  arguments.add_from(parser, f'a classifier or segmenter: {arguments.MODEL}')
  arguments.add_images(parser)
  arguments.add_out(parser, 'folder for masks and overlays', Path('runs/predictions'))
  arguments.add_json(parser)
  arguments.add_batch(parser, 32)
  parser.add_argument('--top', type=arguments.at_least(1), default=5, help='classes an image (5)')
  parser.add_argument(
    '--crop-pct', type=float, help='share of the shorter side that a classifier looks at (as it was evaluated in training)'
  )
  parser.add_argument('--mode', choices=('slide', 'whole'), default='slide', help='how a segmenter looks at a large image (slide)')
  parser.add_argument('--flip', action='store_true', help='average a mask with that of the mirrored image')
  args = parser.parse_args(argv)
  if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
    raise UserError(f'--crop-pct {args.crop_pct}: above 0 and at most 1.')
  from beitv2_jax.downstream import image_files, predictions, trained
  from beitv2_jax.training import process

  process.use_compilation_cache()
  model, paths = trained.load(args.source), image_files.find_images(args.images)
  if model.kind == 'classifier':
    results = predictions.classes(model, paths, args.top, args.crop_pct, args.batch)
  elif model.kind == 'segmenter':
    results = predictions.masks(model, paths, args.out.expanduser(), args.mode, args.flip)
  else:
    raise UserError(f'a {model.kind} model predicts neither classes nor masks; give a classifier or a segmenter.')
  if args.json:
    results = list(results)
    arguments.write_json(args.json, results)
    return print(f'wrote {len(results)} results to {args.json}')
  for result in results:
    print(json.dumps(result), flush=True)
