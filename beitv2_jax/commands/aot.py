"""What a TPU slice would do with a recipe's training step, by XLA's own TPU compiler, on a machine that has none.

  python -m beitv2_jax aot --config=configs/beitv2_l16.py --topology=v5e:8x8
  python -m beitv2_jax aot --config=configs/beitv2_b16.py --topology=v5e:2x2 --part=student --config.batch_size=128

Needs libtpu: pip install 'beitv2_jax[aot]'. It says bytes a chip, operations, the compiler's estimate of its time, collectives, the
dearest operations, and what to change if it does not fit. All times are compiler estimates, not measurements.
"""

import os
from pathlib import Path

from beitv2_jax.commands import arguments


@arguments.command
def main(argv: list[str] | None = None) -> int:
  parser = arguments.parser('aot', __doc__)
  parser.add_argument('--config', metavar='FILE', help='the recipe; --config.KEY=VALUE changes a field', dest='config', default=None)
  parser.add_argument(
    '--topology', default='v5e:2x2', help='chips: v4, v5e, v5p, v6e or tpu7x, a colon and the slice, as v5e:16x16 or v4:2x2x2'
  )
  parser.add_argument(
    '--part',
    choices=('step', 'student', 'frozen', 'init'),
    default='step',
    help='the whole step, without the frozen models, those alone, or the initialisation',
  )
  arguments.add_json(parser)
  parser.add_argument('--hlo', type=Path, metavar='FILE', help='also write the compiled program there, as text')
  parser.add_argument('--top', type=arguments.at_least(0), default=12, help='how many of the dearest operations to show (12)')
  args, left = parser.parse_known_args(argv)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from beitv2_jax import recipes
  from beitv2_jax.costs import estimate

  config = recipes.from_arguments([*([f'--config={args.config}'] if args.config else []), *left])
  result = estimate.report(config, args.topology, args.part, args.hlo)
  print(estimate.show(result, args.top))
  fits = result['memory']['fits']
  if not fits:
    print('\n' + estimate.advice(config, result))
  arguments.write_json(args.json, result)
  return 0 if fits else 1
