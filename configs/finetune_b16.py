"""Fine-tuning a base model on ImageNet-1k (or any folder of classes), batch 1024.

Recipe: the official one, by what the model was pretrained on. Expected top-1 (official README): 85.0 % from 300 epochs of
pretraining (pretrained=300), 85.5 % from 1600 (the default), 86.5 % after intermediate fine-tuning on ImageNet-21k (pretrained=21k).

  python -m beitv2_jax.main --config=configs/finetune_b16.py --workdir=runs/b16_ft --config.init_from=runs/beitv2_b16
  python -m beitv2_jax.main --config=configs/finetune_b16.py:data=in21k --workdir=runs/b16_21k --config.init_from=runs/beitv2_b16 \
      --config.data.source=list:INDEX.jsonl
  python -m beitv2_jax.main --config=configs/finetune_b16.py:pretrained=21k --workdir=runs/b16_21k_ft --config.init_from=runs/b16_21k
  python -m beitv2_jax.main --config=configs/finetune_b16.py:size=384 --workdir=runs/b16_384 --config.init_from=runs/b16_ft
  python -m beitv2_jax.main --config=configs/finetune_b16.py:scratch --workdir=runs/b16_scratch            the control
  python -m beitv2_jax.main --config=configs/finetune_b16.py:encoder --workdir=runs/vqkd_ft --config.init_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/finetune_b16.py:smoke --workdir=runs/smoke

Arguments: pretrained=300|1600|21k, size=224|384|512, data=in1k|in21k, crop=official|timm (of the evaluation), encoder (fine-tune a
VQ-KD encoder, the paper's grey rows), scratch, smoke. Position tables are resampled when the size differs.
"""

from ml_collections import ConfigDict

from beitv2_jax import config
from beitv2_jax.errors import UserError

SIZE = dict(width=768, depth=12, heads=12, layer_scale=0.1)
# (lr, epochs, warmup epochs, layer decay, drop path, mixup, cutmix)
RECIPES = {
  '300': (5e-4, 100, 20, 0.65, 0.1, 0.8, 1.0),
  '1600': (5e-4, 100, 20, 0.6, 0.2, 0.8, 1.0),
  '21k': (5e-5, 30, 20, 0.75, 0.1, 0.0, 0.0),
  'in21k': (6e-4, 90, 20, 0.75, 0.1, 0.8, 1.0),
}
TIMM_CROP = 0.9


def get_config(arg=None):
  return recipe(arg, SIZE, RECIPES, TIMM_CROP)


def recipe(arg, size, recipes, timm_crop):
  arg = config.parse_arg(arg, pretrained='1600', size=224, data='in1k', crop='official', encoder=False, scratch=False, smoke=False)
  which = 'in21k' if arg.data == 'in21k' else arg.pretrained
  if which not in recipes or arg.data not in ('in1k', 'in21k') or arg.crop not in ('official', 'timm'):
    raise UserError('recipe arguments: pretrained=300, 1600 or 21k; data=in1k or in21k; crop=official or timm.')
  if arg.size % 16 or arg.size < 32:
    raise UserError(f'recipe argument size={arg.size}: a multiple of 16, such as 224, 384 or 512.')
  lr, epochs, warmup, layer_decay, drop_path, mixup, cutmix = recipes[which]
  c = config.base('classifier').unlock()
  c.batch_size = 4096 if arg.data == 'in21k' else 1024
  c.epochs = float(epochs)
  c.model = ConfigDict(
    dict(
      **size,
      patch_size=16,
      mlp_ratio=4.0,
      drop_path=drop_path,
      abs_pos=False,
      rel_pos='per_block',
      mean_pooling=True,  # False: classify the [CLS] token
      head_scale=0.001,
      classes=0,  # filled in from the data
    )
  )
  if arg.encoder:
    c.model.update(abs_pos=True, rel_pos='none', layer_scale=0.0)
  c.class_names = ()  # filled in from the data
  c.fresh_head = False  # start a new head where init_from knows other classes
  c.rand_augment = 9.0  # magnitude; 0: none, and color_jitter instead
  c.color_jitter = 0.4
  c.random_erasing = 0.25
  c.mixup, c.cutmix, c.label_smoothing = mixup, cutmix, 0.1
  c.ema_decay = 0.0  # such as 0.9999: a running average of the weights, evaluated beside them
  c.data.image_size = arg.size
  c.data.crop_pct = timm_crop if arg.crop == 'timm' else 0.875 if arg.size < 384 else 1.0
  c.optim.update(
    lr=lr, min_lr=1e-6, warmup_epochs=float(warmup), b2=0.999, weight_decay=0.05, layer_decay=1.0 if arg.scratch else layer_decay
  )
  c.eval_every = 12510  # ten epochs of ImageNet-1k
  if arg.smoke:
    config.smoke(c)
    c.model.update(width=32, depth=3, heads=2, patch_size=8)
    c.eval_every = 0
  return c.lock()
