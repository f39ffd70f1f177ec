"""The report of a run, or several runs side by side, as one HTML file.

  python -m beitv2_jax report runs/b16 runs/b16_other --out compared.html

Every run keeps a WORKDIR/report.html of its own while it trains. Several get their curves over each other, a table of their last figures,
and the settings that differ.
"""

from pathlib import Path

from beitv2_jax.commands import arguments
from beitv2_jax.errors import UserError


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('report', __doc__)
  parser.add_argument('runs', nargs='+', metavar='RUN', help='workdirs')
  arguments.add_out(parser, 'the HTML file', Path('report.html'))
  args = parser.parse_args(argv)
  from beitv2_jax.training import report

  out = args.out.expanduser()
  if out.is_dir() or not out.absolute().parent.is_dir():
    raise UserError(f'--out {args.out}: give the name of a file in a folder that exists.')
  runs = [report.read(run) for run in args.runs]
  for where, run in zip(args.runs, runs):
    if not (run.train or run.evaluations or run.events):
      raise UserError(f'{where} is not of a run: it has no metrics.jsonl and no events.jsonl.')
  (report.page(runs[0]) if len(runs) == 1 else report.compare(runs)).save(out)
  print(f'wrote {args.out}')
