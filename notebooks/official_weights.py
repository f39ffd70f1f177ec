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
# # Official weights: in, checked, and out again
#
# The paper's checkpoints are PyTorch files. They are read here without PyTorch, and without running what is in them. A network is needed
# to fetch them (440 MB for the tokenizer); without one, a small file in the same format takes their place, so that every step can be seen.

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
# **The file.** The older links of the official repository are dead; this address was found in public code.

# %%
import urllib.request
from pathlib import Path

OFFICIAL = 'https://github.com/addf400/files/releases/download/BEiT-v2/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth'
FILE = Path('vqkd_clip.pth')

if not FILE.exists() and not QUICK:
  try:
    urllib.request.urlretrieve(OFFICIAL, 'vqkd_clip.part')
    Path('vqkd_clip.part').rename(FILE)
  except OSError as e:
    print(f'not fetched ({e}); a small file in the same format takes its place')
real = FILE.exists()
if not real:
  from safetensors.numpy import save_file

  from beitv2_jax.models import from_config
  from beitv2_jax.weights import official

  sides = {f'model.{side}.{key}': value for side in ('encoder', 'decoder') for key, value in dict(width=64, heads=1).items()}
  small = beitv2_jax.recipe('configs/vqkd_b16.py:smoke', sides | {'model.teacher_width': 24})
  FILE = Path('small.safetensors')
  save_file(official.from_ours('tokenizer', from_config.fresh_variables(small, 0)), FILE)

# %% [markdown]
# **Import.** `--list` shows where every array goes; without it the directory `tokenizer` is made, which every stage takes.


# %%
def run(*words):
  done = subprocess.run([sys.executable, '-m', 'beitv2_jax', *words], capture_output=True, text=True)
  print(done.stdout[-1500:] + done.stderr[-500:])
  done.check_returncode()


run('convert', 'import', '--kind', 'tokenizer', '--from', str(FILE), '--list')
run('convert', 'import', '--kind', 'tokenizer', '--from', str(FILE), '--out', 'tokenizer')

# %% [markdown]
# **Codes of a photo.**

# %%
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from beitv2_jax.downstream import image_files

Image.fromarray(load_sample_images().images[0]).save('photo.png')
model = beitv2_jax.load('tokenizer')
((_, image),) = image_files.prepared([Path('photo.png')], model.config.data.image_size, batch=1)
codes = np.asarray(model.tokens(image))[0]
print(codes)

# %% [markdown]
# **Out again.** The exported file has the official names, and comes back to the same codes.

# %%
run('convert', 'export', '--from', 'tokenizer', '--to-format', 'official', '--out', 'again.safetensors')
run('convert', 'import', '--kind', 'tokenizer', '--from', 'again.safetensors', '--out', 'tokenizer_again')
assert (np.asarray(beitv2_jax.load('tokenizer_again').tokens(image))[0] == codes).all()

# %% [markdown]
# **Classifiers to timm and Hugging Face.** A directory has the class names and the image preparation in it. Here a fine-tuned model of yours would
# stand; this one has random weights.

# %%
from safetensors.numpy import save_file

from beitv2_jax.models import from_config
from beitv2_jax.weights import convert, official

small = beitv2_jax.recipe('configs/finetune_b16.py:smoke', {'model.classes': 5, 'model.width': 64, 'model.heads': 1})
save_file(official.from_ours('classifier', from_config.fresh_variables(small, 0)), 'classifier.safetensors')
convert.import_checkpoint('classifier', 'classifier.safetensors', 'classifier')
for form in ('timm', 'hf'):
  convert.export_checkpoint('classifier', form, form)
  print(form, sorted(path.name for path in Path(form).iterdir()))

# %% [markdown]
# **There.** `timm.create_model('local-dir:timm', pretrained=True)` and `pipeline('image-classification', 'hf')` then give our probabilities.
# If torch and timm are installed, here is the proof.

# %%
try:
  import timm
  import torch
except (ImportError, RuntimeError) as e:  # torch and torchvision of different versions raise the latter
  print(f'torch and timm cannot be used here ({e}); nothing to compare with')
else:
  theirs = timm.create_model('local-dir:timm', pretrained=True).eval()
  prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
  photo = Image.open('photo.png').convert('RGB')
  with torch.no_grad():
    expected = theirs(prepare(photo)[None])[0].numpy()
  ours = beitv2_jax.load('classifier')
  ((_, pixels),) = image_files.prepared([Path('photo.png')], ours.config.data.image_size, batch=1)
  print('largest difference of a logit:', float(np.abs(np.asarray(ours.logits(pixels))[0] - expected).max()))
