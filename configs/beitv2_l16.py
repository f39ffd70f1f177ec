"""BEiT v2 large: as base (configs/beitv2_b16.py), with a ViT-L/16 and the same base-size tokenizer.

The official runs used 64 GPUs x 32. Expected after fine-tuning (official README): 87.3 % top-1 from 1600 epochs, 86.6 % from
300.

  python -m beitv2_jax.main --config=configs/beitv2_l16.py --workdir=runs/beitv2_l16 --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/beitv2_l16.py:epochs=300 --workdir=runs/l16_300 --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/beitv2_l16.py:smoke --workdir=runs/smoke
"""

from beitv2_jax.configs import beitv2_b16


def get_config(arg=None):
  c = beitv2_b16.get_config(arg).unlock()
  c.model.layer_scale = 1e-5
  if c.model.width == 768:  # not the smoke size
    c.model.update(width=1024, depth=24, heads=16, early_layer=21)
  return c.lock()
