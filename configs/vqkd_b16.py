"""VQ-KD, the visual tokenizer: ViT-B/16 encoder, 8192 codes of 32 dimensions, a shallow decoder taught by CLIP-B/16.

Recipe: the official one for ImageNet-1k, 100 epochs at batch 512 (8 GPUs x 64). The learning rate is 5e-5 per 128 images.
Expected: 100 % of the codes used with decoder=1, 97 % with decoder=3, 100 % with teacher=dino,decoder=1
(official README, on ImageNet-1k).

  python -m beitv2_jax.main --config=configs/vqkd_b16.py --workdir=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/vqkd_b16.py:teacher=dino,decoder=1 --workdir=runs/vqkd_b16_dino
  python -m beitv2_jax.main --config=configs/vqkd_b16.py:small_data --workdir=runs/mine --config.data.source=folder:PATH
  python -m beitv2_jax.main --config=configs/vqkd_b16.py:quantizer=fsq --workdir=runs/vqkd_fsq
  python -m beitv2_jax.main --config=configs/vqkd_b16.py:smoke --workdir=runs/smoke
"""

from ml_collections import ConfigDict

from beitv2_jax import config
from beitv2_jax.errors import UserError


def get_config(arg=None):
  arg = config.parse_arg(arg, teacher='clip', decoder=3, small_data=False, quantizer='ema', smoke=False)
  c = config.base('tokenizer').unlock()
  c.batch_size = 512
  c.epochs = 100.0
  c.model = config.tokenizer_model()
  c.model.decoder.depth = arg.decoder
  config.choose_quantizer(c.model, arg.quantizer, levels=(8, 8, 8, 16))  # ema, rotation, simvq or fsq
  names = dict(
    clip='openai/clip-vit-base-patch16', open_clip='laion/CLIP-ViT-B-16-laion2B-s34B-b88K', dino='facebook/dino-vitb16', dinov2='facebook/dinov2-base', siglip='google/siglip2-base-patch16-224',
    dinov3='facebook/dinov3-vitb16-pretrain-lvd1689m', timm='', stage='', python='', disk='',
  )  # fmt: skip
  if arg.teacher not in names:
    raise UserError(f'recipe argument teacher={arg.teacher}: one of {", ".join(names)}.')
  c.teacher = ConfigDict(
    dict(kind=arg.teacher, name=names[arg.teacher], layers=())
  )  # layers=(9, 12): the mean of these blocks; (): the last
  c.codebook = ConfigDict(
    dict(
      kmeans=True,  # start from k-means of the first global batch
      kmeans_samples=0,  # 0: all its tokens; the official code saw one device's 12,544
      beta=1.0,  # weight of the commitment loss
      revive=0.01 if arg.small_data else 0.0,  # chance a step that a dead code moves onto a token; 0 as the official code
    )
  )
  c.optim.update(
      lr=5e-5 * c.batch_size / 128, min_lr=1e-5, warmup_epochs=10.0, b2=0.99, weight_decay=1e-4,
      no_decay=('.*pos_embed', '.*cls_token'),
  )  # fmt: skip
  if arg.smoke:
    config.smoke(c)
    c.model = config.tiny_tokenizer()
    config.choose_quantizer(c.model, arg.quantizer, levels=(8, 4))
    c.teacher.kind = 'untrained'
  return c.lock()
