"""The Python door: `model = beitv2_jax.load(DIR)` opens anything trained here, without a config."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.kernels import attention
from beitv2_jax.kernels.functions import normalize_layer
from beitv2_jax.models import from_config, quantizer
from beitv2_jax.models.images import normalize, statistics, unit_images
from beitv2_jax.models.layers import spread_table
from beitv2_jax.training import sharding
from beitv2_jax.weights import adapt, stages


def _array(x: Any, name: str) -> jax.Array:
  try:
    return jnp.asarray(x)
  except (TypeError, ValueError) as e:
    raise UserError(f'{name}: {type(x).__name__} is no array of numbers.') from e


class Model:
  """A trained model and its weights. Images are uint8 or float [B, h, w, 3], RGB; floats are in [0, 1].

  `normalize=False` takes floats that are what the network sees: [-1, 1] for a tokenizer, ImageNet's statistics (or its config's) otherwise.
  Every method raises UserError for images of another layout, range or size.
  """

  def __init__(self, config: Any, variables: Any = None, seed: int = 0, devices: Sequence | None = None):
    """Without `variables` the weights are fresh: the untrained control. Batches are split over `devices`, all of this host by default."""
    self.config, self.kind = config, config.task
    self.module: Any = from_config.build(config)
    self.mesh = sharding.make_mesh(devices=jax.local_devices() if devices is None else devices)
    variables = from_config.fresh_variables(config, seed) if variables is None else variables
    self.variables = jax.device_put(variables, sharding.replicated(self.mesh))
    self._jitted: dict[str, Callable] = {}
    self.grid = config_lib.patch_grid(config)

  def __repr__(self) -> str:
    h, w, _ = config_lib.image_shape(self.config)
    sizes = self._encoder()
    return (
      f'<{self.kind} of width {sizes.width} and {sizes.depth} blocks for images of {h} x {w} in {self.grid[0]} x {self.grid[1]} patches>'
    )

  def tokens(self, images, normalize: bool = True) -> jax.Array:
    """Codes of every patch, int32 [B, Gh, Gw]. Tokenizers, and pixel decoders by the tokenizer they were trained with."""
    if self.kind == 'pixels':
      return self.tokenizer.tokens(images, normalize)
    x = self._input(images, normalize, ('tokenizer',))
    return self._call('tokens', x).reshape(-1, *self.grid)

  def assignments(self, images, normalize: bool = True) -> tuple[jax.Array, jax.Array]:
    """(codes, closeness of each patch's vector to its code), both [B, Gh, Gw]: 1 less half the squared distance, which is the cosine of
    vectors of length 1, as all are but those of fsq. Tokenizers only."""
    codes, closeness = self._call('assignments', self._input(images, normalize, ('tokenizer',)))
    return codes.reshape(-1, *self.grid), closeness.reshape(-1, *self.grid)

  def pixels(self, codes) -> jax.Array:
    """What the decoder draws for codes [B, Gh, Gw], RGB in [0, 1], [B, h, w, 3]. Pixel decoders (configs/pixels_b16.py) only."""
    self._must_be('pixels')
    codes, known = _array(codes, 'codes'), self.config.model.codes
    if codes.shape[1:] != self.grid or not jnp.issubdtype(codes.dtype, jnp.integer):
      raise UserError(f'codes are {codes.dtype} {codes.shape}; expected whole numbers [B, {self.grid[0]}, {self.grid[1]}].')
    if codes.size and not (int(codes.min()) >= 0 and int(codes.max()) < known):
      raise UserError(
        f'codes span [{int(codes.min())}, {int(codes.max())}]; this decoder knows 0 to {known - 1}: is it of another tokenizer?'
      )
    return self._call('pixels', codes.reshape(len(codes), -1))

  @functools.cached_property
  def tokenizer(self) -> 'Model':
    """The tokenizer that a pretrained model or a pixel decoder was made with, opened from where its config says."""
    self._must_be('pixels', 'pretrain')
    where = self.config.tokenizer_from
    if where == 'untrained':
      raise UserError('this stage was made with the untrained tokenizer of smoke tests, which is not kept.')
    found = load(where)
    if self.kind == 'pixels':
      if not same_codebook(found, self):
        raise UserError(f'the tokenizer in {where} is not the one that this pixel decoder was trained with: its codebook is another.')
    return found

  def reconstruct(self, images, normalize: bool = True) -> jax.Array:
    """The decoder's prediction of the teacher's features, [B, N, V]. Tokenizers only."""
    return self._call('features', self._input(images, normalize, ('tokenizer',)))

  def features(self, images, normalize: bool = True, layers: bool = False) -> dict[str, Any]:
    """{'cls' [B, D], 'patches' [B, N, D]} of the last block, raw; `layers=True` adds 'layers': the same of each block."""
    return self._call('states' if layers else 'last', self._input(images, normalize))

  def pooled_layers(self, images, normalize: bool = True) -> jax.Array:
    """[CLS] and the mean of the patches after every block, [B, blocks, 2, D]: what frozen features are probed on."""
    return self._call('pooled', self._input(images, normalize))

  def attention(self, images, block: int = 0, normalize: bool = True) -> jax.Array:
    """How much each token attends to each other in a block (1 is the first; 0 stands for the last): [B, heads, T, T], [CLS] first.

    `attention[b, h, 1 + p]` is where patch p looks. Of the encoder or the backbone, whatever the model is.
    """
    x, depth = self._input(images, normalize), self._encoder().depth
    if not (isinstance(block, int) and 0 <= block <= depth):
      raise UserError(f'block={block}: this model has blocks 1 to {depth}; 0 is the last.')
    return self._call(f'attention_{block or depth}', x)

  def at_size(self, size: int | tuple[int, int]) -> 'Model':
    """The same model for images of another size, its position tables resampled (as fine-tuning does). Raises UserError for a size that
    its patches do not divide."""
    self._must_be('tokenizer', 'pretrain', 'classifier', 'segmenter')
    config, patch = copy.deepcopy(self.config).unlock(), self.config.model.patch_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if any(side < 2 * patch or side % patch for side in sides):
      raise UserError(f'size {size}: the patches of this model are {patch} px; give multiples of that, at least {2 * patch}.')
    with config.data.ignore_type():
      config.data.image_size = size
    if config_lib.patch_grid(config) == self.grid:
      return self
    params = adapt.fit_grid(jax.device_get(self.variables['params']), self.grid, config_lib.patch_grid(config))
    return Model(config.lock(), dict(self.variables) | dict(params=params), devices=list(self.mesh.devices.flat))

  def logits(self, images, normalize: bool = True) -> jax.Array:
    """Class scores: [B, classes] of a classifier, [B, 4Gh, 4Gw, classes] of a segmenter (a quarter of the image at 16 px patches)."""
    return self._call('scores', self._input(images, normalize, ('classifier', 'segmenter')))

  def masked_logits(self, images, mask, normalize: bool = True) -> list[jax.Array]:
    """One array [B, N, K] a branch for images whose patches in `mask` (bool [B, N] or [B, Gh, Gw]) are hidden."""
    x = self._input(images, normalize, ('pretrain',))
    if self.config.get('target', 'codes') != 'codes':
      raise UserError(f'this model was trained to predict {self.config.target}: it has no scores of codes.')
    if not self.config.model.vocab:
      raise UserError('this checkpoint came without its lm_head: there are no codes to predict.')
    mask, (gh, gw) = _array(mask, 'mask'), self.grid
    if mask.dtype != bool:
      raise UserError(f'the mask is {mask.dtype}; use bool, True where a patch is hidden.')
    if mask.shape not in ((len(x), gh * gw), (len(x), gh, gw)):
      raise UserError(
        f'mask has shape {mask.shape}; expected {(len(x), gh * gw)} or {(len(x), gh, gw)}: a cell for every patch of every image.'
      )
    mask = mask.reshape(len(x), -1)
    return self._call('logits', x, mask)

  def _encoder(self) -> Any:
    """The part of the config that describes the encoder, or the backbone."""
    return self.config.model.encoder if self.kind == 'tokenizer' else self.config.model

  def _must_be(self, *kinds: str) -> None:
    if self.kind not in kinds:
      raise UserError(f'this is a {self.kind} model; that needs a {" or ".join(kinds)} model.')

  def _input(self, images, scale: bool, kinds: tuple[str, ...] = ()) -> jax.Array:
    self._must_be(*(kinds or ('tokenizer', 'pretrain', 'classifier', 'segmenter')))
    images = _array(images, 'images')
    h, w, _ = config_lib.image_shape(self.config)
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
      raise UserError(f'images have shape {images.shape}; expected [B, h, w, 3], RGB with channels last.')
    if images.shape[1:3] != (h, w):
      raise UserError(f'images are {images.shape[1]}x{images.shape[2]}; this model takes {h}x{w}.')
    if not scale:
      if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f'images are {images.dtype}; normalize=False takes floats that are normalised already.')
      return images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
      images = unit_images(images)
    elif not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(f'images are {images.dtype}; use uint8, or floats in [0, 1].')
    elif not (float(images.min()) >= 0 and float(images.max()) <= 1):  # or NaN
      raise UserError(
        f'float images must lie in [0, 1]; these span [{float(images.min()):.3g}, {float(images.max()):.3g}]. normalize=False takes any range.'
      )
    return (images * 255) / 127.5 - 1 if self.kind == 'tokenizer' else normalize(images, *statistics(self.config))

  def _call(self, name: str, *arrays: jax.Array) -> Any:
    """One of `_compiled`'s functions over images [B, ...] that are split over all devices, B filled up where it does not divide."""
    if name not in self._jitted:
      self._jitted[name] = self._compiled(name)
    count, missing = len(arrays[0]), -len(arrays[0]) % self.mesh.size
    rows = [jnp.concatenate([x, jnp.repeat(x[:1], missing, 0)]) if missing else x for x in arrays]
    with jax.set_mesh(self.mesh):
      out = self._jitted[name](self.variables, *jax.device_put(rows, sharding.split_rows(self.mesh)))
      return jax.tree.map(lambda x: x[:count], out) if missing else out

  def _compiled(self, name: str) -> Callable:
    module = self.module

    def states(variables, x, taps):
      if self.kind == 'tokenizer':
        last, found, _ = module.apply(variables, x, taps, method='encoder_states')
      else:
        last, found, _ = module.apply(variables, x, taps=taps, method='tokens')
      return _split(last), [_split(found[i]) for i in taps]

    def last(variables, x):
      return states(variables, x, ())[0]

    def with_layers(variables, x):
      last, layers = states(variables, x, tuple(range(1, self._encoder().depth + 1)))
      return last | dict(layers=layers)

    def pooled(variables, x):
      layers = with_layers(variables, x)['layers']
      return jnp.stack([jnp.stack([tokens['cls'], tokens['patches'].mean(1)], 1) for tokens in layers], 1)

    def attention_of(block, variables, x):
      """The block's input is what the one before leaves."""
      params, before = variables['params'], block - 1
      if self.kind == 'tokenizer':
        x, encoder = module.apply(variables, x, (before,), method='encoder_states')[1][before], params['encoder']['vit']
      else:
        x, encoder = module.apply(variables, x, taps=(before,), method='tokens')[1][before], params['backbone']
      tables = [owner['rel_pos_bias']['table'] for owner in (encoder, encoder[f'block_{before}']['attn']) if 'rel_pos_bias' in owner]
      bias = spread_table(sum(tables[1:], tables[0]), self.grid) if tables else None
      block_params = encoder[f'block_{before}']
      x = normalize_layer(x, block_params['norm1']['scale'], block_params['norm1']['bias'], x.dtype)[1]
      return attention.weights(x, block_params['attn']['qkv'], block_params['attn']['q_bias'], bias)

    def assigned(variables, x):
      z = module.apply(variables, x, method='encode')
      embedding = variables['codebook']['quantizer']['embedding']
      codes = quantizer.nearest(z, embedding)
      return codes, 1 - jnp.square(z - embedding[codes]).sum(-1) / 2

    if name.startswith('attention_'):
      return jax.jit(functools.partial(attention_of, int(name.removeprefix('attention_'))))
    calls = dict(
      tokens=lambda v, x: module.apply(v, x, method='tokens'),
      assignments=assigned,
      features=lambda v, x: module.apply(v, x)['features'],
      logits=lambda v, x, mask: list(module.apply(v, x, mask)),
      scores=lambda v, x: module.apply(v, x)[0] if self.kind == 'segmenter' else module.apply(v, x),
      pixels=lambda v, codes: jnp.clip(module.apply(v, codes), 0, 1),
      last=last,
      states=with_layers,
      pooled=pooled,
    )
    return jax.jit(calls[name])


def _split(tokens: jax.Array) -> dict[str, jax.Array]:
  return dict(cls=tokens[:, 0], patches=tokens[:, 1:])


def load(directory: str | Path, ema: bool = False) -> Model:
  """Opens a workdir (its newest complete checkpoint); with `ema` the running average of its weights. Raises UserError if there is none."""
  config, variables, _ = stages.load_variables(directory, 'a workdir, or a directory made by `python -m beitv2_jax convert`')
  average = variables.pop('ema', None)
  if ema:
    if average is None:
      raise UserError(f'{directory} was trained without ema_decay: there is no average of its weights.')
    variables['params'] = average
  config.dtype, config.layers.attention = 'float32', 'auto'
  return Model(config, variables)


def same_codebook(tokenizer: Model, pixels: Model) -> bool:
  """Whether a pixel decoder draws the codes of this tokenizer."""
  ours, theirs = pixels.variables['codebook']['embedding'], tokenizer.variables['codebook']['quantizer']['embedding']
  return ours.shape == theirs.shape and bool(jnp.allclose(ours, theirs, atol=1e-5))


def in_batches(function: Any, *arrays: np.ndarray, batch: int = 128) -> Any:
  """function over rows of `arrays` in batches of one shape (the last one padded), results joined as numpy arrays."""
  outs = []
  for i in range(0, len(arrays[0]), batch):
    parts = [a[i : i + batch] for a in arrays]
    count = len(parts[0])
    padded = [np.concatenate([p, np.repeat(p[:1], batch - count, 0)]) for p in parts]
    outs.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], function(*padded)))
  return jax.tree.map(lambda *xs: np.concatenate(xs), *outs)
