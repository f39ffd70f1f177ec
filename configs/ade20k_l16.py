"""Semantic segmentation on ADE20K with a large backbone: as base (configs/ade20k_b16.py), with its own recipe.

Expected single-scale mIoU (official README): 56.7 from ImageNet-1k pretraining, 57.5 after ImageNet-21k.

  python -m beitv2_jax.main --config=configs/ade20k_l16.py --workdir=runs/l16_ade --config.init_from=runs/beitv2_l16 \
      --config.data.source=scenes:ADEChallengeData2016
"""

from beitv2_jax.configs import ade20k_b16

SIZE = dict(width=1024, depth=24, heads=16, layer_scale=1e-6, out_indices=(7, 11, 15, 23), channels=1024)
RECIPES = {'1k': (4e-5, 0.9, 0.2), '21k': (3e-5, 0.9, 0.2)}


def get_config(arg=None):
  return ade20k_b16.recipe(arg, SIZE, RECIPES)
