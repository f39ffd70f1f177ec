"""One of the paper's questions at a size that anyone can run: a table with seeds, error bars and controls.

  python -m beitv2_jax study quantizers --out runs/study
  python -m beitv2_jax study targets --out runs/study --dry-run

Rows are trained one after the other (tokenizer, pretraining, probes of frozen features; with --finetune and --scenes also fine-tuning
and a segmenter); the same command goes on where it was stopped, and tables share rows. Start it once more beside itself, for a second GPU
(CUDA_VISIBLE_DEVICES=1) or a second core (taskset -c 1): they share the rows out. All rows have the same recipe, data and steps, but
for what their name says. Without --config it is the demo's recipe, on scikit-learn's digits (pip install 'beitv2_jax[demo]');
configs/transfer.py is one for photographs, and configs/transfer.py:size=small for a GPU. To choose settings, take
--data digits:validation, which leaves the test images alone. TABLE is one of:
quantizers, targets, teachers, masking, aggregation, sizes, data, codebook.
"""

from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('study', __doc__)
  parser.add_argument('table', metavar='TABLE', help='which question')
  arguments.add_data(parser, 'labelled images: digits (the default), folder:PATH ...')
  arguments.add_out(parser, 'where everything goes', Path('runs/study'))
  parser.add_argument(
    '--config',
    default='configs/demo.py',
    metavar='FILE',
    help='a recipe with the stages teacher, vqkd, pretrain, finetune and segment (configs/demo.py)',
  )
  parser.add_argument(
    '--set',
    nargs='*',
    default=[],
    metavar='[STAGE:]KEY=VALUE',
    help='settings for every stage, such as data.image_size=48, or for one, such as teacher:data.source=folder:PATH',
  )
  parser.add_argument('--finetune', action='store_true', help='also fine-tune each row, with all labels')
  parser.add_argument('--scenes', metavar='SOURCE', help='also train a segmenter on each row: scenes:PATH')
  parser.add_argument('--only', metavar='TEXT', default='', help='only the rows whose names contain it, to choose settings by one row')
  parser.add_argument('--minutes', type=float, default=0.0, help='stop after so many; the same command goes on')
  parser.add_argument('--seeds', type=arguments.at_least(1), default=3, help='runs of each row (3)')
  parser.add_argument('--dry-run', action='store_true', help='say what is left to do, and do nothing')
  parser.add_argument('--redo', action='store_true', help='make rows again that other code or settings made')
  args = parser.parse_args(argv)
  from beitv2_jax.studies import plan, run, summary, tables

  if args.table not in tables.TABLES:
    raise UserError(f'no table {args.table!r}; there are {", ".join(tables.TABLES)}.')
  table = tables.TABLES[args.table]
  if not any(args.only in row.name for row in table.rows):
    raise UserError(f'--only {args.only!r}: no such row in {args.table}; there are {", ".join(row.name for row in table.rows)}.')
  if args.redo and args.dry_run:
    raise UserError('--redo removes what is there, and --dry-run does nothing: give one of them.')
  settings = arguments.settings(args.set)
  settings |= {key: value for key, value in (('data.source', args.data), ('data.dir', args.data_dir)) if value}
  if args.scenes:
    settings['segment:data.source'] = args.scenes
  scores = ('probe', *['finetune'] * args.finetune, *['segment'] * bool(args.scenes))
  study = plan.Study(args.table, table, args.out.expanduser().absolute(), args.seeds, args.config, settings, scores, args.only)
  print(study.table.question)
  if args.redo:
    run.forget(study)
  if args.dry_run:
    print('\n'.join(run.cost(study)))
    return
  try:
    run.run(study, lambda line: print(line, flush=True), args.minutes)
  except run.OutOfTime:
    print(f'stopped after {args.minutes:g} minutes, at the next save; the same command{" without --redo" * args.redo} goes on')
    return
  print('\n' + summary.markdown(study) + f'\n{study.out / study.name}/table.html')
