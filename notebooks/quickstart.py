# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: the codes of a photo
#
# A visual tokenizer turns every patch of an image into one of a few hundred or thousand *codes*: a picture becomes a small grid of
# numbers, as a text becomes a list of word numbers. Here you train a small one in a minute or two, look at the codes of a photo, and
# find other patches with the same code.

# %% [markdown]
# **Set-up.** On Colab this installs the package; it takes a minute or two. On a machine that has it already it does nothing.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec('beitv2_jax') is None:
  extras = 'demo,explore,tpu' if 'COLAB_TPU_ADDR' in os.environ or os.path.exists('/dev/accel0') else 'demo,explore'
  source = os.environ.get('BEITV2_JAX', f'beitv2_jax[{extras}] @ git+https://github.com/beitv2-jax/beitv2_jax')
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', source], check=True)

import jax

import beitv2_jax

QUICK = bool(os.environ.get('BEITV2_JAX_QUICK'))  # the tests run this notebook with a handful of steps
print(beitv2_jax.__version__, 'on', jax.devices())

# %% [markdown]
# **Photos.** Two photographs come with scikit-learn; we cut them into overlapping squares. Set `FOLDER` to a folder of your own
# images to use those instead.

# %%
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

FOLDER = ''

if not FOLDER:
  FOLDER = 'photos'
  Path(FOLDER).mkdir(exist_ok=True)
  for n, photo in enumerate(load_sample_images().images):
    for top in range(0, 427 - 160, 40):
      for left in range(0, 640 - 160, 40):
        Image.fromarray(photo[top : top + 160, left : left + 160]).save(f'{FOLDER}/{n}_{top}_{left}.png')
print(len(list(Path(FOLDER).iterdir())), 'images')

# %% [markdown]
# **A teacher.** The tokenizer learns to predict, from a patch's code, what a frozen *teacher* says of that patch. The paper's teacher is
# CLIP. This one needs no download: it describes a patch by the colours of its four quarters, so the codes will follow colour and edges,
# not meaning. With a network connection, `'teacher.kind': 'clip', 'teacher.name': 'openai/clip-vit-base-patch16'` in the next cell but one takes CLIP.

# %%
Path('colour_teacher.py').write_text("""
import jax

def load(grid, dtype):
  def apply(params, images):
    rows, columns = grid
    small = jax.image.resize(images, (len(images), 2 * rows, 2 * columns, 3), 'linear')
    quarters = small.reshape(-1, rows, 2, columns, 2, 3).swapaxes(2, 3)
    return quarters.reshape(len(images), rows * columns, 12).astype(dtype) - 0.5

  return 12, {}, apply
""")

# %% [markdown]
# **Training.** A recipe is a Python file with all settings; the dictionary changes a few. Run the cell again and it goes on where it
# was: everything is kept in the folder `tokenizer`.

# %%
config = beitv2_jax.recipe('configs/vqkd_b16.py:small_data', {
  'data.source': f'folder:{FOLDER}', 'data.image_size': 96, 'teacher.kind': 'python', 'teacher.name': 'colour_teacher.py',
  'model.patch_size': 8, 'model.codes': 64, 'model.code_dim': 16, 'model.init_scheme': 'torch',
  'model.encoder.width': 96, 'model.encoder.depth': 3, 'model.encoder.heads': 3,
  'model.decoder.width': 96, 'model.decoder.depth': 1, 'model.decoder.heads': 3,
  'dtype': 'float32', 'batch_size': 16, 'steps': 4 if QUICK else 300, 'eval_batch_size': 16,
  'optim.lr': 1e-3, 'optim.warmup_steps': 2 if QUICK else 30, 'log_every': 50,
})  # fmt: skip
scores = beitv2_jax.train(config, 'tokenizer')
print(f'{scores["codes_used"]:.0f} % of the codes are used on images that it has not seen')

# %% [markdown]
# **Codes.** `tokens` gives the code of every patch. In the picture each code has a colour of its own.

# %%
from IPython.display import display

from beitv2_jax.downstream import image_files
from beitv2_jax.reports import draw

model = beitv2_jax.load('tokenizer')
photos = sorted(Path(FOLDER).iterdir())
_, images = next(image_files.prepared(photos[:: max(len(photos) // 64, 1)], model.config.data.image_size, batch=64))
codes = np.asarray(model.tokens(images))
print(codes[0])
pair = np.concatenate([images[0], draw.overlay(images[0], codes[0], model.config.model.codes)], 1)
display(Image.fromarray(pair).resize((768, 384), Image.Resampling.NEAREST))

# %% [markdown]
# **Other patches with the same code.** Each strip is one code, with patches that have it.

# %%
display(draw.gallery(images, codes, model.config.model.codes, codes_shown=24, across=3, scale=3))

# %% [markdown]
# **Next**: `explore_codebook` for a page to click through, `your_own_images` for the whole chain from a tokenizer to a classifier,
# `official_weights` for the paper's own tokenizer.
