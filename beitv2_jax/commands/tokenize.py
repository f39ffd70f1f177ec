"""The codes of images, printed or saved.

  python -m beitv2_jax tokenize --from runs/vqkd_b16 photos/ --out codes.npz

--out takes .npz (`files`, `codes` [n, Gh, Gw]) or .parquet (`file`, `codes` as a flat list, row by row).
"""

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('tokenize', __doc__)
  arguments.add_from(parser, f'the tokenizer: {arguments.MODEL}')
  arguments.add_images(parser)
  arguments.add_out(parser, 'a .npz or .parquet file, instead of printing')
  arguments.add_json(parser)
  arguments.add_batch(parser, 32)
  args = parser.parse_args(argv)
  if args.out and args.out.suffix not in ('.npz', '.parquet'):
    raise UserError(f'--out {args.out}: give a name that ends in .npz or .parquet.')
  if args.out and not args.out.expanduser().absolute().parent.is_dir():
    raise UserError(f'--out {args.out}: there is no such folder.')
  from beitv2_jax.downstream import codes, image_files, trained
  from beitv2_jax.training import process

  process.use_compilation_cache()
  names, grids = codes.tokenize(trained.load(args.source), image_files.find_images(args.images), args.batch)
  arguments.write_json(args.json, [dict(file=str(name), codes=grid.tolist()) for name, grid in zip(names, grids)] if args.json else None)
  if args.out:
    codes.save(args.out.expanduser(), names, grids)
    print(f'wrote {len(names)} x {grids.shape[1]} x {grids.shape[2]} codes to {args.out}')
  elif not args.json:
    for name, grid in zip(names, grids):
      print(name)
      print('\n'.join(' '.join(f'{c:4d}' for c in row) for row in grid))
