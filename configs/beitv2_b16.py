"""BEiT v2 base: masked image modelling on VQ-KD codes with patch aggregation, ImageNet-1k, batch 2048.

Recipe: the official one. The official runs used 16 GPUs x 128. Expected after fine-tuning (official README): 85.5 % top-1
from 1600 epochs, 85.0 % from 300. The tokenizer is the one with the 3-layer decoder.

  python -m beitv2_jax.main --config=configs/beitv2_b16.py --workdir=runs/beitv2_b16 --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/beitv2_b16.py:epochs=300 --workdir=runs/b16_300 --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/beitv2_b16.py:smoke --workdir=runs/smoke

Controls, with all else equal: `aggregation=False` (BEiT's way), `target=features` (the teacher's features instead of codes), `target=pixels`
(normalised patches), `mask=random`.

  python -m beitv2_jax.main --config=configs/beitv2_b16.py:target=features --workdir=runs/b16_features
"""

from ml_collections import ConfigDict

from beitv2_jax import config


def get_config(arg=None):
  arg = config.parse_arg(arg, epochs=1600, target='codes', aggregation=True, mask='block', smoke=False)
  c = config.base('pretrain').unlock()
  c.tokenizer_from = ''  # workdir of a trained tokenizer
  c.target = arg.target  # 'codes'; for comparison 'features' of a teacher, or normalised 'pixels' (tasks/regress.py)
  c.teacher = ConfigDict(dict(kind='clip', name='openai/clip-vit-base-patch16', layers=()))  # of target=features
  c.tokenizer_dtype = 'float32'  # bfloat16 moves codes
  c.batch_size = 2048
  c.epochs = float(arg.epochs)
  long = arg.epochs > 300
  c.model = ConfigDict(
    dict(
      width=768,
      depth=12,
      heads=12,
      patch_size=16,
      mlp_ratio=4.0,
      layer_scale=0.1,
      drop_path=0.1 if long else 0.0,
      early_layer=9,  # patch aggregation reads the patches after this block
      head_layers=2 if arg.aggregation else 0,  # 0: no patch aggregation
      shared_head=True,
      init_scheme='truncated',
      aggregation_init='torch',  # as the official code; 'truncated' is like the other blocks
      vocab=0,  # filled in from the tokenizer
    )
  )
  c.mask = ConfigDict(dict(kind=arg.mask, count=75, min_block=16, max_block=0, min_aspect=0.3))
  c.color_jitter = 0.4
  c.color_jitter_on = 'host'  # before the crop, as the official code; 'device': after it, at no cost for the host
  c.data.crop_scale = (0.2, 1.0)
  c.optim.update(lr=1.5e-3, min_lr=1e-5, warmup_epochs=10.0, b2=0.999 if long else 0.98, weight_decay=0.05, clip_norm=3.0)
  if arg.smoke:
    config.smoke(c)
    c.tokenizer_from, c.teacher.kind = 'untrained', 'untrained'
    c.model.update(width=32, depth=3, heads=2, patch_size=8, early_layer=2)
    c.mask.update(count=6, min_block=2)
  return c.lock()
