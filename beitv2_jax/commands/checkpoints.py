"""The checkpoints in a workdir: which steps there are, and whether they are whole.

  python -m beitv2_jax checkpoints --from runs/vqkd_b16
  python -m beitv2_jax checkpoints --from runs/vqkd_b16 --verify        reads every array and holds it to its checksum
  python -m beitv2_jax checkpoints --from runs/vqkd_b16 --prune 1       keeps the newest whole one, removes all others
  python -m beitv2_jax checkpoints --from runs/old --trust              gives checksums to checkpoints made before there were any

Without --verify only the list of checksums and the names of the files are looked at. Exit code 1 if a checkpoint is damaged.
"""

import time
from typing import Any

from beitv2_jax.commands.arguments import add_from, add_json, at_least, command, parser, write_json


@command
def main(argv: list[str] | None = None) -> int:
  arguments = parser('checkpoints', __doc__)
  add_from(arguments, 'a workdir')
  arguments.add_argument('--verify', action='store_true', help='read every array')
  arguments.add_argument(
    '--prune', type=at_least(1), metavar='N', help='keep the newest N whole ones, after --verify, and remove the others'
  )
  arguments.add_argument('--trust', action='store_true', help='write checksums where there are none, of what is there')
  add_json(arguments)
  args = arguments.parse_args(argv)
  from beitv2_jax.weights import checkpoint_files, stages

  folder, config = stages.checkpoints_of(args.source)
  if args.trust:
    for step in checkpoint_files.trust(folder):
      print(f'step {step} has checksums now')
  found = checkpoint_files.survey(folder, verify=args.verify or bool(args.prune))
  print(f'{folder}: {config.task}, {config.data.source}')
  for row in found:
    when = time.strftime('%Y-%m-%d %H:%M', time.localtime(row['saved'])) if row['saved'] else f'{"?":16}'
    print(f'  {row["name"]:>12}  {row["bytes"] / 2**20:>10,.1f} MiB  {when}  {row["state"]}')
  write_json(args.json, found)
  if args.prune:
    for name in checkpoint_files.prune(folder, found, args.prune):
      print(f'removed {folder / name}')
    return 0
  return int(any(_damaged(row) for row in found))


def _damaged(row: dict[str, Any]) -> bool:
  return row['step'] is not None and row['state'].startswith('damaged')
