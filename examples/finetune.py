"""Fine-tuning from Python: a classifier of the class folders in FOLDER, from a pretrained model, and the classes of one image.

python examples/finetune.py PRETRAINED FOLDER WORKDIR IMAGE
"""

import sys
from pathlib import Path

import beitv2_jax
from beitv2_jax.downstream import predictions


def main(pretrained: str, folder: str, workdir: str, image: str) -> None:
  before = beitv2_jax.load(pretrained).config
  if before.task != 'pretrain':
    sys.exit(f'{pretrained} is a {before.task}; give a pretrained model')
  sizes = {f'model.{key}': before.model[key] for key in ('width', 'depth', 'heads', 'patch_size', 'layer_scale')}
  config = beitv2_jax.recipe(
    'configs/finetune_b16.py',
    sizes
    | {
      'data.source': f'folder:{folder}',
      'data.image_size': before.data.image_size,
      'init_from': pretrained,
      'batch_size': 32,
      'epochs': 10,
      'optim.warmup_epochs': 1,
    },
  )
  scores = beitv2_jax.train(config, workdir)  # the same call goes on where it was stopped
  print(f'{scores["acc1"]:.1f} % of the evaluation images are named right')
  for row in predictions.classes(beitv2_jax.load(workdir), [Path(image)], top=3):
    print(row['file'], row['classes'])


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 5 else sys.exit(__doc__)
