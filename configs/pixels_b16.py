"""From codes back to pixels: a decoder for a frozen tokenizer, to see what its codes stand for. Any tokenizer will do: a workdir, or an imported one.

The recipe is ours (the paper's authors describe such a decoder and give no recipe): four blocks of base width, mean absolute error.
`shuffled` is the control: the decoder gets the codes of another image.

  python -m beitv2_jax.main --config=configs/pixels_b16.py --workdir=runs/pixels --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/pixels_b16.py:shuffled --workdir=runs/pixels_control --config.tokenizer_from=runs/vqkd_b16
  python -m beitv2_jax.main --config=configs/pixels_b16.py:smoke --workdir=runs/smoke
"""

from ml_collections import ConfigDict

from beitv2_jax import config


def get_config(arg=None):
  arg = config.parse_arg(arg, shuffled=False, smoke=False)
  c = config.base('pixels').unlock()
  c.batch_size = 256
  c.epochs = 10.0
  c.tokenizer_from = ''
  c.tokenizer_dtype = 'float32'  # codes move with it
  c.shuffled = arg.shuffled
  # patch_size, codes and code_dim are the tokenizer's
  c.model = ConfigDict(dict(patch_size=16, codes=8192, code_dim=32, width=768, depth=4, heads=12, mlp_ratio=4.0, init_scheme='normal'))
  c.data.crop_scale = (0.5, 1.0)  # most of an image: what is drawn is to be recognised
  c.optim.update(lr=3e-4, min_lr=1e-6, warmup_epochs=0.5, b2=0.99, clip_norm=1.0)
  if arg.smoke:
    config.smoke(c)
    c.tokenizer_from = 'untrained'
    c.model.update(patch_size=8, codes=32, code_dim=8, width=32, depth=1, heads=2)
  return c.lock()
