"""Teachers beyond Flax's classes: one ViT that reads CLIP, SigLIP, DINO, DINOv2 (with and without registers), DINOv3, open_clip's own files
and timm's plain ViTs.

Their safetensors are read through one table a layout (LAYOUTS); what differs between them is in `Spec`.

| kind     | tokens before the patches | positions        | MLP            | features                                        |
|----------|---------------------------|------------------|----------------|-------------------------------------------------|
| `clip`   | [CLS]                     | table            | quick GELU     | post layer norm, visual projection, on each patch |
| `siglip` | none                      | table            | tanh GELU      | post layer norm; also SigLIP 2, fixed size and NaFlex |
| `open_clip` | [CLS]                  | table            | GELU, or quick | as `clip`                                       |
| `dino`   | [CLS]                     | table            | GELU           | layer norm (eps 1e-6)                           |
| `dinov2` | [CLS], registers          | table            | GELU or SwiGLU | layer norm                                      |
| `dinov3` | [CLS], registers          | rotary (RoPE)    | GELU or gated  | layer norm                                      |
| `timm`   | [CLS]                     | table            | GELU           | norm; heads of 64                               |
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention, chip
from beitv2_jax.models.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalize
from beitv2_jax.models.layers import patches
from beitv2_jax.models.vit import cubic_weights
from beitv2_jax.tensor_files import files

HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Spec:
  """What the arrays alone do not tell."""

  heads: int
  patch_size: int
  mean: tuple = IMAGENET_MEAN
  std: tuple = IMAGENET_STD
  eps: float = 1e-6
  activation: str = 'gelu'
  rope: float | None = None  # base of the rotary angles
  linear_positions: bool = False  # the table is resized bilinearly and antialiased (NaFlex), not bicubically


def _quick_gelu(x):
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = dict(
  gelu=functools.partial(jax.nn.gelu, approximate=False),
  gelu_pytorch_tanh=functools.partial(jax.nn.gelu, approximate=True),
  quick_gelu=_quick_gelu,
  silu=jax.nn.silu,
)

# Layouts: where each of our arrays stands in theirs; `{i}` is the block. A name with {qkv} is three matrices. Missing ones are absent.
_HF_CLIP = dict(
  cls='vision_model.embeddings.class_embedding', patch='vision_model.embeddings.patch_embedding', pos='vision_model.embeddings.position_embedding.weight',
  pre_norm='vision_model.pre_layrnorm', norm='vision_model.post_layernorm', projection='visual_projection.weight',
  block='vision_model.encoder.layers.{i}.', norm1='layer_norm1', norm2='layer_norm2', query='self_attn.q_proj', key='self_attn.k_proj',
  value='self_attn.v_proj', proj='self_attn.out_proj', fc1='mlp.fc1', fc2='mlp.fc2',
)  # fmt: skip
_HF_DINO = dict(
  cls='embeddings.cls_token', registers='embeddings.register_tokens', patch='embeddings.patch_embeddings.projection', pos='embeddings.position_embeddings',
  norm='layernorm', block='encoder.layer.{i}.', norm1='norm1', norm2='norm2', query='attention.attention.query', key='attention.attention.key',
  value='attention.attention.value', proj='attention.output.dense', fc1='mlp.fc1', fc2='mlp.fc2', gated='mlp.weights_in', gated_out='mlp.weights_out',
  scale1='layer_scale1.lambda1', scale2='layer_scale2.lambda1',
)  # fmt: skip
LAYOUTS: dict[str, dict[str, str]] = dict(
  clip=_HF_CLIP,
  siglip=_HF_CLIP,
  dino=_HF_DINO | dict(norm1='layernorm_before', norm2='layernorm_after', fc1='intermediate.dense', fc2='output.dense'),
  dinov2=_HF_DINO,
  dinov3=dict(
    cls='embeddings.cls_token',
    registers='embeddings.register_tokens',
    patch='embeddings.patch_embeddings',
    norm='norm',
    block='layer.{i}.',
    norm1='norm1',
    norm2='norm2',
    query='attention.q_proj',
    key='attention.k_proj',
    value='attention.v_proj',
    proj='attention.o_proj',
    fc1='mlp.up_proj',
    fc2='mlp.down_proj',
    gate='mlp.gate_proj',
    scale1='layer_scale1.lambda1',
    scale2='layer_scale2.lambda1',
  ),  # fmt: skip
  open_clip=dict(
    cls='visual.class_embedding',
    patch='visual.conv1',
    pos='visual.positional_embedding',
    pre_norm='visual.ln_pre',
    norm='visual.ln_post',
    projection='visual.proj',
    block='visual.transformer.resblocks.{i}.',
    norm1='ln_1',
    norm2='ln_2',
    qkv='attn.in_proj',
    proj='attn.out_proj',
    fc1='mlp.c_fc',
    fc2='mlp.c_proj',
    scale1='ls_1.gamma',
    scale2='ls_2.gamma',
  ),  # fmt: skip
  timm=dict(
    cls='cls_token',
    registers='reg_token',
    patch='patch_embed.proj',
    pos='pos_embed',
    pre_norm='norm_pre',
    norm='norm',
    block='blocks.{i}.',
    norm1='norm1',
    norm2='norm2',
    qkv='attn.qkv',
    proj='attn.proj',
    fc1='mlp.fc1',
    fc2='mlp.fc2',
    scale1='ls1.gamma',
    scale2='ls2.gamma',
  ),  # fmt: skip
)
# transformers' model_type → our kind.
MODEL_TYPES = dict(
  clip='clip', clip_vision_model='clip', siglip='siglip', siglip_vision_model='siglip', siglip2='siglip', siglip2_vision_model='siglip', vit='dino',
  dinov2='dinov2', dinov2_with_registers='dinov2', dinov3_vit='dinov3',
)  # fmt: skip


def load(kind: str, name: str) -> tuple[Spec, dict[str, Any]]:
  """(spec, arrays) of the vision model in a directory with config.json and safetensors, or of a name on the Hugging Face hub.

  Raises UserError for another kind, arrays that are missing, and what cannot be fetched (DINOv3 is gated: its licence must be accepted).
  """
  folder = Path(name).expanduser()
  if not folder.is_dir():
    folder = _fetched(name)
  names = ('open_clip_config.json', *OPEN_CLIP) if kind == 'open_clip' else ('config.json', 'model.safetensors')
  try:
    config = json.loads((folder / names[0]).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'no {kind} teacher in {folder}: expected {names[0]} and {names[1]} ({e}).') from e
  if kind == 'open_clip':
    return _open_clip(config, folder)
  state = files.read_state(folder)
  if kind == 'timm':
    return _timm_spec(config, state), converted('timm', state, folder)
  found = MODEL_TYPES.get(config.get('model_type', ''))
  if found != kind:
    other = f'is a {config.get("model_type", "nameless")!r} model' + (
      f': give teacher.kind={found}' if found else ', which is no teacher we read'
    )
    raise UserError(f'the teacher in {folder} {other}; teacher.kind is {kind!r}.')
  return _spec(kind, config.get('vision_config', config)), converted(kind, state, folder)


OPEN_CLIP = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')  # as open_clip's save_pretrained names them


def _open_clip(config: dict, folder: Path) -> tuple[Spec, dict[str, Any]]:
  """(spec, arrays) of open_clip's own ViT: in_proj holds queries, keys and values, `proj` is stored as it is multiplied."""
  file = next((folder / name for name in OPEN_CLIP if (folder / name).is_file()), folder / OPEN_CLIP[0])
  state = {k.replace('.in_proj_', '.in_proj.'): v for k, v in files.read_state(file).items()}
  vision = config.get('model_cfg', {}).get('vision_cfg', {})
  if any(k.startswith('visual.trunk.') for k in state) or not isinstance(vision.get('layers', 12), int):
    raise UserError(
      f'the vision model in {folder} is not a ViT of open_clip itself; save a ViT of timm with timm.models.save_for_hf for teacher.kind=timm.'
    )
  if 'visual.proj' in state:
    state['visual.proj'] = state['visual.proj'].T
  prepared = config.get('preprocess_cfg', {})
  spec = Spec(
    heads=vision.get('width', 768) // vision.get('head_width', 64),
    patch_size=vision.get('patch_size', 16),
    mean=tuple(prepared.get('mean') or CLIP_MEAN),
    std=tuple(prepared.get('std') or CLIP_STD),
    eps=1e-5,
    activation='quick_gelu' if config['model_cfg'].get('quick_gelu') else 'gelu',
  )
  return spec, converted('open_clip', state, folder)


