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
# # All devices of a TPU host, and a pod before you rent it
#
# The same commands run on CPUs, GPUs and TPUs. This notebook uses all devices of the host it runs on, and asks the TPU compiler what a slice
# would do with a recipe. It runs on a CPU too, where the devices are make-believe.

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

if not any(os.path.exists(p) for p in ('/dev/accel0', '/dev/vfio/0', '/dev/nvidia0')):
  os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=4')  # four make-believe devices

import jax

import beitv2_jax

QUICK = bool(os.environ.get('BEITV2_JAX_QUICK'))  # the tests run this notebook with a handful of steps
print(beitv2_jax.__version__, 'on', jax.devices())

# %% [markdown]
# **All devices, by default.** A batch is split over them; parameters and Adam's moments lie in parts, as in ZeRO. `mesh.model=2` would also split
# heads, MLP and vocabulary.

# %%
changes = dict.fromkeys(('batch_size', 'eval_batch_size'), 4 * jax.device_count())
scores = beitv2_jax.train(beitv2_jax.recipe('configs/beitv2_b16.py:smoke', changes), 'smoke')
print(scores)

# %% [markdown]
# **The same numbers on any number of devices.** The first loss of one device and of all of them:

# %%
from beitv2_jax.training import metrics

beitv2_jax.train(beitv2_jax.recipe('configs/beitv2_b16.py:smoke', changes | {'mesh.data': 1}), 'smoke_alone')
print(metrics.read('smoke')[0]['loss'], metrics.read('smoke_alone')[0]['loss'])

# %% [markdown]
# **How fast is it here?** Images a second, once compiled. With a TPU or a GPU, base at its real size; on a CPU the smoke recipe.

# %%
if jax.default_backend() == 'cpu':
  print(f'{metrics.read("smoke")[-1]["images_per_second"]:.0f} images/s of a toy model on {jax.device_count()} make-believe devices')
else:
  base = beitv2_jax.recipe('configs/beitv2_b16.py', {
    'data.source': 'fake:2048', 'tokenizer_from': 'untrained', 'batch_size': 64 * jax.device_count(), 'steps': 40, 'log_every': 10,
  })  # fmt: skip
  beitv2_jax.train(base, 'base')
  print(f'{metrics.read("base")[-1]["images_per_second"]:.0f} images/s of base pretraining')

# %% [markdown]
# **A pod, before you rent it.** XLA's TPU compiler runs on any machine: it says what a slice needs in memory and, by its own estimate, how
# long a step takes. These are estimates, not measurements. Compiling takes some minutes; a smaller model is quick.

# %%
if importlib.util.find_spec('libtpu') is None:
  print("libtpu is not installed: pip install 'beitv2_jax[aot]'")
else:
  recipe = 'configs/beitv2_b16.py:smoke' if QUICK else 'configs/beitv2_b16.py'
  command = [sys.executable, '-m', 'beitv2_jax', 'aot', f'--config={recipe}', '--topology=v5e:2x2', '--part=student', '--top', '5']
  done = subprocess.run(command, capture_output=True, text=True)
  print(done.stdout or done.stderr[-1000:])

# %% [markdown]
# **On a real slice** `launch/tpu_vm.sh` makes the machines, starts the run on all hosts and brings it back after a preemption: see
# the page "TPU pods" of the documentation.
