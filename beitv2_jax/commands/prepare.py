"""Images into array_record shards: a few large files, for buckets and slow disks. No TensorFlow is needed.

  python -m beitv2_jax prepare imagenet2012 --from TARS --out DATA          TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
  python -m beitv2_jax prepare folder:PATH --out DATA --name mine           any source: list:FILE, parquet:PATH, ... (docs/data.md)

DATA is what --config.data.dir will be. The same command goes on after a stop; counts and checksums of all shards are verified.
"""

import re
import signal
from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError
from beitv2_jax.training import child


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('prepare', __doc__)
  parser.add_argument('dataset', metavar='SOURCE', help='imagenet2012, or where images come from')
  parser.add_argument('--from', '--tars', dest='tars', metavar='DIR', type=Path, help='directory of the two tars of imagenet2012')
  parser.add_argument('--name', default='images', help='what the data set will be called (images)')
  parser.add_argument('--holdout', type=float, default=0.1, help='share for evaluation, of a source that has no such part (0.1)')
  parser.add_argument(
    '--data-dir', default='', metavar='DIR', help='where tfds keeps prepared data sets, or where the paths of a list begin'
  )
  arguments.add_out(parser, 'what --config.data.dir will be')
  parser.add_argument('--short-side', type=arguments.at_least(0), default=0, help='store smaller images; 0 keeps the original bytes')
  parser.add_argument('--workers', type=arguments.at_least(0), default=0, help='processes; 0: one a core')
  parser.add_argument('--partial', action='store_true', help='take tars with another number of images than ImageNet-1k')
  args = parser.parse_args(argv)
  if not args.out:
    raise UserError('give --out DIR: where the shards go, and what --config.data.dir will be.')

  signal.signal(signal.SIGTERM, child.interrupt)  # so that the worker processes end too
  from beitv2_jax.data import prepare

  out = args.out.expanduser()
  if args.dataset == 'imagenet2012':
    if not args.tars:
      raise UserError('give --from DIR: the directory of the two tars.')
    folder = prepare.prepare_imagenet(args.tars.expanduser(), out, args.short_side, args.workers, args.partial)
  elif not re.fullmatch(r'[a-z][a-z0-9_]*', args.name):
    raise UserError(f'--name {args.name}: small letters, digits and _, beginning with a letter, as TFDS wants it.')
  else:
    folder = prepare.prepare_source(args.dataset, out, args.name, args.short_side, args.workers, args.data_dir, args.holdout)
  print(f'wrote {folder}. Use it with --config.data.source=tfds:{folder.parent.name} --config.data.dir={folder.parent.parent}')