def _fetched(name: str) -> Path:
  if name.startswith(('/', '.', '~')) or name.count('/') != 1:
    raise UserError(f'no teacher in {name}: expected a directory with config.json and model.safetensors, or a name on the hub.')
  try:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=['*config.json', '*model*.safetensors', '*.index.json']))
  except Exception as e:  # no network, no such name, a licence that was not accepted
    gated = ' Its licence must be accepted on its page first, and binds what is distilled from it.' if 'gated' in str(e).lower() else ''
    raise UserError(f'cannot fetch the teacher {name} ({(str(e).splitlines() or [type(e).__name__])[0][:200]}).{gated}') from e


def _spec(kind: str, config: dict) -> Spec:
  common = dict(heads=config['num_attention_heads'], patch_size=config['patch_size'])
  if kind == 'clip':
    return Spec(
      **common, mean=CLIP_MEAN, std=CLIP_STD, eps=config.get('layer_norm_eps', 1e-5), activation=config.get('hidden_act', 'quick_gelu')
    )
  if kind == 'siglip':
    activation = config.get('hidden_act', 'gelu_pytorch_tanh')
    # NaFlex: patches of any number, whose table is square and whose config has no image size.
    return Spec(
      **common, mean=HALF, std=HALF, eps=config.get('layer_norm_eps', 1e-6), activation=activation, linear_positions='num_patches' in config
    )
  if kind == 'dinov3':
    rope = config.get('rope_theta', 100.0)
    return Spec(**common, eps=config.get('layer_norm_eps', 1e-5), activation=config.get('hidden_act', 'gelu'), rope=rope)
  # DINO's own epsilon: the converted files of DINO carry transformers' default.
  return Spec(**common, eps=1e-6 if kind == 'dino' else config.get('layer_norm_eps', 1e-6), activation=config.get('hidden_act', 'gelu'))


