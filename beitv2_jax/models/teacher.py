"""Frozen teachers for VQ-KD, and the small CLIP that the demo trains. The only file that imports transformers.

A teacher maps images [B, h, w, 3] in [0, 1] to features [B, N, V] on the student's patch grid (paper section 2.1).
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention, chip
from beitv2_jax.models import vision_teachers
from beitv2_jax.models.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalize
from beitv2_jax.models.initializers import Draw, drawn_together
from beitv2_jax.models.layers import patches
from beitv2_jax.models.vit import resize_pos_embed
from beitv2_jax.tensor_files import files

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # it would warn that torch is missing
os.environ.setdefault('HF_HUB_VERBOSITY', 'error')  # our own error says what a missing network means


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen image model: `apply(params, images in [0, 1]) -> [B, N, width]`. It owns no weights."""

  width: int
  apply: Callable[[Any, jax.Array], jax.Array]


def load(kind: str, name: str, grid: tuple[int, int], dtype: Any = jnp.float32, layers: tuple[int, ...] = ()) -> tuple[Teacher, Any]:
  """Opens a teacher saved by transformers (a directory or a hub name), in PyTorch or Flax format.

  Args:
    kind: one of KINDS. 'clip' is last-layer patch tokens through the post layer norm and the visual projection; of the others
      vision_teachers.py says what the features are.
    layers: blocks (from 1) whose mean is the features, through the last norm; () is the last block.
    grid: the student's patch grid. The teacher's input is resized so that its own grid equals it, and its position
      embedding with it when that differs from the one it was trained with.
  Returns: the teacher and its parameters (numpy, fp32).
  Raises: UserError if there is no such teacher, or it is of another kind.
  """
  if kind not in KINDS:
    raise UserError(f'config.teacher.kind is {kind!r}; use one of {", ".join(KINDS)} (untrained: tiny and random, for smoke tests).')
  if kind not in FLAX or (kind != 'untrained' and (layers or not has_flax())):
    if not name:
      raise UserError(
        'config.teacher.name is empty; give a directory with config.json and model.safetensors, or a name on the Hugging Face hub.'
      )
    return _read(*vision_teachers.load(kind, name), grid, dtype, tuple(layers))
  model, params = _untrained() if kind == 'untrained' else _open(kind, name)
  return _dino(model, params, grid, dtype) if kind == 'dino' else _clip(model, params, grid, dtype)


def has_flax() -> bool:
  """Whether transformers still has Flax classes: version 5 has none."""
  import transformers

  return hasattr(transformers, 'FlaxCLIPModel')


FLAX = ('clip', 'dino', 'untrained')  # through transformers' Flax classes, where it still has them
KINDS = ('clip', 'open_clip', 'siglip', 'dino', 'dinov2', 'dinov3', 'timm', 'untrained')


def _read(spec: vision_teachers.Spec, params: Any, grid: tuple[int, int], dtype: Any, layers: tuple[int, ...]) -> tuple[Teacher, Any]:
  """A teacher of models/vision_teachers.py, whose input is resized so that its patches are the student's."""
  depth = len(params['blocks']['norm1']['weight'])
  if layers and not (1 <= min(layers) and max(layers) <= depth):
    raise UserError(f'teacher.layers={layers}: this teacher has blocks 1 to {depth}.')
  size = spec.patch_size * grid[0], spec.patch_size * grid[1]
  width = params['projection'].shape[1] if 'projection' in params else params['norm']['weight'].shape[0]
  return Teacher(width, lambda params, images: vision_teachers.apply(spec, params, resized(images, size), layers, dtype)), params


def abstract(kind: str, name: str, grid: tuple[int, int], dtype: Any = jnp.float32, layers: tuple[int, ...] = ()) -> tuple[Teacher, Any]:
  """A base-size teacher whose parameters are only shapes, for programs that are compiled without being run."""
  import transformers

  if kind == 'dino':
    model = transformers.FlaxViTModel(transformers.ViTConfig(), _do_init=False, add_pooling_layer=False)
    params = jax.eval_shape(model.module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))['params']
    return _dino(model, params, grid, dtype)
  if kind == 'untrained':
    model, params = _untrained()
  else:
    model = new_clip(width=768, depth=12, heads=12, patch_size=16, image_size=224, projection=512, vocab=8, text_length=4)
    params = _clip_shapes(model)
  return _clip(model, params, grid, dtype)


