"""A teacher's features of all images, written once: a tokenizer then learns from them without the teacher.

  python -m beitv2_jax teach --config=configs/vqkd_b16.py:teacher=dinov2 --data folder:PATH --out features
  python -m beitv2_jax.main --config=configs/vqkd_b16.py --workdir=runs/vqkd --config.data.source=folder:PATH \
      --config.teacher.kind=disk --config.teacher.name=features

They are of the centre crop of each image, so training takes that too, without random crops and flips. 1,000 images of a base teacher at 224 px
take 300 MB (768 wide). Any program that writes such a folder will do: see beitv2_jax/data/taught.py.
"""

from pathlib import Path

from beitv2_jax.commands import arguments


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('teach', __doc__)
  parser.add_argument(
    '--config', required=True, metavar='FILE', help='the recipe of the tokenizer; its teacher, patch grid and image size count'
  )
  parser.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='settings of it, such as teacher.name=DIR')
  arguments.add_data(parser, required=True)
  arguments.add_out(parser, 'folder of the features', Path('features'))
  arguments.add_batch(parser, 64)
  args = parser.parse_args(argv)
  import beitv2_jax
  from beitv2_jax import config as config_lib
  from beitv2_jax.data import sources
  from beitv2_jax.downstream import teach
  from beitv2_jax.errors import UserError
  from beitv2_jax.training import process

  settings = {'data.source': args.data, 'data.dir': args.data_dir} | arguments.settings(args.set)
  config = beitv2_jax.recipe(args.config, settings).unlock()
  if config.task != 'tokenizer' or config.teacher.kind == 'disk':
    raise UserError('--config: give the recipe of a tokenizer, with the teacher that is to be asked.')
  config.mesh.data = -1
  config_lib.check(config.lock())
  process.use_compilation_cache()
  opened = {split: sources.make(args.data, split, args.data_dir, config.data.holdout) for split in ('train', 'eval')}
  counts = teach.write(config, opened, args.out.expanduser(), args.batch)
  size = sum(p.stat().st_size for p in args.out.expanduser().glob('*.bf16'))
  print(f'wrote features of {counts["train"]:,} training and {counts["eval"]:,} evaluation images to {args.out}, {size / 1e6:,.1f} MB')
