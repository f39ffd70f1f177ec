"""The whole chain at toy size: a small CLIP, VQ-KD, BEiT v2, a decoder of codes to pixels, then a table, pictures, curves and an
explorer of the codebook in --out.

  python -m beitv2_jax demo
  python -m beitv2_jax demo --data folder:PATH --out runs/mine

Needs scikit-learn: pip install 'beitv2_jax[demo]'. Every stage is one `python -m beitv2_jax.main`, which is printed before
it runs. Without --data the images are scikit-learn's handwritten digits; of your own, give one folder a class.
"""

import argparse
import sys
import time
from pathlib import Path

from beitv2_jax import config
from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError
from beitv2_jax.training import child

STEPS = dict(teacher=450, vqkd=600, pretrain=3000, pixels=600)
FOLDERS = dict(teacher='teacher', vqkd='vqkd', pretrained='pretrain', pixels='pixels', random_vqkd='vqkd', random_pretrained='pretrain')


class StageFailed(Exception):
  """A stage ended with this exit code; it has said why."""

  def __init__(self, code: int):
    self.code = code


def planned(args: argparse.Namespace, stage: str) -> int:
  return max(1, round(STEPS[stage] * args.steps))


def train(args: argparse.Namespace, stage: str, folder: Path, steps: int | None = None, **settings) -> None:
  """Runs one stage in a process of its own. Raises StageFailed."""
  steps = planned(args, stage) if steps is None else steps
  caption = {'caption': 'a photo of a {}.'} if stage == 'teacher' and args.data != 'digits' else {}
  where = {'data.dir': args.data_dir} if args.data_dir else {}
  settings = {'data.source': args.data, 'steps': steps} | where | caption | {k.replace('__', '.'): v for k, v in settings.items()}
  command = [sys.executable, '-m', 'beitv2_jax.main', f'--config=configs/demo.py:stage={stage}', f'--workdir={folder}']
  command += [f'--config.{k}={v}' for k, v in settings.items()]
  print('\n$ python ' + ' '.join(command[1:]), flush=True)
  code = child.run(command)
  if code:
    raise StageFailed(code if code > 0 else 128 - code)


def chain(args: argparse.Namespace, prefix: str = '', teacher_steps: int | None = None) -> None:
  folder = lambda stage: args.out / f'{prefix}{stage}'
  train(args, 'teacher', folder('teacher'), teacher_steps)
  train(args, 'vqkd', folder('vqkd'), teacher__name=folder('teacher') / 'hf')
  train(args, 'pretrain', folder('pretrained'), tokenizer_from=folder('vqkd'))


def check_folder(args: argparse.Namespace) -> None:
  """Raises UserError if the stages in `out` were made from other images, or in other lengths: one would not belong to the next."""
  for path in sorted(args.out.glob('*/config.json')):
    made = config.load(path.parent)
    if made.data.source != args.data:
      raise UserError(f'{path.parent} was made from {made.data.source}, not {args.data}; give another folder with --out.')
    stage = FOLDERS.get(path.parent.name)
    if stage and made.steps != planned(args, stage):
      raise UserError(
        f'{path.parent} has {made.steps} steps, not {planned(args, stage)}; give the same --steps, or another folder with --out.'
      )


@arguments.command
def main(argv: list[str] | None = None) -> int:
  parser = arguments.parser('demo', __doc__)
  arguments.add_data(parser, 'images: digits (the default), or folder:PATH with one folder a class', default='digits')
  arguments.add_out(parser, 'where everything goes', Path('runs/demo'))
  parser.add_argument('--full', action='store_true', help='also the control: the same chain from an untrained teacher')
  parser.add_argument(
    '--steps', type=float, default=1.0, metavar='SHARE', help='share of the usual training steps, such as 0.1, for a quick look'
  )
  args = parser.parse_args(argv)
  if not 0 < args.steps <= 10:
    raise UserError(f'--steps {args.steps:g}: a share of the usual steps, such as 0.1; above 0, at most 10.')
  began = time.time()
  try:
    import sklearn  # noqa: F401
  except ImportError as e:
    raise UserError(f"the demo needs {e.name}: pip install 'beitv2_jax[demo]'.") from e
  from beitv2_jax.data import sources
  from beitv2_jax.training import process

  sources.make(args.data, 'train', args.data_dir)  # a wrong path shows here, not after a stage
  check_folder(args)
  try:
    chain(args)
    train(args, 'pixels', args.out / 'pixels', tokenizer_from=args.out / 'vqkd')
    if args.full:
      chain(args, 'random_', teacher_steps=0)
  except StageFailed as e:
    return e.code
  process.use_compilation_cache()
  from beitv2_jax.pictures import demo_report, explorer

  demo_report.report(args.out, began, args.full)
  models = explorer.Models.load(f'{args.out}/vqkd', None, f'{args.out}/pixels', f'{args.out}/pretrained')
  page = explorer.build(models, explorer.Images.of(args.data, 'all', args.data_dir, 2000), args.out / 'explorer', shown=300, batch=100)
  if args.steps < 1:
    print(f'With {args.steps:g} of the usual steps the figures say little; the pictures show what there will be.')
  print(f'Explorer: {page}   (open it in a browser)')
  return 0
