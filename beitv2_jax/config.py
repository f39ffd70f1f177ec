"""The settings every recipe starts from, and the checks that come before anything is compiled.

A recipe in configs/ takes `base()`, sets what its stage needs and returns it. The structure is locked, so a misspelt
name is an error with a suggestion. `config.json` in a workdir is what the next stage reads.
"""

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from beitv2_jax import settings, storage
from beitv2_jax.errors import UserError


def _data() -> ConfigDict:
  """Where images come from and how they become a batch."""
  return ConfigDict(
    dict(
      source='tfds:imagenet2012',  # see beitv2_jax/data/sources.py
      dir='',  # where tfds keeps prepared data sets
      holdout=0.1,  # share kept for evaluation where a source has no split for it
      limit=0,  # train on so many images of the source, drawn once; 0: all
      image_size=224,
      crop_scale=(0.08, 1.0),
      crop_ratio=(3 / 4, 4 / 3),
      crop_pct=0.875,  # evaluation: shorter side to int(image_size / crop_pct), then the centre
      flip=True,
      resize='fast',  # of training crops: within one grey level of 'pillow', three times as fast
      mean=(0.485, 0.456, 0.406),  # what images are normalised by, but for the tokenizer, which takes [-1, 1]
      std=(0.229, 0.224, 0.225),
      value_range=(),  # (low, high) of images with 16 bits or floats: what becomes black and white
      channels=(),  # which three bands are taken, from 0, of images with others than red, green and blue
      max_bad=0.01,  # a run stops when a larger share of the images does not decode
      workers=0,  # decoding processes per host; 0 decodes in threads, -1 in the main thread
    )
  )


def _optim() -> ConfigDict:
  """AdamW and its schedule."""
  return ConfigDict(
    dict(
      schedule='cosine',  # or 'linear', to 0
      lr=1.5e-3,
      min_lr=1e-5,
      warmup_epochs=10.0,
      warmup_steps=-1,  # -1: from warmup_epochs
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      first_moment='float32',  # 'bfloat16' keeps it in half the memory, and updates faster where memory is what limits
      weight_decay=0.05,
      clip_norm=0.0,  # 0: no clipping
      layer_decay=1.0,  # factor of the learning rate from one block to the one before it
      no_decay=('.*pos_embed', '.*cls_token'),  # beside vectors and biases
    )
  )


def base(task: str) -> ConfigDict:
  """Settings of all stages. Steps and batch sizes are global, whatever the number of devices."""
  config = ConfigDict()
  config.task = task
  config.seed = 0
  config.init_from = ''  # workdir or converted directory whose weights this stage starts from; '': fresh ones
  config.dtype = 'bfloat16'  # of matrix products; parameters, norms, softmax and losses are float32
  config.batch_size = 512
  config.epochs = 100.0
  config.steps = -1  # -1: epochs * (images // batch_size)

  config.data = _data()
  config.optim = _optim()
  config.mesh = ConfigDict(
    dict(
      data=-1,  # -1: all devices that `model` leaves
      model=1,
      # logical axis of a parameter → mesh axis; ('embed', 'data') makes it FSDP
      rules=(('heads', 'model'), ('mlp', 'model'), ('vocab', 'model'), ('embed', None)),
      shard_state=True,  # each device keeps its share of the large parameters and their moments; a step gathers the parameters (as in ZeRO)
    )
  )
  config.accumulate = 1  # parts that a batch is cut into, one after the other; the gradients are averaged
  config.layers = ConfigDict(
    dict(
      scan=False,  # compile one block and loop over it: compiles faster, may run slower
      remat='none',  # what the backward pass computes again to save memory: 'none', 'dots' (attention, GELU), 'full'
      attention='auto',  # 'xla', 'tpu' or 'gpu' (fused kernels), or 'auto': the chip's kernel where it fits
    )
  )
  config.checkpoint = ConfigDict(dict(every=2500, keep=2, keep_every=0))  # in steps; keep_every=0: only the last `keep`
  config.quick_compile = False  # compile in half the time (on TPUs in a fifth) what then runs slower: for trying things out
  config.quick_steps = -1  # only a run's first steps that way, while the fast program is compiled; -1: 10 on TPUs, 0 elsewhere
  config.log_every = 50
  config.samples = 8  # evaluation images that report.html shows with what the model makes of them; 0: none
  config.track = ''  # also write to 'wandb', 'mlflow' or 'trackio', whose package must be installed
  config.profile_steps = 0  # trace so many steps, after the first ten, into WORKDIR/profile
  config.eval_every = 0  # steps; 0: only at the end
  config.eval_batch_size = 0  # 0: batch_size
  return config.lock()


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Recipe arguments: ':smoke,epochs=1600' against their defaults. A bare name means True."""
  out = ConfigDict(defaults)
  for item in filter(None, (arg or '').split(',')):
    key, eq, value = item.partition('=')
    if key not in defaults:
      raise UserError(f'unknown recipe argument {key!r}; this recipe takes {", ".join(f"{k}={v}" for k, v in defaults.items())}.')
    try:
      out[key] = type(defaults[key])(ast.literal_eval(value)) if eq and not isinstance(defaults[key], str) else (value if eq else True)
    except (ValueError, SyntaxError, TypeError) as e:
      raise UserError(f'recipe argument {item!r}: expected a {type(defaults[key]).__name__}.') from e
  return out


def stage_of(stages: dict[str, Any], name: str) -> ConfigDict:
  """The unlocked config of one of a recipe's stages {name: function}. Raises UserError for one that it has not."""
  if name not in stages:
    raise UserError(f'recipe argument stage={name}: one of {", ".join(stages)}.')
  return stages[name]().unlock()


