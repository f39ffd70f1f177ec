"""The whole chain at toy size on scikit-learn's digits, as `make demo` runs it: stage=teacher, then vqkd, pretrain, pixels. `study` also
fine-tunes: stage=finetune.

  python -m beitv2_jax.main --config=configs/demo.py:stage=teacher --workdir=runs/demo/teacher
  python -m beitv2_jax.main --config=configs/demo.py:stage=vqkd --workdir=runs/demo/vqkd --config.teacher.name=runs/demo/teacher/hf
  python -m beitv2_jax.main --config=configs/demo.py:stage=pretrain --workdir=runs/demo/pretrained --config.tokenizer_from=runs/demo/vqkd
  python -m beitv2_jax.main --config=configs/demo.py:stage=pixels --workdir=runs/demo/pixels --config.tokenizer_from=runs/demo/vqkd

Images of your own: add --config.data.source=folder:PATH to each (class folders; their names become the captions).
"""

from beitv2_jax.configs import beitv2_b16, finetune_b16, pixels_b16, vqkd_b16
from ml_collections import ConfigDict

from beitv2_jax import config


def get_config(arg=None):
  arg = config.parse_arg(arg, stage='vqkd')
  c = config.stage_of(dict(teacher=teacher, vqkd=vqkd, pretrain=pretrain, pixels=pixels, finetune=finetune), arg.stage)
  c.dtype = 'float32'
  c.data.update(source='digits', image_size=32, crop_pct=1.0, flip=False)
  if arg.stage != 'teacher':  # a digit fills its picture; the small teacher needs variety more than the later stages do
    c.data.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
  else:
    c.data.update(crop_scale=(0.85, 1.0), crop_ratio=(0.9, 1.1))
  c.checkpoint.every = 500
  c.log_every = 25
  c.eval_batch_size = 96  # divides over up to eight devices
  return c.lock()


def teacher():
  c = config.base('clip').unlock()
  c.update(batch_size=64, steps=450)
  c.caption = 'a photo of the digit {}.'
  c.model = ConfigDict(dict(width=64, depth=5, heads=4, patch_size=8, projection=64, text_length=8))
  c.optim.update(lr=2e-3, warmup_steps=50, weight_decay=0.5, clip_norm=1.0)
  return c


def vqkd():
  c = vqkd_b16.get_config(
    'small_data'
  ).unlock()  # 1,297 images: without revival 81 to 100 % of the codes are used, with it 100 % (seeds 0 to 2)
  c.update(batch_size=64, steps=600)
  # Narrow layers need larger weights than the official 0.02, which is made for width 768.
  c.model.update(patch_size=8, codes=64, code_dim=16, init_scheme='torch')
  c.model.encoder.update(width=64, depth=2, heads=4)
  c.model.decoder.update(width=64, depth=1, heads=4)
  c.teacher.name = 'runs/demo/teacher/hf'
  c.optim.update(lr=2e-3, warmup_steps=60)
  return c


def pixels():
  c = pixels_b16.get_config().unlock()
  c.update(batch_size=64, steps=600, tokenizer_from='runs/demo/vqkd')
  c.model.update(width=64, depth=2, heads=4, init_scheme='torch')
  c.optim.update(lr=3e-3, warmup_steps=30)
  return c


def pretrain():
  c = beitv2_b16.get_config('epochs=300').unlock()
  c.update(batch_size=32, steps=3000, tokenizer_from='runs/demo/vqkd', color_jitter=0.0)
  c.model.update(width=64, depth=4, heads=4, patch_size=8, early_layer=3, layer_scale=1.0, init_scheme='torch')
  c.mask.update(count=6, min_block=2)
  c.optim.update(lr=4e-3, warmup_steps=100)
  return c


def finetune():
  c = finetune_b16.get_config().unlock()
  c.update(batch_size=32, epochs=10.0, mixup=0.0, cutmix=0.0, rand_augment=0.0, color_jitter=0.0, random_erasing=0.0)
  c.model.update(width=64, depth=4, heads=4, patch_size=8, layer_scale=1.0, drop_path=0.0)
  c.optim.update(lr=1e-3, warmup_epochs=1.0, layer_decay=0.85)
  return c
