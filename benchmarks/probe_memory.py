"""How much memory the probes of a data set of ImageNet's size take: python benchmarks/probe_memory.py [--images N] [--size base|large]

The images and the model are stand-ins (no pixels are decoded, the features are random), everything after them is the real code: features
written to disk and read back, linear probes, k-NN, few labels. One epoch, and 10 classes, so that it ends: 1,000 classes add the
probes' own weights and moments, which are printed.
"""

import argparse
import resource
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from beitv2_jax.downstream import features

SIZES = dict(base=(12, 768), large=(24, 1024))


class Images:
  classes = [str(i) for i in range(10)]

  def __init__(self, count: int):
    self.count, self.image = count, np.zeros((8, 8, 3), np.uint8)

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, i: int) -> dict:
    return dict(image=self.image, label=i % 10)


def anonymous() -> int:
  """Bytes of this process that are not a file's: what cannot be dropped when memory is short."""
  status = Path('/proc/self/status').read_text()
  return 1024 * int(status.split('RssAnon:')[1].split()[0])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--images', type=int, default=1_281_167)
  parser.add_argument('--size', choices=SIZES, default='base')
  parser.add_argument('--folder', help='where the features go; a temporary folder by default')
  args = parser.parse_args()
  blocks, width = SIZES[args.size]
  block_of_features = np.random.default_rng(0).normal(size=(1024, blocks, 2, width)).astype(np.float32)
  peak = 0

  def pooled_layers(images: np.ndarray) -> np.ndarray:
    nonlocal peak
    peak = max(peak, anonymous())
    return block_of_features[: len(images)]

  config = ConfigDict(dict(data=dict(image_size=8)))
  model = types.SimpleNamespace(config=config, pooled_layers=pooled_layers)
  sources = dict(train=Images(args.images), eval=Images(max(args.images // 25, 100)))
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    before = anonymous()
    result = features.probe_all(model, sources, Path(folder), epochs=1, batch=1024)
    written = sum(f.stat().st_size for f in Path(folder).iterdir())
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  print(f'{args.size}, {args.images:,} images on {jax.device_count()} devices: k-NN {result["knn"]:.1f} % (random features)')
  print(f'features on disk                 {gib(written)}')
  print(f'memory before                    {gib(before)}')
  print(f'memory while features are made   {gib(peak)} (the stand-in holds {gib(block_of_features.nbytes)})')
  print(f'memory at the end                {gib(anonymous())}')
  print(f'peak, with pages of the files    {gib(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}')
  print(f'1,000 classes add                {gib(3 * 3 * blocks * 2 * width * 1000 * 4)} (weights and two moments of the linear probes)')


if __name__ == '__main__':
  main()
