"""Devices, layouts and kernels: all give the numbers of one device and plain XLA."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax import config as config_lib
from beitv2_jax import tasks
from beitv2_jax.data import pipeline, sources
from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention, attention_gpu, chip, norm_gpu
from beitv2_jax.training import optim, sharding
from beitv2_jax.training.train_state import state_layout
from beitv2_jax.training.train_step import make_train_step
from tests.conftest import smoke


def global_batches(c, task):
  if c.task == 'segmenter':
    rng, (h, w, _) = np.random.default_rng(0), config_lib.image_shape(c)
    while True:
      yield dict(image=rng.integers(0, 256, (16, h, w, 3), np.uint8), mask=rng.integers(0, 151, (16, h, w), np.uint8))
  source = sources.make('fake:64', 'train')
  yield from pipeline.train_batches(source, task.transforms(c, True, source), seed=0, batch=16, workers=-1)


def some_steps(c, steps=3):
  """(losses, state) of a few steps on this config's mesh, fed with the same global batches."""
  task, frozen = tasks.make(c)
  mesh = sharding.make_mesh(c.mesh.data, c.mesh.model)
  tx, schedule = optim.make(c.optim, 100, 2)
  layout = state_layout(task, tx, mesh, c)
  state, frozen = layout.init(jax.random.key(0)), sharding.put_replicated(frozen, mesh)
  train_step = make_train_step(task, tx, schedule, c.accumulate, layout)
  step = jax.jit(train_step, out_shardings=(layout.shardings, sharding.replicated(mesh)))
  batches = global_batches(c, task)
  out = []
  for i in range(steps):
    batch = sharding.put_batch(next(batches), mesh)
    if i == 0:
      warm = jax.jit(task.warm_start, out_shardings=layout.shardings.model_state)
      state = state._replace(model_state=warm(state.params, state.model_state, frozen, batch, jax.random.key(1)))
    with jax.set_mesh(mesh):
      state, values = step(state, frozen, batch, jax.random.key(2))
    out.append([float(values['loss']), float(values['grad_norm'])])
  return np.array(out), state


FSDP = (('heads', 'model'), ('mlp', 'model'), ('vocab', 'model'), ('embed', 'data'))


_cache = {}


ALL_TASKS = ('tokenizer', 'pretrain', 'classifier', 'segmenter')
# What runs by default: for every task a plain layout, and one in which everything is on at once.
LAYOUTS = {
  'copies': dict(mesh__data=8, mesh__shard_state=False),
  'everything': dict(mesh__data=2, mesh__model=2, mesh__rules=FSDP, layers__scan=True, layers__remat='dots', accumulate=2),
}
# And each thing by itself.
ALONE = {
  'eight': dict(mesh__data=8),
  'tensor': dict(mesh__data=4, mesh__model=2),
  'fsdp': dict(mesh__data=4, mesh__model=2, mesh__rules=FSDP),
  'accumulated': dict(mesh__data=8, accumulate=2),
  'recomputed': dict(layers__remat='full', accumulate=4),
}
CASES = [(task, layout) for task in ALL_TASKS for layout in LAYOUTS]
CASES += [('pretrain', 'tensor'), ('pretrain', 'recomputed')]
SLOW = [(task, layout) for task in ALL_TASKS for layout in ALONE if (task, layout) not in CASES]


