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
# # Explore a codebook, and see where a model looks
#
# The demo trains the whole chain on handwritten digits: a teacher, a tokenizer, a model pretrained on its codes, and a decoder that draws
# codes as pixels. Then we look into it. Some minutes on a CPU.

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
# **Train the chain.** `--steps 0.5` takes half of the usual steps.

# %%
steps = '0.01' if QUICK else '0.5'
done = subprocess.run([sys.executable, '-m', 'beitv2_jax', 'demo', '--out', 'demo', '--steps', steps], stdout=subprocess.PIPE, text=True)
print(done.stdout[-1500:])
PRETRAINED, DATA = 'demo/pretrained', 'digits'  # or a model and images of yours

# %% [markdown]
# **What a model imagines.** From the top: digits it has not seen; what it is shown; the digits drawn from their 16 codes alone; what it
# imagines behind the mask, in three steps.

# %%
from IPython.display import IFrame, Image, display

display(Image('demo/imagined.png'))

# %% [markdown]
# **Where it looks.** Each sheet shows an image, its patch features in colours (three principal components), and what the [CLS] token
# attends to in the last block, all heads together and each alone.

# %%
import numpy as np

from beitv2_jax.data import decode, sources, transforms
from beitv2_jax.pictures import attention

model = beitv2_jax.load(PRETRAINED)
source, crop = decode.Decoded(sources.make(DATA, 'eval')), transforms.CenterCrop(model.config.data.image_size, 1.0)
images = np.stack([crop(source[i], None)['image'] for i in range(8)])
features = np.asarray(model.features(images)['patches']).reshape(8, *model.grid, -1)
for sheet in attention.sheets(images, np.asarray(model.attention(images)), features, patch=None)[:3]:
  display(sheet)

# %% [markdown]
# **The same for one patch**: where it looks, and which patches are like it.

# %%
display(attention.sheets(images, np.asarray(model.attention(images)), features, patch=(1, 2))[0])

# %% [markdown]
# **The explorer**: every code with the patches that have it, every image with its codes, a map of the codebook. The demo has made one; for your own
# models: `python -m beitv2_jax explore --from TOKENIZER --data folder:PATH --out explorer`.

# %%
try:
  from google.colab import output  # Colab shows local pages through a port

  subprocess.Popen([sys.executable, '-m', 'http.server', '8765', '--directory', 'demo/explorer'])
  output.serve_kernel_port_as_iframe(8765, height=700)
except ImportError:
  display(IFrame('demo/explorer/index.html', width='100%', height=700))
