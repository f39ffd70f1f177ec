"""How many images a second this host prepares for training, and which accelerators that would feed.

  python -m beitv2_jax bench --config=configs/beitv2_b16.py --data folder:PATH

Each stage is timed on one core, then the pipeline as training would run it.
"""

from beitv2_jax.commands import arguments


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('bench', __doc__)
  parser.add_argument('--config', metavar='FILE', help='the recipe; --config.KEY=VALUE changes a field', default=None)
  arguments.add_data(parser, f"images, instead of the recipe's: {arguments.SOURCE}")
  parser.add_argument('--images', type=arguments.at_least(64), default=512, help='how many to time (512)')
  args, left = parser.parse_known_args(argv)
  from beitv2_jax import recipes
  from beitv2_jax.costs import input_rate

  given = [f'--config={args.config}'] if args.config else []
  given += [f'--config.data.source={args.data}'] if args.data else []
  given += [f'--config.data.dir={args.data_dir}'] if args.data_dir else []
  print(input_rate.report(recipes.from_arguments(given + left), args.images))