@pytest.mark.parametrize('task, layout', [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_layouts_and_ways_to_run_the_layers_give_the_same_numbers(task, layout, monkeypatch):
  """Devices, tensor and data parallel, FSDP, state in parts, scan, rematerialisation, gradient accumulation: the same losses and codebook."""
  changes = (LAYOUTS | ALONE)[layout]
  monkeypatch.setattr(sharding, 'SMALL', 1)
  # What draws for every part of a batch, or looks at all of it, changes with the parts: drop path, mixup, erasing, batch norm.
  same = dict(pretrain=dict(model__drop_path=0.0), classifier=dict(model__drop_path=0.0, mixup=0.0, cutmix=0.0, random_erasing=0.0))
  if task == 'segmenter':
    changes = changes | dict(accumulate=1)
  if task not in _cache:
    _cache[task] = some_steps(smoke(task, layers__scan=False, **same.get(task, {})))
  alone, one = _cache[task]
  together, many = some_steps(smoke(task, **same.get(task, {}), **(dict(layers__scan=False) | changes)))
  np.testing.assert_allclose(together, alone, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one.model_state), jax.tree.leaves(many.model_state)):
    np.testing.assert_allclose(a, b, atol=2e-5)  # the codebook: k-means and EMA over the global batch
  params, moments = many.params, many.opt_state[1]
  for p, mu, nu in zip(*map(jax.tree.leaves, (params, moments.mu, moments.nu))):
    assert p.sharding == mu.sharding == nu.sharding  # moments lie where their parameters lie
  split = [p for p in jax.tree.leaves(params) if not p.sharding.is_fully_replicated]
  assert bool(split) == (changes.get('mesh__data', 1) > 1 and changes.get('mesh__shard_state', True))


@pytest.mark.slow
def test_the_attention_kernel_trains_to_the_same_numbers():
  """The TPU kernel, interpreted, with heads and images split over the mesh, against plain attention on one device."""
  size = dict(model__width=256, model__heads=4, model__drop_path=0.0)
  alone, _ = some_steps(smoke('pretrain', **size, layers__attention='xla'))
  kernel = dict(layers__attention='tpu', layers__scan=True, layers__remat='full')
  together, _ = some_steps(smoke('pretrain', **size, **kernel, mesh__data=2, mesh__model=2, mesh__rules=FSDP))
  np.testing.assert_allclose(together, alone, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['tokenizer', 'pretrain'])
def test_the_way_through_gpu_kernels(task, monkeypatch):
  """What a GPU runs in bf16 (kernels interpreted), on four devices of which two share the heads, against plain XLA on one."""
  extra = dict(dtype='bfloat16') | (dict(model__drop_path=0.0, tokenizer_dtype='bfloat16') if task == 'pretrain' else {})
  alone, _ = some_steps(smoke(task, **extra))
  calls = []

  def interpreted(name, function):
    def call(*args, **kwargs):
      calls.append(name)
      return function(*args, **kwargs | dict(interpret=True))

    return call

  monkeypatch.setattr(chip, 'platform', lambda: 'gpu')
  monkeypatch.setitem(chip.refused, 'TF32 product', 'a CPU has none')
  monkeypatch.setattr(attention_gpu, 'attend', interpreted('attention', attention_gpu.attend))
  monkeypatch.setattr(norm_gpu, 'backward', interpreted('layer norm', norm_gpu.backward))
  together, _ = some_steps(smoke(task, **extra, mesh__data=2, mesh__model=2, mesh__rules=FSDP))
  assert set(calls) == {'attention', 'layer norm'}
  np.testing.assert_allclose(together, alone, rtol=0.02)


def test_devices_that_see_the_same_images_belong_to_one_process(monkeypatch):
  """Each process reads images of its own. A ring of a slice may go through several hosts, so that jax.make_mesh mixes them."""
  devices = [types.SimpleNamespace(process_index=i // 2, id=i) for i in range(4)]
  made = lambda devices, names, axis_types: types.SimpleNamespace(devices=devices)
  monkeypatch.setattr(sharding, 'Mesh', made)
  mixed = lambda shape, names, axis_types, devices: made(np.array(devices).reshape(shape[::-1]).T, names, axis_types)
  monkeypatch.setattr(sharding.jax, 'make_mesh', mixed)
  mesh = sharding.make_mesh(-1, 2, devices)
  assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [2, 3]]
  with pytest.raises(UserError, match='mesh.model=4 needs devices of several processes'):
    sharding.make_mesh(-1, 4, devices)


def test_images_that_do_not_divide_over_the_devices_are_named_or_taken_by_xla():
  width, heads, tokens = 128, 2, 5
  shapes = (3, tokens, width), (width, 3, heads, 64), (heads, 64), (heads, 64), (heads, tokens, tokens)
  x, *others = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in shapes)
  with jax.set_mesh(sharding.make_mesh(2, 1, jax.devices()[:2])):
    with pytest.raises(UserError, match='layers.attention=tpu cannot take 3 images of 5 tokens in heads of 64 on 2 data devices'):
      attention.attend(x, *others, how='tpu')
    np.testing.assert_array_equal(attention.attend(x, *others), attention.plain(x, *others))
