"""Our input pipeline against a torch DataLoader with torchvision's and timm's transforms on Pillow, side by side on the same files.

  python -m benchmarks.input_pipeline FOLDER [--workers 2] [--rounds 5]     images/s, alternating rounds, and their ratio
  python -m benchmarks.input_pipeline FOLDER --memory [--images 20000]      memory of our worker processes as they go on
  python -m benchmarks.input_pipeline --index [--workers 2]                 time to the first batch of a 1.28 M record index

From JPEG bytes both make batches of 224 px crops (antialiased bicubic) with flip: `crop` with a block mask, `jitter` the same after colour jitter
(pretraining), `finetune` RandAugment instead of both. In ours colours are normalised and boxes erased in the training step, on the device; timm's
transform for fine-tuning does both here. Needs the extra [parity].
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from beitv2_jax.data import listing, pipeline, sources, transforms
from beitv2_jax.data.masking import BlockMask
from beitv2_jax.data.randaugment import RandAugment

BATCH = 64
RECIPES = ('crop', 'jitter', 'finetune')


def ours(folder: str, workers: int, recipe: str = 'crop'):
  source = sources.make(f'folder:{folder}', 'train', holdout=1e-9)
  crop, mask = transforms.RandomResizedCrop(224), BlockMask((14, 14), 75)
  steps = dict(
    crop=[crop, transforms.Flip(), mask],
    jitter=[transforms.ColorJitter(0.4, crop), crop, transforms.Flip(), mask],
    finetune=[crop, transforms.Flip(), RandAugment()],
  )
  return pipeline.train_batches(source, steps[recipe], seed=0, batch=BATCH, workers=workers)


class TorchImages:
  """What people write: Pillow, torchvision's transforms to uint8 and the official mask generator's algorithm; timm's own for fine-tuning."""

  def __init__(self, folder: str, recipe: str):
    from tests.test_parity import import_timm

    import_timm()
    from timm.data import create_transform
    from torchvision import transforms as tv

    self.files = [os.path.join(folder, n) for n in listing.images_under(Path(folder))]
    self.masked = recipe != 'finetune'
    if recipe == 'finetune':  # as the official code calls it
      posterize = ImageOps.posterize
      ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))  # timm asks for 0 at times, which Pillow no longer takes
      augmented = dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25, re_mode='pixel', re_count=1)
      self.transform = create_transform(224, is_training=True, color_jitter=0.4, interpolation='bicubic', **augmented)
    else:
      jitter = [tv.ColorJitter(0.4, 0.4, 0.4)] if recipe == 'jitter' else []
      crop = tv.RandomResizedCrop(224, interpolation=tv.InterpolationMode.BICUBIC)
      self.transform = tv.Compose([*jitter, crop, tv.RandomHorizontalFlip(), tv.PILToTensor()])

  def __len__(self):
    return len(self.files)

  def __getitem__(self, i):
    with open(self.files[i], 'rb') as f:
      image = self.transform(Image.open(f).convert('RGB'))
    return (image, BlockMask((14, 14), 75).draw(np.random.default_rng())) if self.masked else image


def theirs(folder: str, workers: int, recipe: str):
  import torch

  def forever(loader):
    while True:
      yield from loader

  torch.set_num_threads(1)
  images = TorchImages(folder, recipe)
  return forever(
    torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
  )


def compare(folder: str, workers: int, rounds: int, images: int, recipe: str) -> None:
  loaders = {'ours': ours(folder, workers, recipe), 'torch': theirs(folder, workers, recipe)}
  rates = {name: [] for name in loaders}
  for loader in loaders.values():
    for _ in range(4):  # start workers, fill queues
      next(loader)
  for _ in range(rounds):
    for name, loader in loaders.items():
      for _ in range(2 * max(workers, 1) + 2):  # what was prefetched while the other one ran
        next(loader)
      start = time.monotonic()
      for _ in range(images // BATCH):
        next(loader)
      rates[name].append(images // BATCH * BATCH / (time.monotonic() - start))
      time.sleep(1.0)  # its queues fill up, then its workers rest
  cores = max(workers, 1)
  for name, values in rates.items():
    print(f'{name:6s}{statistics.median(values) / cores:8.0f} images/s a core (rounds {" ".join(f"{v / cores:.0f}" for v in values)})')
  ratios = [a / b for a, b in zip(rates['ours'], rates['torch'])]
  print(f'ratio {statistics.median(ratios):.2f} (rounds {" ".join(f"{r:.2f}" for r in ratios)}), {workers} workers, {os.cpu_count()} cores')


def children_memory() -> list[float]:
  """Resident MiB of every child process that runs Python's spawn."""
  out = []
  for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
      stat, line = Path(f'/proc/{pid}/stat').read_text(), Path(f'/proc/{pid}/cmdline').read_text()
      if int(stat.rpartition(')')[2].split()[1]) == os.getpid() and 'spawn_main' in line:
        out.append(int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20)
    except OSError:
      pass
  return sorted(out)


def memory(folder: str, workers: int, images: int) -> None:
  batches = ours(folder, workers)
  for k in range(images // BATCH + 1):
    next(batches)
    if k * BATCH % 2560 == 0:
      print(f'{k * BATCH:6d} images: workers hold {", ".join(f"{m:.0f}" for m in children_memory())} MiB', flush=True)


def index(workers: int) -> None:
  """1,281,167 files in 1,000 class folders, most of them hard links to one image."""
  with tempfile.TemporaryDirectory() as folder:
    images = []
    for i in range(30):  # a file may have 65,000 links
      path = Path(folder) / f'image{i}'
      Image.effect_noise((500, 375), 50).convert('RGB').save(path, 'JPEG')
      images.append(path)
    for i in range(1_281_167):
      place = Path(folder) / 'train' / f'n{i % 1000:08d}'
      if i < 1000:
        place.mkdir(parents=True)
      os.link(images[i // 45_000], place / f'n{i % 1000:08d}_{i}.JPEG')
    start = time.monotonic()
    source = sources.make(f'folder:{folder}/train', 'train', holdout=1e-9)
    listed = time.monotonic() - start
    batches = pipeline.train_batches(source, [transforms.RandomResizedCrop(224), transforms.Flip()], seed=0, batch=BATCH, workers=workers)
    next(batches)
    print(f'{len(source):,} files: listed in {listed:.1f} s, first batch of {BATCH} after {time.monotonic() - start:.1f} s')
    batches.close()


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', nargs='?')
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--images', type=int, default=0)
  parser.add_argument('--recipe', nargs='*', default=RECIPES, choices=RECIPES)
  parser.add_argument('--memory', action='store_true')
  parser.add_argument('--index', action='store_true')
  args = parser.parse_args()
  if args.index:
    index(args.workers)
  elif not args.folder:
    parser.error('give a FOLDER of JPEGs')
  elif args.memory:
    memory(args.folder, args.workers, args.images or 20_000)
  else:
    for recipe in args.recipe:
      print(recipe)
      compare(args.folder, args.workers, args.rounds, args.images or 2048, recipe)
