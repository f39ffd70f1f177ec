"""The stage that a recipe describes, trained, or gone on with.

  python -m beitv2_jax train --config=configs/vqkd_b16.py --workdir=runs/vqkd_b16
  python -m beitv2_jax train --config=configs/vqkd_b16.py:smoke --workdir=runs/smoke --config.optim.lr=1e-3

The same as `python -m beitv2_jax.main`. Every field of the recipe is a flag; the fields are in beitv2_jax/config.py and the recipe.
On several hosts: --distributed on a TPU slice, nothing under SLURM, elsewhere --coordinator=HOST:PORT --processes=N --process=I.
"""

from beitv2_jax.commands.arguments import command


@command
def main(argv: list[str] | None = None) -> None:
  argv = argv or []
  if argv and argv[0] in ('-h', '--help'):
    return print(__doc__)
  from beitv2_jax import main as entry

  entry.main(['beitv2_jax train', *argv])