def smoke(config: ConfigDict) -> ConfigDict:
  """Shrinks what all recipes share to a few steps on generated images; the recipe shrinks its model."""
  config.data.update(source='fake:64', image_size=32, workers=0)
  config.update(dtype='float32', batch_size=16, steps=6, log_every=1, eval_batch_size=16, quick_compile=True)
  config.optim.warmup_steps = 2
  config.checkpoint.every = 3
  return config


def tokenizer_model(**changes: Any) -> ConfigDict:
  """The released tokenizer's size (paper section 3.1): base encoder, 8192 codes of 32 dimensions."""
  side = dict(width=768, heads=12)
  model = dict(
    patch_size=16,
    encoder=dict(depth=12, **side),
    decoder=dict(depth=3, **side),
    mlp_ratio=4.0,
    codes=8192,
    code_dim=32,
    decay=0.99,  # of the codebook's EMA
    quantizer='ema',  # the paper's; or 'simvq', 'fsq' (models/quantizer.py)
    gradient='straight_through',  # through the codes, as the paper; or 'rotation'
    levels=(),  # of fsq: points of each dimension; their product is `codes`, their number `code_dim`
    init_scheme='normal',
    teacher_width=0,  # filled in from the teacher
  )
  return ConfigDict(model | changes)


def tiny_tokenizer() -> ConfigDict:
  side = dict(width=32, heads=2)
  return tokenizer_model(patch_size=8, encoder=dict(depth=2, **side), decoder=dict(depth=1, **side), codes=32, code_dim=8)


def choose_quantizer(model: ConfigDict, name: str, levels: tuple[int, ...]) -> None:
  """Sets a tokenizer's quantizer by one word: 'ema', 'rotation' (the same with the rotation trick), 'simvq', or 'fsq' with these levels."""
  if name == 'rotation':
    model.gradient = 'rotation'
  else:
    model.quantizer = name
  if name == 'fsq':
    model.update(levels=levels, codes=math.prod(levels), code_dim=len(levels))


def image_shape(config: Any) -> tuple[int, int, int]:
  """(h, w, 3) of the model's input; data.image_size is a side, or (h, w)."""
  size = config.data.image_size
  return (size, size, 3) if isinstance(size, int) else (*size, 3)


def patch_grid(config: Any) -> tuple[int, int]:
  h, w, _ = image_shape(config)
  return h // config.model.patch_size, w // config.model.patch_size


def reading(config: Any) -> dict[str, Any]:
  """How image files become pixels, as arguments of data.decode.image."""
  return {name: tuple(config.data.get(name, ())) for name in ('value_range', 'channels')}


def preparation(config: Any) -> dict[str, Any]:
  """How image files become what a model sees when it is evaluated, as arguments of image_files.prepared."""
  return dict(crop_pct=config.data.get('crop_pct', 0.875)) | reading(config)


def layers(config: Any) -> dict[str, Any]:
  """How the blocks are run; not part of what the model is, so a config without it (an imported one) will do."""
  return dict(config.get('layers', {}))


