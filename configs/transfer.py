"""A tiny model through every stage and protocol, on images of a few thousand: what docs/results.md was made with.

benchmarks/transfer.py runs the stages in turn, from pretraining and from scratch, and prints the table. By hand:

  python -m beitv2_jax.main --config=configs/transfer.py:stage=teacher --workdir=runs/transfer/teacher --config.data.source=folder:CAPTIONED
  python -m beitv2_jax.main --config=configs/transfer.py:stage=vqkd --workdir=runs/transfer/vqkd --config.data.source=folder:IMAGES
  python -m beitv2_jax.main --config=configs/transfer.py:stage=pretrain --workdir=runs/transfer/pretrain --config.data.source=folder:IMAGES
  python -m beitv2_jax.main --config=configs/transfer.py:stage=finetune --workdir=runs/transfer/finetune --config.data.source=folder:IMAGES \
      --config.init_from=runs/transfer/pretrain        (without init_from: from scratch)
  python -m beitv2_jax.main --config=configs/transfer.py:stage=segment --workdir=runs/transfer/segment --config.data.source=scenes:SCENES \
      --config.init_from=runs/transfer/pretrain

size=small is a ViT-S of 32 px and 4 px patches for one GPU, made for CIFAR-10's 50,000 images: 100 epochs of each stage. Give it to `study`:

  python -m beitv2_jax study targets --config configs/transfer.py:size=small --data folder:CIFAR10 --finetune --minutes 4.5
"""

from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, vqkd_b16
from ml_collections import ConfigDict

from beitv2_jax import config
from beitv2_jax.errors import UserError

SIZES = dict(tiny=dict(width=96, depth=4, heads=4), small=dict(width=384, depth=12, heads=6))
SIZE = SIZES['tiny']
PIXELS, PATCH = 48, 8


def get_config(arg=None):
  arg = config.parse_arg(arg, stage='pretrain', size='tiny')
  if arg.size not in SIZES:
    raise UserError(f'recipe argument size={arg.size}: one of {", ".join(SIZES)}.')
  c = config.stage_of(dict(teacher=teacher, vqkd=vqkd, pretrain=pretrain, finetune=finetune, segment=segment), arg.stage)
  c.dtype = 'float32'
  c.data.image_size = 96 if arg.stage == 'segment' else PIXELS
  c.data.crop_pct = 0.875
  c.checkpoint.every, c.log_every, c.eval_every = 1000, 50, 0
  c.eval_batch_size = 24 if arg.stage == 'segment' else 96
  if arg.size == 'small':
    enlarge(c, arg.stage)
  return c.lock()


def enlarge(c, stage):
  """To a ViT-S, in bfloat16: 100 epochs of CIFAR-10 in batches of 512, with a grid of 8 x 8."""
  c.update(dtype='bfloat16', batch_size=512, epochs=100.0, eval_batch_size=512, steps=-1)
  c.data.update(image_size=32, crop_pct=1.0)
  c.optim.update(warmup_steps=-1, warmup_epochs=5.0)
  if stage == 'vqkd':
    c.model.update(patch_size=4, codes=1024, code_dim=32)
    c.model.encoder.update(SIZES['small'])
    c.model.decoder.update(width=384, depth=1, heads=6)
  else:
    c.model.update(SIZES['small'], patch_size=4)
  if stage == 'pretrain':
    c.model.early_layer = 9
    c.mask.update(count=26, min_block=6)
    c.optim.lr = 1.5e-3
  if stage == 'finetune':
    c.model.drop_path = 0.1
  if stage == 'segment':
    c.update(batch_size=32, steps=1000)
    c.model.update(out_indices=(2, 5, 8, 11), channels=128, aux_channels=64)


def teacher():
  c = config.base('clip').unlock()
  c.update(batch_size=128, steps=2000)
  c.caption = 'a photo of a {}.'
  c.model = ConfigDict(dict(**SIZE, patch_size=PATCH, projection=64, text_length=8))
  c.data.crop_scale = (0.4, 1.0)
  c.optim.update(lr=1e-3, warmup_steps=100, weight_decay=0.1, clip_norm=1.0)
  return c


def vqkd():
  c = vqkd_b16.get_config('small_data').unlock()
  c.update(batch_size=64, steps=1500)
  c.model.update(patch_size=PATCH, codes=256, code_dim=16, init_scheme='torch')
  c.model.encoder.update(**SIZE)
  c.model.decoder.update(width=96, depth=1, heads=4)
  c.teacher.name = 'runs/transfer/teacher/hf'
  c.optim.update(lr=1e-3, warmup_steps=100)
  return c


def pretrain():
  c = beitv2_b16.get_config('epochs=300').unlock()
  c.update(batch_size=64, steps=2000, tokenizer_from='runs/transfer/vqkd')
  c.model.update(**SIZE, patch_size=PATCH, early_layer=3, layer_scale=1.0, init_scheme='torch')
  c.mask.update(count=14, min_block=4)
  c.optim.update(lr=2e-3, warmup_steps=200)
  return c


def finetune():
  c = finetune_b16.get_config().unlock()
  c.update(batch_size=64, epochs=12.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, random_erasing=0.0)
  c.model.update(**SIZE, patch_size=PATCH, layer_scale=1.0, drop_path=0.0)
  c.data.crop_scale = (0.3, 1.0)
  c.optim.update(lr=1e-3, warmup_epochs=1.0, layer_decay=0.85)
  return c


def segment():
  c = ade20k_b16.get_config().unlock()
  c.update(batch_size=8, steps=400)
  c.model.update(
    **SIZE, patch_size=PATCH, layer_scale=1.0, drop_path=0.0, channels=32, aux_channels=16, out_indices=(0, 1, 2, 3), classes=11
  )
  c.labels.update(reduce_zero=False, ignore=(11, 255))  # CamVid: 11 is void
  c.data.resize_ratio = (0.75, 1.5)
  c.optim.update(lr=1e-3, warmup_steps=40, layer_decay=0.85)
  return c
