"""What checksums cost a checkpoint: python benchmarks/checkpoint_cost.py --config=configs/beitv2_b16.py

Saves and restores the state of a recipe (random numbers in its shapes) with and without them, in turns, and prints medians of three rounds
and the bytes on disk. `returns` is how long the training loop stands still; the rest is written in the background.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from beitv2_jax import recipes, tasks
from beitv2_jax.training import optim, sharding
from beitv2_jax.training.train_state import state_layout
from beitv2_jax.weights import checkpoint_files


def state_of(config):
  task, _ = tasks.make(config, abstract=True)
  optimizer, _ = optim.make(config.optim, 1000, 10)
  layout = state_layout(task, optimizer, sharding.make_mesh(1, 1), config)
  rng = np.random.default_rng(0)
  block = rng.normal(size=2**22).astype(np.float32)
  fill = lambda x: jnp.asarray(np.resize(block, x.shape).astype(x.dtype))
  return jax.tree.map(fill, layout.abstract).split(), layout.targets().split()


def plain(variables, optimizer):
  return ocp.args.Composite(variables=ocp.args.StandardSave(variables), optimizer=ocp.args.StandardSave(optimizer))


def main() -> None:
  config = recipes.from_arguments(sys.argv[1:])
  (variables, optimizer), targets = state_of(config)
  times: dict[str, list[float]] = {}
  note = lambda name, since: times.setdefault(name, []).append(time.monotonic() - since)
  with tempfile.TemporaryDirectory() as folder:
    for turn in range(4):  # the first, which compiles, does not count
      for kind in ('without', 'with'):
        path = Path(folder) / kind
        shutil.rmtree(path, ignore_errors=True)
        with ocp.CheckpointManager(path, item_handlers=checkpoint_files.handlers()) as manager:
          start = time.monotonic()
          args = plain(variables, optimizer) if kind == 'without' else checkpoint_files.to_save(variables=variables, optimizer=optimizer)
          manager.save(0, args=args, force=True)
          note(f'{kind}: save returns', start)
          manager.wait_until_finished()
          note(f'{kind}: saved', start)
        start = time.monotonic()
        for item, target in zip(('variables', 'optimizer'), targets):
          if kind == 'with':
            jax.block_until_ready(checkpoint_files.read(path / '0', item, target))
          else:
            jax.block_until_ready(ocp.StandardCheckpointHandler().restore(path / '0' / item, args=ocp.args.StandardRestore(target)))
        note(f'{kind}: restored', start)
        if turn == 0:
          print(f'{kind}: {sum(f.stat().st_size for f in path.rglob("*") if f.is_file()):,} bytes')
  for name, seconds in times.items():
    print(f'{name:24s} {statistics.median(seconds[1:]):.2f} s')


if __name__ == '__main__':
  main()
