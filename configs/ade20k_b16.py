"""Semantic segmentation on ADE20K: UperNet on a base model, 512 px, 160,000 steps of batch 16.

Recipe: the official one, by what the backbone was fine-tuned on. Expected single-scale mIoU (official README): 53.1 from
ImageNet-1k pretraining (the default), 53.5 after intermediate fine-tuning on ImageNet-21k (pretrained=21k).

  python -m beitv2_jax.main --config=configs/ade20k_b16.py --workdir=runs/b16_ade --config.init_from=runs/beitv2_b16 \
      --config.data.source=scenes:ADEChallengeData2016
  python -m beitv2_jax segmentation --from runs/b16_ade                                  the exact scores
  python -m beitv2_jax segmentation --from runs/b16_ade --flip --scales 0.5 0.75 1 1.25 1.5 1.75
  python -m beitv2_jax.main --config=configs/ade20k_b16.py:smoke --workdir=runs/smoke

Your own masks: --config.model.classes=11 --config.labels.reduce_zero=False --config.labels.ignore="(11,255)"; layouts are in
beitv2_jax/data/scenes.py.
"""

from ml_collections import ConfigDict

from beitv2_jax import config
from beitv2_jax.errors import UserError

SIZE = dict(width=768, depth=12, heads=12, layer_scale=0.1, out_indices=(3, 5, 7, 11), channels=768)
RECIPES = {'1k': (5e-5, 0.75, 0.15), '21k': (5e-5, 0.85, 0.15)}  # lr, layer decay, drop path


def get_config(arg=None):
  return recipe(arg, SIZE, RECIPES)


def recipe(arg, size, recipes):
  arg = config.parse_arg(arg, pretrained='1k', smoke=False)
  if arg.pretrained not in recipes:
    raise UserError(f'recipe argument pretrained: one of {", ".join(recipes)}.')
  lr, layer_decay, drop_path = recipes[arg.pretrained]
  c = config.base('segmenter').unlock()
  c.batch_size, c.steps = 16, 160_000
  c.model = ConfigDict(
    dict(
      **size,
      patch_size=16,
      mlp_ratio=4.0,
      drop_path=drop_path,
      dropout=0.1,
      aux_channels=256,
      abs_pos=False,
      rel_pos='per_block',
      pool_scales=(1, 2, 3, 6),
      classes=150,
    )
  )
  c.class_names = ()  # filled in from the data, where it names them
  # ADE20K: 0 is no class, 1 is class 0. `values`: what stands for the classes in the masks, if not their numbers, as (0, 255);
  # `any`: train even if the masks hold one class only, or none of some.
  c.labels = ConfigDict(dict(reduce_zero=True, ignore=(255,), values=(), any=False))
  c.aux_weight = 0.4
  c.average_over_ignored = True  # the official loss: pixels without a class count in the denominator
  c.data.update(source='scenes:ADEChallengeData2016', image_size=512)
  c.data.resize_ratio = (0.5, 2.0)
  c.optim.update(schedule='linear', lr=lr, min_lr=0.0, warmup_steps=1500, weight_decay=0.05, layer_decay=layer_decay, no_decay=())
  c.checkpoint.every = 16_000
  c.eval_every = 16_000
  if arg.smoke:
    config.smoke(c)
    c.data.source = 'fake-scenes:64'
    c.model.update(width=32, depth=3, heads=2, patch_size=8, channels=32, aux_channels=16, out_indices=(0, 1, 1, 2), classes=5)
    c.update(batch_size=4, eval_batch_size=4, eval_every=0)
  return c.lock()
