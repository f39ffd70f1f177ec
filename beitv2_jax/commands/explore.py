"""An explorer of a tokenizer's codebook: a page that opens from disk.

  python -m beitv2_jax explore --from runs/vqkd_b16 --data folder:PATH --out explorer
  python -m beitv2_jax explore --from runs/vqkd_b16 --compare runs/other --data folder:PATH --out explorer
  python -m beitv2_jax explore --from runs/vqkd_b16 --out explorer --add photo.jpg

Every code with its most typical patches, where it occurs, its neighbours and its classes; codes, attention and features over images; a map
of the codebook; and how two tokenizers compare. --pixels adds what a pixel decoder draws for each code. --add puts images of your own into
an explorer that was made before, to be looked at; the figures of the codes stay as they are. Needs scikit-learn:
pip install 'beitv2_jax[explore]'.
"""

import time
from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('explore', __doc__)
  arguments.add_from(parser, f'the tokenizer: {arguments.MODEL}')
  arguments.add_data(parser)
  arguments.add_out(parser, 'folder of the explorer', Path('explorer'))
  parser.add_argument('--compare', metavar='DIR', help='another tokenizer, or another step of the same one, on the same images')
  parser.add_argument(
    '--pixels', metavar='DIR', help='a pixel decoder of the tokenizer (configs/pixels_b16.py): draws the face of each code'
  )
  parser.add_argument('--features-from', metavar='DIR', help='whose attention and features are shown over images (the tokenizer)')
  parser.add_argument('--add', nargs='+', metavar='IMAGE', help='image files, or folders of them, to put into the explorer in --out')
  parser.add_argument('--split', choices=('all', 'train', 'eval'), default='all', help='which images of the source (all)')
  parser.add_argument(
    '--limit', type=arguments.at_least(1), default=10_000, metavar='N', help='images looked through, evenly spread (10000)'
  )
  parser.add_argument(
    '--shown', type=arguments.at_least(1), default=1000, metavar='N', help='images that can be opened, evenly spread (1000)'
  )
  arguments.add_batch(parser, 32)
  args = parser.parse_args(argv)
  if bool(args.data) == bool(args.add):
    raise UserError('give --data SOURCE to make an explorer, or --add IMAGE to put images into one.')
  try:
    import sklearn  # noqa: F401
  except ImportError as e:
    raise UserError("the map of the codebook needs scikit-learn: pip install 'beitv2_jax[explore]'.") from e
  from beitv2_jax.pictures import explorer, explorer_files
  from beitv2_jax.training import process

  process.use_compilation_cache()
  began, out = time.monotonic(), args.out.expanduser()
  source = explorer.Images.of(args.data, args.split, args.data_dir, args.limit) if args.data else None
  models = explorer.Models.load(args.source, args.compare, args.pixels, args.features_from)
  if source is None:
    print(explorer.add(models, out, args.add, args.batch))
    return
  page = explorer.build(models, source, out, args.shown, args.batch)
  size = explorer_files.size_on_disk(out) / 1e6
  print(f'{page}: {len(source):,} images, {size:.1f} MB, made in {time.monotonic() - began:.0f} s. Open it in a browser.')
