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
# # Your own images: from a folder to a classifier
#
# A small tokenizer, pretraining on its codes, fine-tuning, and predictions; and the same model without pretraining, to see what it
# was good for. Sized for 15 minutes on Colab's free GPU; on a CPU it takes fewer steps.

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
# **Images.** One folder a class, or a zip of such folders; `train` and `val` folders of them if you have both, or else some are held out. Without any,
# it takes scikit-learn's handwritten digits.

# %%
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

IMAGES = ''  # a folder, or a .zip

if IMAGES.endswith('.zip'):
  zipfile.ZipFile(IMAGES).extractall('images')
  IMAGES = 'images'
if not IMAGES:
  IMAGES, digits = 'images', load_digits()
  for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
    folder = Path('images', 'train' if i < 1297 else 'val', str(label))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 / 16 * pixels).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f'{i}.png')

# %% [markdown]
# **Stages.** `configs/transfer.py` has five small stages. Each is one call, which goes on where it was if you run it again. How long they
# train is set here.

# %%
GPU = jax.default_backend() != 'cpu'
STEPS = dict(teacher=1500, vqkd=1500, pretrain=4000, finetune=1200) if GPU else dict(teacher=300, vqkd=300, pretrain=600, finetune=240)
if QUICK:
  STEPS = dict.fromkeys(STEPS, 3)


def stage(name, workdir, **more):
  changes = {'data.source': f'folder:{IMAGES}', 'data.flip': False, 'steps': STEPS[name], 'optim.warmup_steps': STEPS[name] // 10 + 1}
  config = beitv2_jax.recipe(f'configs/transfer.py:stage={name}', changes | more)
  return beitv2_jax.train(config, workdir)


# %% [markdown]
# **A teacher.** The tokenizer needs a model that knows something of images. With a network it is DINOv2 (small; Apache-2.0), which has never seen
# a label. Without one, a small CLIP learns from your class names, so the labels do play a part, and the comparison below flatters
# pretraining.

# %%
teacher = {'teacher.kind': 'dinov2', 'teacher.name': 'facebook/dinov2-small'}
try:
  if QUICK:
    raise OSError('the tests use no network')
  from huggingface_hub import snapshot_download

  snapshot_download('facebook/dinov2-small', allow_patterns=['config.json', '*.safetensors'])
except Exception as e:
  print(f'DINOv2 could not be fetched ({type(e).__name__}); training a small CLIP instead')
  stage('teacher', 'teacher')
  teacher = {'teacher.kind': 'clip', 'teacher.name': 'teacher/hf'}

# %% [markdown]
# **The tokenizer**, then **pretraining**: the model sees images with patches hidden and predicts their codes. No labels are used.

# %%
scores = stage('vqkd', 'vqkd', **teacher)
print(f'{scores["codes_used"]:.0f} % of the codes are used')

# %%
scores = stage('pretrain', 'pretrained', tokenizer_from='vqkd')
print(f'{scores["mim_acc_1"]:.1f} % of the hidden codes are predicted right')

# %% [markdown]
# **Fine-tuning**, from the pretrained weights and from fresh ones, everything else equal.

# %%
table = {
  'pretrained': stage('finetune', 'finetuned', init_from='pretrained')['acc1'],
  'from scratch': stage('finetune', 'scratch', **{'optim.layer_decay': 1.0})['acc1'],
}
for name, accuracy in table.items():
  print(f'{name:14} {accuracy:5.1f} % right on held-out images')

# %% [markdown]
# One run each: a difference of a point or two is chance. `python -m beitv2_jax study` makes tables with seeds and controls.
#
# **Predictions.**

# %%
from IPython.display import display

from beitv2_jax.downstream import image_files, predictions

model = beitv2_jax.load('finetuned')
files = image_files.find_images([f'{IMAGES}/val' if Path(IMAGES, 'val').is_dir() else IMAGES])
for row in predictions.classes(model, files[:: max(len(files) // 5, 1)][:5], top=3):
  display(Image.open(row['file']).resize((96, 96)))
  print(row['file'], [(c['name'], round(c['probability'], 2)) for c in row['classes']])

# %% [markdown]
# **Take it along**: to timm or Hugging Face, with the class names and the image preparation.

# %%
from beitv2_jax.weights import convert

convert.export_checkpoint('finetuned', 'for_timm', 'timm')
print(sorted(path.name for path in Path('for_timm').iterdir()))
