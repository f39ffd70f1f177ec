"""How fast encoded images are read, in a random order, by format: python benchmarks/read_rate.py FOLDER_OF_IMAGES

The images are copied until there are a few thousand, in the page cache: what is compared is the work of reading, not the disk.
"""

import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from beitv2_jax.commands import prepare
from beitv2_jax.data import sources

COPIES = 6


def main() -> None:
  images = sorted(p for p in Path(sys.argv[1]).rglob('*') if p.suffix.lower() in ('.jpeg', '.jpg', '.png'))
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    files = []
    for copy in range(COPIES):
      for i, image in enumerate(images):
        target = root / 'folder' / 'train' / f'class{i % 10}' / f'{copy}_{image.name}'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
        files.append((target, i % 10))
    for shard in range(4):
      with tarfile.open(root / f'train-{shard:04d}.tar', 'w') as tar:
        for target, label in files[shard::4]:
          tar.add(target, f'{label}/{target.name}')
    with tarfile.open(root / 'validation-0000.tar', 'w') as tar:
      tar.add(files[0][0], '0/one.jpeg')
    import pyarrow
    from pyarrow import parquet

    rows = [dict(bytes=target.read_bytes(), path=target.name) for target, _ in files]
    parquet.write_table(
      pyarrow.table({'image': rows, 'label': [label for _, label in files]}), root / 'train-0.parquet', row_group_size=100
    )
    assert prepare.main([f'tars:{root}', '--out', str(root / 'shards'), '--workers', '2']) == 0
    specs = dict(
      array_record=f'tfds:{root}/shards/images',
      folder=f'folder:{root}/folder',
      tars=f'tars:{root}',
      parquet=f'parquet:{root}/train-0.parquet',
    )
    rates: dict[str, list[float]] = {kind: [] for kind in specs}
    opened = {kind: sources.make(spec, 'train', holdout=0.01) for kind, spec in specs.items()}
    order = np.random.default_rng(0).permutation(min(len(s) for s in opened.values()))
    for _ in range(5):  # in turns: other work on the machine hits all alike
      for kind, source in opened.items():
        count = 100 if kind == 'parquet' else len(order)
        began = time.perf_counter()
        for i in order[:count]:
          source[int(i)]
        rates[kind].append(count / (time.perf_counter() - began))
    base = np.median(rates['array_record'])
    for kind, found in rates.items():
      print(f'{kind:14s}{np.median(found):12,.0f} images/s a core   {100 * np.median(found) / base:6.1f} % of array_record')


if __name__ == '__main__':
  main()
