"""Fine-tuning a large model: as base (configs/finetune_b16.py), with its own recipe.

Expected top-1 (official README): 86.6 % from 300 epochs of pretraining, 87.3 % from 1600, 88.4 % after ImageNet-21k.

  python -m beitv2_jax.main --config=configs/finetune_l16.py --workdir=runs/l16_ft --config.init_from=runs/beitv2_l16
  python -m beitv2_jax.main --config=configs/finetune_l16.py:pretrained=21k,size=512 --workdir=runs/l16_512 --config.init_from=runs/l16_21k
  python -m beitv2_jax.main --config=configs/finetune_l16.py:smoke --workdir=runs/smoke
"""

from beitv2_jax.configs import finetune_b16

SIZE = dict(width=1024, depth=24, heads=16, layer_scale=1e-5)
RECIPES = {
  '300': (5e-4, 50, 5, 0.8, 0.2, 0.8, 1.0),
  '1600': (2e-4, 50, 5, 0.8, 0.2, 0.8, 1.0),
  '21k': (7e-5, 20, 5, 0.8, 0.25, 0.0, 0.0),
  'in21k': (6e-4, 90, 20, 0.75, 0.2, 0.8, 1.0),
}


def get_config(arg=None):
  return finetune_b16.recipe(arg, SIZE, RECIPES, 0.95)
