"""Images a second of tokenizing, predicting and making features, from files on disk, decoding included: ours against PyTorch.

  python benchmarks/serving.py FOLDER                  base models, random weights, 64 of the folder's images (repeated if there are fewer)
  python benchmarks/serving.py FOLDER --images 2000 --batch 128       on a GPU: JAX and torch must both see it

The PyTorch side is what somebody would write today: a DataLoader with as many workers as cores, Pillow and torchvision's transforms, timm's BEiT v2 (and a
tokenizer of timm's blocks), under inference_mode, eager and compiled. Sides take turns, each in a process of its own; compilation is not counted.
Needs the extras [test,parity].
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ('ours', 'torch', 'torch-compile')
WORK = ('tokenize', 'predict', 'features')


def ours(files: list[Path], batch: int) -> dict[str, float]:
  import beitv2_jax
  from beitv2_jax.downstream import codes, image_files, predictions, trained
  from beitv2_jax.training.process import use_compilation_cache

  use_compilation_cache()
  tokenizer = trained.Model(beitv2_jax.recipe('configs/vqkd_b16.py', {'dtype': 'float32', 'model.teacher_width': 512}))
  classifier = trained.Model(beitv2_jax.recipe('configs/finetune_b16.py', {'dtype': 'float32', 'model.classes': 1000}))

  def features(files: list[Path]) -> int:
    return sum(
      len(trained.in_batches(classifier.features, images, batch=batch)['patches']) for _, images in image_files.prepared(files, 224, batch)
    )

  work = dict(
    tokenize=lambda files: len(codes.tokenize(tokenizer, files, batch)[0]),
    predict=lambda files: sum(1 for _ in predictions.classes(classifier, files, 5, batch=batch)),
    features=features,
  )
  return timed(work, files, batch)


def theirs(files: list[Path], batch: int, compiled: bool) -> dict[str, float]:
  import torch

  from benchmarks.steps import torch_model
  from tests.test_parity import import_timm

  import_timm()
  import timm
  from PIL import Image
  from torchvision import transforms

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cuda.matmul.allow_tf32 = True  # as XLA's default has it
  prepare = transforms.Compose(
    [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()]
  )
  scale = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

  class Files(torch.utils.data.Dataset):
    def __init__(self, files):
      self.files = files

    def __len__(self):
      return len(self.files)

    def __getitem__(self, i):
      return prepare(Image.open(self.files[i]).convert('RGB'))

  tokenizer = torch_model('vqkd-base').tokenizer.eval().to(device)
  classifier = timm.create_model('beitv2_base_patch16_224', num_classes=1000).eval().to(device)
  scale = scale.to(device) if isinstance(scale, torch.nn.Module) else scale
  call = dict(
    tokenize=lambda x: tokenizer.nearest(tokenizer.encode(x)),
    predict=lambda x: classifier(scale(x)).softmax(-1).topk(5),
    features=lambda x: classifier.forward_features(scale(x)),
  )
  call = {name: torch.compile(f) if compiled else f for name, f in call.items()}

  def run(name):
    def over(files):
      loader = torch.utils.data.DataLoader(Files(files), batch, num_workers=os.cpu_count() or 1, prefetch_factor=2)
      with torch.inference_mode():
        for x in loader:
          full = torch.cat([x, x[:1].expand(batch - len(x), -1, -1, -1)]) if len(x) < batch else x  # one shape: nothing compiles anew
          out = call[name](full.to(device))
          _ = [part.cpu() for part in out] if isinstance(out, tuple) else out.cpu()
      return len(files)

    return over

  return timed({name: run(name) for name in WORK}, files, batch)


def timed(work: dict, files: list[Path], batch: int) -> dict[str, float]:
  rates = {}
  for name, run in work.items():
    run(files[:batch])  # compiles
    began = time.monotonic()
    count = run(files)
    rates[name] = count / (time.monotonic() - began)
  return rates


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    from beitv2_jax.downstream import image_files

    found = image_files.find_images(args.folder)
    files = [found[i % len(found)] for i in range(args.images)]
    rates = ours(files, args.batch) if args.side == 'ours' else theirs(files, args.batch, args.side == 'torch-compile')
    return Path(os.environ['SERVING_OUT']).write_text(json.dumps(rates)) and None
  best: dict[str, dict[str, float]] = {}
  for _ in range(args.rounds):
    for side in args.sides:
      with tempfile.NamedTemporaryFile() as file:
        env = os.environ | dict(SERVING_OUT=file.name, PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')]))
        subprocess.run([sys.executable, __file__, *sys.argv[1:], '--side', side], env=env, check=True)
        rates = json.loads(Path(file.name).read_text())
      print(side, {name: round(rate, 2) for name, rate in rates.items()}, flush=True)
      best[side] = {name: max(rate, best.get(side, {}).get(name, 0)) for name, rate in rates.items()}
  for side in best:
    if side != 'ours' and 'ours' in best:
      print(f'ours against {side}: ' + ', '.join(f'{name} {best["ours"][name] / best[side][name]:.2f}' for name in WORK))


if __name__ == '__main__':
  main()
