"""Pretraining against scratch on real images: the table of docs/results.md.

  python benchmarks/transfer.py --captioned folder:CIFAR10 --images folder:IMAGENETTE --scenes scenes:CAMVID

A small CLIP is trained on the captioned images; VQ-KD and the pretraining see --images without labels; then the same model is fine-tuned,
probed and given a segmentation head, from the pretrained weights and from fresh ones, with seeds 0 to 2. Everything runs through
python -m beitv2_jax.main with configs/transfer.py. Stages that are done are not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from beitv2_jax.data import listing, sources
from beitv2_jax.downstream import features, segmentation, trained
from beitv2_jax.tasks import segment
from beitv2_jax.training import metrics


def shrunk(source: str, out: Path, side: int) -> str:
  """The images of a folder at a short side of `side`, so that decoding is not what takes the time."""
  root = Path(source.removeprefix('folder:'))
  for path in sorted(root.rglob('*')):
    target = out / path.relative_to(root).with_suffix('.png')
    if path.suffix.lower() in listing.EXTENSIONS and not target.exists():
      target.parent.mkdir(parents=True, exist_ok=True)
      image = Image.open(path).convert('RGB')
      scale = side / min(image.size)
      image.resize([max(side, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC).save(target)
  return f'folder:{out}'


def train(stage: str, workdir: Path, *extra: str) -> None:
  if not (workdir / 'done').exists():
    command = [sys.executable, '-m', 'beitv2_jax.main', f'--config=configs/transfer.py:stage={stage}', f'--workdir={workdir}', *extra]
    subprocess.run(command, check=True)
    (workdir / 'done').touch()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--captioned', required=True)
  parser.add_argument('--images', required=True)
  parser.add_argument('--scenes', required=True)
  parser.add_argument('--out', type=Path, default=Path('runs/transfer'))
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  out = args.out
  images = shrunk(args.images, out / 'images', 64)
  data = f'--config.data.source={images}'
  train('teacher', out / 'teacher', f'--config.data.source={args.captioned}')
  train('vqkd', out / 'vqkd', data, f'--config.teacher.name={out}/teacher/hf')
  train('pretrain', out / 'pretrain', data, f'--config.tokenizer_from={out}/vqkd')
  opened = {s: sources.make(images, s) for s in ('train', 'eval')}
  scenes = sources.make(args.scenes, 'eval')
  results = {}
  for seed in range(args.seeds):
    for start in ('pretrained', 'scratch'):
      own = [f'--config.seed={seed}'] + [f'--config.init_from={out}/pretrain'] * (start == 'pretrained')
      if start == 'scratch':
        own.append('--config.optim.layer_decay=1.0')
      ft, seg = out / f'finetune_{start}_{seed}', out / f'segment_{start}_{seed}'
      train('finetune', ft, data, *own)
      train('segment', seg, f'--config.data.source={args.scenes}', *own)
      row = dict(finetune=metrics.read(ft, 'eval')[-1]['acc1'])
      model = trained.load(seg)
      row['miou'] = segmentation.evaluate(model, scenes, segment.labels_of(model.config))['miou']
      frozen = trained.load(out / 'pretrain')
      frozen = frozen if start == 'pretrained' else trained.Model(frozen.config, seed=seed)
      if start == 'scratch' or seed == 0:  # pretrained features are the same for every seed
        with tempfile.TemporaryDirectory() as folder:
          r = features.probe_all(frozen, opened, Path(folder), epochs=100, attentive=True)
        row |= {k: r[k] for k in ('probe', 'knn', 'shots_1', 'shots_5', 'shots_10', 'attentive')}
      results.setdefault(start, []).append(row)
      print(start, seed, {k: round(v, 2) for k, v in row.items()}, flush=True)
  (out / 'summary.json').write_text(json.dumps(results, indent=2))
  print('\n| | pretrained | from scratch |\n|---|---|---|')
  for key in ('finetune', 'probe', 'attentive', 'knn', 'shots_1', 'shots_5', 'shots_10', 'miou'):
    cells = []
    for start in ('pretrained', 'scratch'):
      values = [r[key] for r in results[start] if key in r]
      cells.append(f'{np.mean(values):.1f}' + (f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else ''))
    print(f'| {key} | {cells[0]} | {cells[1]} |')


if __name__ == '__main__':
  main()
