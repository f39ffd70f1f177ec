"""What frozen features are worth: linear probes of every block, few labels, k-NN.

  python -m beitv2_jax probe --from runs/b16 --data folder:PATH

One pass over the images gives [CLS] and the mean of the patches after every block, which are kept on disk while the probes run.
--attentive adds a pooling that is learned, on the last block's tokens. --untrained probes the same model with fresh weights: the control.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from beitv2_jax.commands import arguments


@arguments.command
def main(argv: list[str] | None = None) -> None:
  parser = arguments.parser('probe', __doc__)
  arguments.add_from(parser)
  arguments.add_data(parser, f'labelled images: {arguments.SOURCE}', required=True)
  arguments.add_out(parser, 'keep the features in this folder; without it they go to a temporary one')
  arguments.add_json(parser)
  arguments.add_batch(parser, 64)
  parser.add_argument('--holdout', type=float, default=0.1, help='share held out where the source has no evaluation split (0.1)')
  parser.add_argument(
    '--views', type=arguments.at_least(0), default=0, help='random crops of each training image for the linear probes; 0: its centre crop'
  )
  parser.add_argument('--epochs', type=arguments.at_least(1), default=100, help='of the linear probes (100)')
  parser.add_argument('--shots', type=arguments.at_least(1), nargs='*', default=[1, 5, 10], help='labelled images a class (1 5 10)')
  parser.add_argument('--attentive', action='store_true', help='also a learned pooling of the tokens')
  parser.add_argument('--untrained', action='store_true', help='the same model with fresh weights')
  args = parser.parse_args(argv)
  from beitv2_jax.data import sources
  from beitv2_jax.downstream import features, trained
  from beitv2_jax.training import process

  process.use_compilation_cache()
  opened = {split: sources.make(args.data, split, args.data_dir, args.holdout) for split in ('train', 'eval')}
  model = trained.load(args.source)
  model = trained.Model(model.config) if args.untrained else model
  with _folder(args.out) as folder:
    result = features.probe_all(model, opened, folder, args.views, args.epochs, args.shots, args.attentive, args.batch)
  print(show(result))
  arguments.write_json(args.json, result | dict(layers=result['layers'].tolist()))
  if note := features.caution(result['images'], result['classes']):
    print(f'warning: {note}', file=sys.stderr)


def _folder(out: Path | None) -> Any:
  """A context that gives the folder for features."""
  if not out:
    return _Temporary()
  out.expanduser().mkdir(parents=True, exist_ok=True)
  return contextlib.nullcontext(out.expanduser())


class _Temporary(tempfile.TemporaryDirectory):
  def __enter__(self) -> Path:  # type: ignore[override]
    return Path(super().__enter__())


def show(result: dict[str, Any]) -> str:
  from beitv2_jax.downstream.probes import POOLINGS

  lines = ['linear probe, % top-1', 'block ' + ''.join(f'{pooling:>9s}' for pooling in POOLINGS)]
  lines += [f'{i:5d} ' + ''.join(f'{accuracy:9.2f}' for accuracy in row) for i, row in enumerate(result['layers'], 1)]
  single = [f'best linear probe {result["probe"]:.2f} ± {result["error"]:.2f} (block {result["probe_layer"]})', f'k-NN {result["knn"]:.2f}']
  single += [f'{name.removeprefix("shots_")} a class {value:.2f}' for name, value in result.items() if name.startswith('shots_')]
  single += [f'attentive {result["attentive"]:.2f}'] if 'attentive' in result else []
  scored = f'{result["images"]:,} images of {result["classes"]:,} classes were scored; ± is the standard error'
  return '\n'.join([*lines, '', '   '.join(single), scored])