def _timm_spec(config: dict, state: dict[str, np.ndarray]) -> Spec:
  preparation = config.get('pretrained_cfg', config)
  architecture = config.get('architecture', '')
  if 'patch_embed.proj.weight' not in state or not architecture.startswith(('vit_', 'deit_')):
    raise UserError(f'the timm model {architecture or "without a name"} is no plain ViT.')
  width, patch = state['patch_embed.proj.weight'].shape[0], state['patch_embed.proj.weight'].shape[-1]
  clip = 'clip' in architecture
  mean, std = (tuple(preparation.get(k, default)) for k, default in (('mean', IMAGENET_MEAN), ('std', IMAGENET_STD)))
  activation = 'quick_gelu' if 'quickgelu' in architecture else 'gelu'
  return Spec(heads=max(width // 64, 1), patch_size=patch, mean=mean, std=std, eps=1e-5 if clip else 1e-6, activation=activation)


def converted(kind: str, state: dict[str, np.ndarray], where: Any) -> dict[str, Any]:
  """Our arrays out of theirs. Raises UserError that names what is missing."""
  layout = LAYOUTS[kind]
  prefix = next((p for p in ('', 'dinov2.', 'vit.', 'model.') if f'{p}{layout["patch"]}.weight' in state), None)
  if prefix is None:
    raise UserError(f'{where} lacks {layout["patch"]}.weight: it is no {kind} vision model.')
  get = lambda name: np.asarray(state[prefix + name], np.float32) if prefix + name in state else None

  def need(name: str) -> np.ndarray:
    found = get(name)
    if found is None:
      raise UserError(f'{where} lacks {prefix}{name}, which a {kind} teacher has.')
    return found

  def pair(name: str, transpose: bool = False) -> dict[str, np.ndarray]:
    weight, bias = need(f'{name}.weight'), get(f'{name}.bias')
    weight = weight.T if transpose else weight
    return dict(weight=weight, bias=np.zeros(weight.shape[-1], np.float32) if bias is None else bias)

  kernel = need(f'{layout["patch"]}.weight')
  bias = get(f'{layout["patch"]}.bias')
  params: dict[str, Any] = dict(
    patch=dict(
      # NaFlex has a matrix over (row, column, colour) where others have a convolution.
      weight=kernel.T if kernel.ndim == 2 else kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)),
      bias=np.zeros(len(kernel), np.float32) if bias is None else bias,
    ),
    norm=pair(layout['norm']) if get(f'{layout["norm"]}.weight') is not None else pair('fc_norm'),
  )
  for name in ('cls', 'registers', 'pos'):
    if name in layout and (found := get(layout[name])) is not None:
      params[name] = found.reshape(-1, found.shape[-1])
  if 'pre_norm' in layout and get(f'{layout["pre_norm"]}.weight') is not None:
    params['pre_norm'] = pair(layout['pre_norm'])
  if 'projection' in layout and (found := get(layout['projection'])) is not None:
    params['projection'] = found.T
  pattern = re.compile(re.escape(prefix + layout['block']).replace(re.escape('{i}'), r'(\d+)'))
  depth = 1 + max((int(m[1]) for key in state if (m := pattern.match(key))), default=-1)
  if not depth:
    raise UserError(f'{where} has no blocks of a {kind} teacher.')
  blocks = []
  for i in range(depth):
    at = layout['block'].format(i=i)
    if 'qkv' in layout:
      qkv = pair(at + layout['qkv'], True)
    else:
      parts = [pair(at + layout[n], True) for n in ('query', 'key', 'value')]
      qkv = dict(weight=np.concatenate([p['weight'] for p in parts], 1), bias=np.concatenate([p['bias'] for p in parts]))
    block: dict[str, Any] = dict(
      norm1=pair(at + layout['norm1']), norm2=pair(at + layout['norm2']), qkv=qkv, proj=pair(at + layout['proj'], True)
    )
    if 'gated' in layout and get(f'{at}{layout["gated"]}.weight') is not None:
      both = pair(at + layout['gated'], True)
      gate, up = (dict(zip(('weight', 'bias'), x)) for x in zip(*(np.split(both[k], 2, -1) for k in ('weight', 'bias'))))
      block |= dict(gate=gate, fc1=up, fc2=pair(at + layout['gated_out'], True))
    else:
      block |= dict(fc1=pair(at + layout['fc1'], True), fc2=pair(at + layout['fc2'], True))
      if 'gate' in layout and get(f'{at}{layout["gate"]}.weight') is not None:
        block['gate'] = pair(at + layout['gate'], True)
    for name in ('scale1', 'scale2'):
      if name in layout and (found := get(at + layout[name])) is not None:
        block[name] = found
    blocks.append(block)
  return params | dict(blocks=jax.tree.map(lambda *x: np.stack(x), *blocks))


