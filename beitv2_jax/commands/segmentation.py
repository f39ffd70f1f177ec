"""Exact scores of a segmenter: mIoU, mean class accuracy, pixel accuracy, at the images' own size.

  python -m beitv2_jax segmentation --from runs/b16_ade
  python -m beitv2_jax segmentation --from runs/b16_ade --data scenes:PATH --flip --scales 0.5 0.75 1 1.25 1.5 1.75

The second is the official multi-scale test. Windows slide over an image as they did in training.
"""

import sys

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('segmentation', __doc__)
  arguments.add_from(parser, f'a segmenter: {arguments.MODEL}')
  arguments.add_data(parser, 'scenes:PATH, images with masks; by default what it was trained on')
  arguments.add_json(parser)
  parser.add_argument(
    '--mode', choices=('slide', 'whole'), default='slide', help='windows over the image, or the image made to fit (slide)'
  )
  parser.add_argument(
    '--scales',
    type=float,
    nargs='+',
    default=[1.0],
    help='sizes to average over (1); the official test is in the example. In windows, less than 1 counts as 1',
  )
  parser.add_argument('--flip', action='store_true', help='average with the mirrored image')
  parser.add_argument('--reduce-zero', action='store_true', help='mask value 0 is no class, 1 is class 0 (ADE20K), for imported models')
  args = parser.parse_args(argv)
  if min(args.scales) <= 0:
    raise UserError('--scales: numbers above 0.')
  import numpy as np

  from beitv2_jax.data import sources
  from beitv2_jax.downstream import segmentation, trained
  from beitv2_jax.downstream.classes import model_classes
  from beitv2_jax.downstream.features import FEW
  from beitv2_jax.training import process

  process.use_compilation_cache()
  model = trained.load(args.source)
  segmentation.check_segmenter(model, args.source)
  config = model.config
  if not (args.data or config.data.source.startswith('scenes:')):
    raise UserError('give --data scenes:PATH.')
  source = sources.make(args.data or config.data.source, 'eval', args.data_dir, holdout=config.data.holdout)
  labels = segmentation.labels_of(config, args.reduce_zero)
  result = segmentation.evaluate(model, source, labels, mode=args.mode, scales=args.scales, flip=args.flip)
  names = model_classes(config)
  for name, iou in zip(names, result['iou']):
    print(f'{name:24s} IoU {iou:6.2f}' if np.isfinite(iou) else f'{name:24s} IoU  nowhere')
  print(f'mIoU {result["miou"]:.2f}  mAcc {result["macc"]:.2f}  aAcc {result["aacc"]:.2f}  of {result["images"]:,} images')
  arguments.write_json(args.json, result | dict(iou=dict(zip(names, result['iou'].tolist()))))
  if result['images'] < FEW:
    print(f'warning: only {result["images"]} images were scored: the figures say little.', file=sys.stderr)