def _open(kind: str, name: str):
  import transformers

  cls = {'clip': transformers.FlaxCLIPModel, 'dino': transformers.FlaxViTModel}[kind]
  looks_local = os.path.sep in name and (name.startswith(('/', '.', '~')) or name.count('/') != 1 or Path(name).exists())
  files = 'config.json and flax_model.msgpack or model.safetensors'
  path = Path(name).expanduser()
  if not name:
    raise UserError(f'config.teacher.name is empty; give a hub name such as openai/clip-vit-base-patch16 or a directory with {files}.')
  if looks_local or path.is_dir():
    if not (path / 'config.json').is_file():
      raise UserError(f'no teacher in {path}: a teacher directory holds {files}, as save_pretrained writes them.')
    model_type = transformers.AutoConfig.from_pretrained(path).model_type
    if model_type != {'clip': 'clip', 'dino': 'vit'}[kind]:
      raise UserError(f'the teacher in {path} is a {model_type!r} model, but config.teacher.kind is {kind!r}.')
    name = str(path)
  extra = {'add_pooling_layer': False} if kind == 'dino' else {}
  try:
    with _warnings_of_transformers() as warnings, _in_one_file(path) as readable:
      model = cls.from_pretrained(readable or name, **extra)
  except (OSError, ValueError, ImportError) as e:
    raise UserError(
      f'cannot open the teacher {name!r} ({str(e).splitlines()[0][:200]}). On a machine without network, fetch {files} '
      f'from https://huggingface.co/{name} elsewhere, put them in a directory here and set --config.teacher.name=DIR.'
    ) from e
  missing = [w for w in warnings if 'newly initialized' in w]
  if missing:
    raise UserError(f'the teacher {name!r} lacks weights of a {kind} model: {missing[0][:300]}')
  return model, model.params


@contextlib.contextmanager
def _in_one_file(folder: Path) -> Generator[str | None]:
  """The folder of a model that Flax's classes cannot read, in several files or as PyTorch's .bin, as one that they can; else None."""
  flax = any((folder / name).is_file() for name in ('model.safetensors', 'flax_model.msgpack', 'flax_model.msgpack.index.json'))
  if flax or not (folder / 'config.json').is_file():
    yield None
    return
  from safetensors.numpy import save_file

  with tempfile.TemporaryDirectory() as temporary:
    arrays = {name: np.array(value, order='C') for name, value in files.read_state(folder).items()}
    save_file(arrays, Path(temporary) / 'model.safetensors', metadata={'format': 'pt'})
    shutil.copy(folder / 'config.json', temporary)
    yield temporary


@contextlib.contextmanager
def _warnings_of_transformers():
  """Collects them: it fills weights that a file lacks with random ones, and only warns."""
  records: list[str] = []
  handler = logging.Handler()
  handler.emit = lambda record: records.append(record.getMessage())
  logger = logging.getLogger('transformers.modeling_flax_utils')
  level, propagate = logger.level, logger.propagate
  logger.addHandler(handler)
  logger.setLevel(logging.WARNING)
  logger.propagate = False
  try:
    yield records
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