def apply(spec: Spec, params: dict[str, Any], images: jax.Array, layers: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
  """Images [B, h, w, 3] in [0, 1], whose sides the patches divide → features [B, N, V], row by row.

  With `layers` (blocks from 1) the mean of their outputs, each through the last norm, instead of the last one's.
  """
  grid = images.shape[1] // spec.patch_size, images.shape[2] // spec.patch_size
  x = _linear(patches(normalize(images, spec.mean, spec.std).astype(dtype), spec.patch_size), params['patch'], dtype)
  b, n, width = x.shape
  front = [jnp.broadcast_to(params[k].astype(dtype), (b, *params[k].shape)) for k in ('cls', 'registers') if k in params]
  skipped = sum(part.shape[1] for part in front)
  if 'pos' in params:
    table = _positions(params['pos'], grid, spec.linear_positions)
    with_cls = len(params['pos']) - math.isqrt(len(params['pos'])) ** 2  # a place for [CLS]
    x = x + table[with_cls:].astype(dtype)
    if with_cls and front:
      front[0] = front[0] + table[:1].astype(dtype)
  x = jnp.concatenate([*front, x], 1)
  if 'pre_norm' in params:
    x = _norm(x, params['pre_norm'], spec.eps).astype(dtype)
  turned = _rotary(grid, width // spec.heads, spec.rope) if spec.rope else None

  def block(x, p):
    return _block(spec, p, x, turned, skipped, dtype), _norm(x, params['norm'], spec.eps) if layers else None

  x, states = jax.lax.scan(block, x, params['blocks'])  # states: what each block was given
  if layers:
    outputs = jnp.concatenate([states[1:], _norm(x, params['norm'], spec.eps)[None]])
    x = outputs[np.array(layers) - 1].mean(0)
  else:
    x = _norm(x, params['norm'], spec.eps)
  x = x[:, skipped:]
  return jnp.dot(x.astype(dtype), params['projection'].astype(dtype)) if 'projection' in params else x


def _block(spec, p, x, turned, skipped, dtype):
  b, t, width = x.shape
  y = _norm(x, p['norm1'], spec.eps).astype(dtype)
  if turned is None:
    q_bias, _, v_bias = p['qkv']['bias'].reshape(3, spec.heads, -1)  # the keys' adds the same to all logits of a query
    y = attention.attend(y, p['qkv']['weight'].astype(dtype).reshape(width, 3, spec.heads, -1), q_bias, v_bias, None)
  else:
    q, k, v = jnp.moveaxis(_linear(y, p['qkv'], dtype).reshape(b, t, 3, spec.heads, -1), 2, 0)
    q, k = _turn(q, turned, skipped), _turn(k, turned, skipped)
    logits = jnp.einsum('bqhe,bkhe->bhqk', q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    y = jnp.einsum('bhqk,bkhe->bqhe', jax.nn.softmax(logits).astype(dtype), v).reshape(b, t, width)
  x = x + _linear(y, p['proj'], dtype) * p.get('scale1', jnp.ones(())).astype(dtype)
  y = _norm(x, p['norm2'], spec.eps).astype(dtype)
  act = ACTIVATIONS[spec.activation]
  if 'gate' in p:
    act = ACTIVATIONS['silu'] if spec.rope is None else act  # DINOv2's SwiGLU; DINOv3 names its own
    hidden = act(_linear(y, p['gate'], dtype)) * _linear(y, p['fc1'], dtype)
  else:
    hidden = act(_linear(y, p['fc1'], dtype))
  hidden = chip.kept_apart(hidden)  # or the compiler makes both products one, which takes longer (docs/estimates.md)
  return x + _linear(hidden, p['fc2'], dtype) * p.get('scale2', jnp.ones(())).astype(dtype)


def _linear(x, p, dtype):
  return jnp.dot(x, p['weight'].astype(dtype)) + p['bias'].astype(dtype)


def _norm(x, p, eps):
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * p['weight'] + p['bias']


def _positions(table, grid: tuple[int, int], linear: bool) -> jax.Array:
  """[(1 +) N, D] for another grid: bicubic at exact size ratios, or bilinear and antialiased; [CLS]'s kept."""
  side = math.isqrt(len(table))
  if (side, side) == grid:
    return jnp.asarray(table)
  front, body = table[: len(table) - side * side], table[len(table) - side * side :]
  body = jnp.asarray(body).reshape(side, side, -1)
  if linear:
    body = jax.image.resize(body, (*grid, body.shape[-1]), 'linear', antialias=True)
  else:
    rows, cols = (cubic_weights(side, g, g / side) for g in grid)
    body = jnp.einsum('is,jt,std->ijd', rows, cols, body, precision='highest')
  return jnp.concatenate([jnp.asarray(front), body.reshape(grid[0] * grid[1], -1)])


def _rotary(grid: tuple[int, int], head_dim: int, base: float) -> tuple[np.ndarray, np.ndarray]:
  """(cosines, sines) [N, head_dim]: angles grow with where the centre of a patch lies between -1 and 1, down and across (DINOv3)."""
  places = np.stack(np.meshgrid(*((np.arange(g) + 0.5) / g * 2 - 1 for g in grid), indexing='ij'), -1).reshape(-1, 2)
  frequencies = np.exp(-math.log(base) * np.arange(0, 1, 4 / head_dim))
  angles = np.tile((np.float64(2 * np.pi) * places.astype(np.float64)[:, :, None] * frequencies).reshape(len(places), -1), 2)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _turn(x, turned, skipped):
  """Rotates the patches of queries or keys [B, T, H, E]; what stands before them is left as it is."""
  cos, sin = (a[:, None].astype(x.dtype) for a in turned)
  front, body = x[:, :skipped], x[:, skipped:]
  one, two = jnp.split(body, 2, -1)
  return jnp.concatenate([front, body * cos + jnp.concatenate([-two, one], -1) * sin], 1)
