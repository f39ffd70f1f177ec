"""ImageNet-1k from its tars into array_record shards, the format that training reads. No TensorFlow is needed.

  python -m beitv2_jax prepare imagenet2012 --from TARS --out DATA

TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; DATA is what --config.data.dir will be. The same command goes on
after a stop.
"""

import signal
from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('prepare', __doc__)
  parser.add_argument('dataset', choices=['imagenet2012'])
  parser.add_argument('--from', '--tars', dest='tars', metavar='DIR', type=Path, required=True, help='directory of the two tars')
  arguments.add_out(parser, 'what --config.data.dir will be')
  parser.add_argument('--short-side', type=arguments.at_least(0), default=0, help='store smaller images; 0 keeps the original bytes')
  parser.add_argument('--workers', type=arguments.at_least(0), default=0, help='processes; 0: one a core')
  parser.add_argument('--partial', action='store_true', help='take tars with another number of images than ImageNet-1k')
  args = parser.parse_args(argv)
  if not args.out:
    raise UserError('give --out DIR: where the shards go, and what --config.data.dir will be.')

  def stop(*_):
    raise KeyboardInterrupt  # as for Ctrl-C, so that the worker processes end too

  signal.signal(signal.SIGTERM, stop)
  from beitv2_jax.data.prepare import prepare

  folder = prepare(args.tars.expanduser(), args.out.expanduser(), args.short_side, args.workers, args.partial)
  print(f'wrote {folder}. Use it with --config.data.source=tfds:{folder.parent.name} --config.data.dir={folder.parent.parent}')