def resized(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """To the teacher's input size; bicubic and antialiased where that differs from the student's."""
  if images.shape[1:3] == size:
    return images
  shape = (images.shape[0], *size, images.shape[3])
  return jnp.clip(jax.image.resize(images, shape, 'cubic'), 0, 1)


def _embedded(patches: jax.Array, cls: jax.Array, table: jax.Array) -> jax.Array:
  """[B, Gh, Gw, D] patches → [B, T, D] tokens. The position table [1, 1+N, D] is resized as the official code does for its teachers.

  transformers' own embedding layers only know the square grid that they were trained on.
  """
  b, gh, gw, d = patches.shape
  side = math.isqrt(table.shape[1] - 1)
  tokens = jnp.concatenate([jnp.broadcast_to(cls.astype(patches.dtype), (b, 1, d)), patches.reshape(b, -1, d)], 1)
  return tokens + resize_pos_embed(table.astype(jnp.float32), (side, side), (gh, gw)).astype(patches.dtype)


# Names of the four matrices in transformers' attention layers; the last one may be a layer of its own.
_ATTENTION = {
  'FlaxCLIPAttention': ('q_proj', 'k_proj', 'v_proj', 'out_proj'),
  'FlaxViTSelfAttention': ('query', 'key', 'value', None),
}


def _our_layers(call, args, kwargs, context):
  """For flax's `intercept_methods`: `attention.attend` in the place of transformers' attention, which writes [T, T] out, and one product
  in the place of the convolution that embeds patches. On TPUs an MLP's two products are kept apart: the compiler would make them one,
  which takes longer (docs/estimates.md).

  Vision models mask no token. The bias of the keys adds the same to all logits of a query, so it can be left out.
  """
  module, kind = context.module, type(context.module).__name__
  names = _ATTENTION.get(kind)
  patching = isinstance(module, nn.Conv) and tuple(module.strides or ()) == tuple(module.kernel_size)
  if context.method_name != '__call__':
    return call(*args, **kwargs)
  if kind == 'FlaxViTIntermediate':
    return chip.kept_apart(call(*args, **kwargs))
  if type(module.parent).__name__ == 'FlaxCLIPMLP' and module.name == 'fc2':
    return call(chip.kept_apart(args[0]))
  if not (names or patching):
    return call(*args, **kwargs)
  x, params = args[0] if args else kwargs['hidden_states'], module.variables['params']
  if not names:
    kernel, bias = params['kernel'].astype(module.dtype), params.get('bias', jnp.zeros(())).astype(module.dtype)
    (b, h, w, _), (p, *_, width) = x.shape, kernel.shape
    y = jnp.dot(patches(x.astype(module.dtype), p), kernel.reshape(-1, width)) + bias
    return y.reshape(b, h // p, w // p, width)
  x, heads = x.astype(module.dtype), module.config.num_attention_heads
  qkv = params['qkv'].astype(module.dtype).reshape(x.shape[-1], 3, heads, -1)
  bias = lambda name: jnp.asarray(params[name].get('bias', 0.0)).astype(module.dtype)
  head = lambda name: jnp.broadcast_to(bias(name), x.shape[-1:]).reshape(heads, -1)
  y = attention.attend(x, qkv, head(names[0]), head(names[2]), None)
  return (y if names[3] is None else jnp.dot(y, params[names[3]]['kernel'].astype(module.dtype)) + bias(names[3]),)


def _joined(params: Any, stack: Callable = np.stack) -> Any:
  """Parameters of transformers' model with the matrices of queries, keys and values as one, 'qkv' [D, 3, D], as `_our_layers` takes
  them: joined once here, not in every step."""
  if not isinstance(params, Mapping):
    return params
  for names in _ATTENTION.values():
    if set(names[:3]) <= set(params):
      kernels = [params[n]['kernel'] for n in names[:3]]
      rest = {k: {n: x for n, x in v.items() if n != 'kernel'} if k in names[:3] else v for k, v in params.items()}
      return rest | {'qkv': stack(kernels, 1)}
  return {k: _joined(v, stack) for k, v in params.items()}


def _input_size(config, grid) -> tuple[int, int]:
  return config.patch_size * grid[0], config.patch_size * grid[1]


def _clip(model, params, grid, dtype):
  import transformers

  config = model.config.vision_config
  size = _input_size(config, grid)
  module = transformers.FlaxCLIPVisionModel(config, _do_init=False, dtype=dtype).module

  def tokens(module, images):
    vision = module.vision_model
    e = vision.embeddings
    x = _embedded(e.patch_embedding(images), e.class_embedding, e.position_embedding.embedding[None])
    x = vision.encoder(vision.pre_layrnorm(x), deterministic=True)[0]
    return vision.post_layernorm(x[:, 1:])  # on every patch; transformers applies it to [CLS] alone

  def apply(params, images):
    x = normalize(resized(images, size), CLIP_MEAN, CLIP_STD)
    with nn.intercept_methods(_our_layers):
      x = module.apply({'params': {'vision_model': params['vision_model']}}, x, method=tokens)
    return jnp.dot(x, params['visual_projection']['kernel'].astype(dtype))

  params = {k: params[k] for k in ('vision_model', 'visual_projection')}
  return Teacher(params['visual_projection']['kernel'].shape[1], apply), _ready(params)


def _dino(model, params, grid, dtype):
  import transformers

  config = model.config
  config.layer_norm_eps = 1e-6  # DINO's own; the converted files carry transformers' default
  size = _input_size(config, grid)
  module = transformers.FlaxViTModel(config, _do_init=False, dtype=dtype, add_pooling_layer=False).module

  def tokens(module, images):
    e = module.embeddings
    x = _embedded(e.patch_embeddings.projection(images), e.cls_token, e.position_embeddings)
    return module.layernorm(module.encoder(x, deterministic=True)[0][:, 1:])

  def apply(params, images):
    with nn.intercept_methods(_our_layers):
      return module.apply({'params': params}, normalize(resized(images, size), IMAGENET_MEAN, IMAGENET_STD), method=tokens)

  return Teacher(config.hidden_size, apply), _ready(params)


def _ready(params):
  """As `apply` takes them, in fp32; of shapes, shapes."""
  if all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.eval_shape(functools.partial(_joined, stack=jnp.stack), params)
  return _joined(jax.tree.map(lambda x: np.asarray(x, np.float32), params))


def _untrained():
  model = new_clip(width=32, depth=1, heads=2, patch_size=8, image_size=32, projection=24, vocab=8, text_length=4)
  return model, jax.jit(lambda key: fresh_clip_params(model, key))(jax.random.key(0))


def _clip_shapes(model: Any) -> Any:
  """Shapes of a FlaxCLIPModel's parameters."""
  text_config, vision_config = model.config.text_config, model.config.vision_config
  text = jnp.zeros((1, text_config.max_position_embeddings), jnp.int32)
  images = jnp.zeros((1, vision_config.image_size, vision_config.image_size, 3))
  return jax.eval_shape(lambda: model.module.init(jax.random.key(0), text, images, jnp.ones_like(text), text))['params']


def fresh_clip_params(model: Any, key: jax.Array) -> Any:
  """Random parameters of a FlaxCLIPModel, to be jitted. As transformers' own, but for its matrices: they are N(0, 0.01²) at any width
  there, from which a narrow tower hardly learns, and N(0, 1/fan_in) here."""

  def start(path, x):
    name = path[-1].key
    if name == 'kernel':
      return Draw('normal', (x.size // x.shape[-1]) ** -0.5)(key, x.shape)
    if name in ('embedding', 'class_embedding'):
      return Draw('normal', 0.01 if name == 'embedding' else 0.02)(key, x.shape)
    return jnp.full(x.shape, dict(scale=1.0, bias=0.0, logit_scale=model.config.logit_scale_init_value)[name])

  shapes = _clip_shapes(model)
  return drawn_together(lambda _: jax.tree_util.tree_map_with_path(start, shapes), key)


def new_clip(*, width, depth, heads, patch_size, image_size, projection, vocab, text_length) -> Any:
  """A FlaxCLIPModel of the given size whose weights are not made yet (`.module.init` makes them)."""
  import transformers

  tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)
  return transformers.FlaxCLIPModel(
      transformers.CLIPConfig(
          text_config=dict(
              **tower, num_hidden_layers=1, vocab_size=vocab, max_position_embeddings=text_length,
              bos_token_id=0, eos_token_id=1, pad_token_id=1,
          ),
          vision_config=dict(
              **tower, num_hidden_layers=depth, patch_size=patch_size, image_size=image_size
          ),
          projection_dim=projection,
      ),
      _do_init=False,
  )  # fmt: skip
