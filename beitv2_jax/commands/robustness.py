"""A classifier on other test sets: ImageNet-A, -R, -Sketch, -V2, ReaL, or sets of your own.

  python -m beitv2_jax robustness --from runs/b16_ft --data a=folder:imagenet-a --data r=folder:imagenet-r
  python -m beitv2_jax robustness --from runs/b16_ft --data imagenet=tfds:imagenet2012 --real real.json
  python -m beitv2_jax robustness --from runs/b16_ft --config=configs/robustness.py --config.sets.a=folder:imagenet-a

A set with images of some of the model's classes is judged among those alone. --config reads names, sources and settings from a file that
you keep; what is given beside it counts more.
"""

from typing import Any

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('robustness', __doc__)
  arguments.add_from(parser, f'a classifier: {arguments.MODEL}')
  arguments.add_data(parser, f'a labelled set and its name, NAME={arguments.SOURCE}; once for each set', action='append', default=[])
  arguments.add_json(parser)
  arguments.add_batch(parser, 64)
  parser.set_defaults(batch=None)
  parser.add_argument('--real', metavar='FILE', help="ReaL's labels (real.json), judged on the set named imagenet")
  parser.add_argument('--crop-pct', type=float, help='default 0.875, the official evaluation; timm takes 0.9 for base, 0.95 for large')
  args, left = parser.parse_known_args(argv)
  options: dict[str, Any] = _from_config(left) if left else dict(sets={}, crop_pct=0.875)
  given = dict(real=args.real, data_dir=args.data_dir, crop_pct=args.crop_pct, batch=args.batch)
  options |= {k: v for k, v in given.items() if v not in (None, '')}
  options['sets'] |= dict(map(_named, args.data))
  if not 0 < options['crop_pct'] <= 1:
    raise UserError(f'--crop-pct {options["crop_pct"]}: above 0 and at most 1.')
  from beitv2_jax.downstream import robustness, trained
  from beitv2_jax.training import process

  process.use_compilation_cache()
  result = robustness.run(trained.load(args.source), **options)
  print(show(result))
  arguments.write_json(args.json, result)


def _named(text: str) -> tuple[str, str]:
  name, equals, source = text.partition('=')
  if not (name and equals and source):
    raise UserError(f'--data {text}: give a name and a source, such as --data a=folder:PATH.')
  return name, source


def _from_config(left: list[str]) -> dict[str, Any]:
  from beitv2_jax import recipes

  config = recipes.from_arguments(left)
  return dict(sets=dict(config.sets), real=config.real, data_dir=config.data_dir, crop_pct=config.crop_pct, batch=config.batch_size)


def show(result: dict[str, Any]) -> str:
  lines = ['set        images  classes   top-1           top-5']
  for name, r in result.items():
    error = f' ± {r["acc1_error"]:.2f}' if 'acc1_error' in r else ''
    top5 = f'{r["acc5"]:8.2f}' if 'acc5' in r else ''
    lines.append(f'{name:10s}{r["images"]:7,d}{r.get("classes", ""):>9}{r["acc1"]:8.2f}{error:8s}{top5}')
  return '\n'.join(lines)