def head_dims(config: Any) -> set[int]:
  """Widths of the attention heads of all models in a config."""
  inner = set().union(*(head_dims(v) for v in config.values() if isinstance(v, ConfigDict)))
  return inner | ({config['width'] // config['heads']} if 'heads' in config and 'width' in config else set())


def check(config: ConfigDict) -> None:
  """Errors that can be seen before data is read or a model is made. Raises UserError."""
  if 'task' not in config or 'mesh' not in config:
    raise UserError('this config is no recipe of a stage: it has no task. A recipe begins with beitv2_jax.config.base().')
  settings.check(config)
  devices, model = jax.device_count(), config.mesh.model
  if config.mesh.data == 0 or devices % model or (config.mesh.data > 0 and not _fits(config.mesh.data * model, devices)):
    raise UserError(f'mesh.data={config.mesh.data} x mesh.model={model} does not fit {devices} devices; data=-1 takes what model leaves.')
  data = config.mesh.data if config.mesh.data > 0 else devices // model
  for name in ('batch_size', 'eval_batch_size'):
    size = config[name] or config.batch_size
    if size < 1 or size % data or size % jax.process_count():
      raise UserError(
        f'{name}={size} does not divide over {data} data devices on {jax.process_count()} processes; use a multiple of {data}.'
      )
  patch = config.model.get('patch_size') if 'model' in config else None
  if patch and any(side % patch for side in np.atleast_1d(config.data.image_size)):
    raise UserError(f'data.image_size={config.data.image_size} is not a multiple of model.patch_size={patch}.')
  if config.task == 'segmenter' and min(patch_grid(config)) < 2:
    raise UserError(
      f'data.image_size={config.data.image_size}: a segmenter needs at least two patches a side, which halve at its coarsest level.'
    )
  if config.accumulate < 1 or config.batch_size % (data * config.accumulate):
    raise UserError(f'batch_size={config.batch_size} does not divide into accumulate={config.accumulate} parts on {data} data devices.')
  for name, length in (('value_range', 2), ('channels', 3)):
    if len(config.data[name]) not in (0, length):
      raise UserError(f'data.{name}={config.data[name]}: {length} numbers, or none.')
  if len(config.data.value_range) == 2 and config.data.value_range[0] >= config.data.value_range[1]:
    raise UserError(f'data.value_range={config.data.value_range}: the first becomes black, the second, which is larger, white.')
  _check_model(config)


def _check_model(config: ConfigDict) -> None:
  """Sizes of a model that depend on each other."""
  for path, sizes in _sections(config.get('model', ConfigDict()), 'model'):
    if 'width' in sizes and 'heads' in sizes and sizes.width % sizes.heads:
      raise UserError(f'{path}.width={sizes.width} does not divide into {path}.heads={sizes.heads}.')
    if 'width' in sizes and int(sizes.width * (sizes.get('mlp_ratio') or config.model.get('mlp_ratio', 4))) < 1:
      raise UserError(f'model.mlp_ratio={config.model.mlp_ratio} leaves no hidden unit at {path}.width={sizes.width}.')
    if sizes.get('quantizer') == 'fsq' and (math.prod(sizes.levels) != sizes.codes or len(sizes.levels) != sizes.code_dim):
      raise UserError(
        f'{path}.levels={tuple(sizes.levels)}: of an fsq tokenizer their number is {path}.code_dim={sizes.code_dim}, their product {path}.codes={sizes.codes}.'
      )
    if sizes.get('quantizer') == 'fsq' and sizes.gradient != 'straight_through':
      raise UserError(f'{path}.gradient={sizes.gradient} needs vectors of a length; fsq takes straight_through.')
    if 'early_layer' in sizes and sizes.get('head_layers', 1) and not sizes.early_layer < sizes.depth:
      raise UserError(f'{path}.early_layer={sizes.early_layer}: a block before the last of model.depth={sizes.depth}.')
    if max(sizes.get('out_indices', (0,))) >= sizes.get('depth', 1):
      raise UserError(f'{path}.out_indices={sizes.out_indices}: blocks counted from 0, of which there are {sizes.depth}.')


def _sections(section: ConfigDict, path: str) -> Iterator[tuple[str, ConfigDict]]:
  yield path, section
  for key, value in section.items():
    if isinstance(value, ConfigDict):
      yield from _sections(value, f'{path}.{key}')


def _fits(wanted: int, devices: int) -> bool:
  """All devices, or the first few of a single process."""
  return wanted == devices or (wanted < devices and jax.process_count() == 1)


def save(config: ConfigDict, workdir: str | Path) -> None:
  storage.write(storage.place(workdir) / 'config.json', config.to_json_best_effort(indent=2))


def load(workdir: str | Path, what: str = 'a workdir of a finished stage') -> ConfigDict:
  """The config that made `workdir`. `what` names the expected thing in the error."""
  path = storage.place(workdir) / 'config.json'
  with storage.reaching(path):
    if not path.exists() or path.is_dir():
      raise UserError(f'{_not_there(path.parent)}: expected {what}.')
    content = path.read_bytes()
  try:
    config = ConfigDict(json.loads(content))
  except ValueError as e:
    raise UserError(f'{path} is damaged ({e}).') from e
  if 'task' not in config:
    raise UserError(
      f'{path} is not of a stage trained here: expected {what}. (A Hugging Face or timm model comes in through python -m beitv2_jax convert.)'
    )
  return config


def _not_there(folder: Any) -> str:
  """What is wrong with a folder that has no config.json, in words."""
  if not folder.exists():
    return f'there is no folder {folder}'
  if not folder.is_dir():
    return f'{folder} is a file'
  inside = sorted(p.parent.name for p in folder.glob('*/config.json'))
  return f'no config.json in {folder}' + (f'; give one of the runs in it, such as {folder / inside[0]}' if inside else '')


def changes(old: ConfigDict, new: ConfigDict, prefix: str = '') -> list[str]:
  """Human-readable differences, 'optim.lr: 0.1 -> 0.2', of two configs. A key that `old` lacks is newer than it, and none."""
  out = []
  for key in sorted(old):
    a, b = old.get(key), new.get(key)
    if isinstance(a, ConfigDict) and isinstance(b, ConfigDict):
      out += changes(a, b, f'{prefix}{key}.')
    elif json.dumps(a, default=str) != json.dumps(b, default=str):
      out.append(f'{prefix}{key}: {a} -> {b}')
  return out
