"""Official, timm and Hugging Face checkpoints in and out.

  python -m beitv2_jax convert import --kind tokenizer --from vqkd.pth --out DIR [--list]
  python -m beitv2_jax convert export --from DIR --to-format timm --out model.safetensors

DIR is what every stage takes as tokenizer_from or init_from, and `beitv2_jax.load` opens. (--to is another name of --out.)
"""

import argparse

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError

# The tables of weights/official.py, without importing JAX for --help; tests/test_commands.py holds them together.
KINDS = ('tokenizer', 'pretrain', 'classifier', 'segmenter')


def _grid(text: str) -> tuple[int, int]:
  h, _, w = text.partition('x')
  if not (h.isdigit() and w.isdigit()):
    raise argparse.ArgumentTypeError(f'{text}: rows x columns of patches, such as 14x14')
  return int(h), int(w)


def _indices(text: str) -> tuple[int, ...]:
  if not all(i.isdigit() for i in text.split(',')):
    raise argparse.ArgumentTypeError(f'{text}: block numbers from 0, such as 3,5,7,11')
  return tuple(int(i) for i in text.split(','))


def _parser():
  parser = arguments.parser('convert', __doc__)
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='{import,export}')
  imp = verbs.add_parser(
    'import', help='an official file → a directory', epilog='python -m beitv2_jax convert import --kind tokenizer --from vqkd.pth --out DIR'
  )
  imp.add_argument('--kind', required=True, choices=KINDS)
  arguments.add_from(imp, 'a .pth or .safetensors file')
  imp.add_argument('--out', '--to', dest='out', metavar='DIR', help='the directory to make')
  imp.add_argument('--list', action='store_true', help='only print every key, its shape and where it goes')
  imp.add_argument('--num-heads', type=int, help='where no bias table and no config.json tells; default width/64')
  imp.add_argument('--decoder-num-heads', type=int, help='the same for the decoder of a tokenizer')
  imp.add_argument('--grid', type=_grid, help='HxW patches, where they are not a square')
  imp.add_argument('--early-layer', type=int, help='block whose patches the aggregation reads; default depth-3, as in the official models')
  imp.add_argument(
    '--out-indices',
    type=_indices,
    help='blocks a segmenter reads, from 0; default what our export says, 3,5,7,11 of 12 or 7,11,15,23 of 24',
  )
  exp = verbs.add_parser(
    'export',
    help='a directory → official, timm or Hugging Face files',
    epilog='python -m beitv2_jax convert export --from DIR --to-format timm --out model.safetensors',
  )
  arguments.add_from(exp)
  exp.add_argument('--out', '--to', dest='out', metavar='PATH', required=True, help='a .safetensors file, or for hf a directory')
  exp.add_argument('--ema', action='store_true', help='the running average of the weights, of a run with ema_decay')
  exp.add_argument('--to-format', required=True, choices=('official', 'timm', 'hf'))
  return parser


@arguments.command
def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  from beitv2_jax.weights import convert

  if args.verb == 'export':
    convert.export_checkpoint(args.source, args.out, args.to_format, args.ema)
  elif args.list:
    return print(convert.list_keys(args.kind, args.source))
  elif not args.out:
    raise UserError('give --out DIR, or --list to look first.')
  else:
    given = dict(
      heads=args.num_heads, decoder_heads=args.decoder_num_heads, grid=args.grid, early=args.early_layer, out_indices=args.out_indices
    )
    print(convert.import_checkpoint(args.kind, args.source, args.out, **given))
  print(f'wrote {args.out}')
