"""A small CLIP of one's own, as a teacher where no released one fits: images against captions made of class names.

It is transformers' FlaxCLIPModel, and is left in WORKDIR/hf as save_pretrained writes it, so VQ-KD opens it like any CLIP.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models import quantizer, teacher
from beitv2_jax.models.images import CLIP_MEAN, CLIP_STD, normalize, unit_images
from beitv2_jax.tasks.base import Task

BOS, EOS = 0, 1
VOCAB = 4096


def caption_ids(text: str, length: int) -> np.ndarray:
  """int32 [length]: start, words by their checksum, end; the end token also pads."""
  ids = [BOS, *(zlib.crc32(w.encode()) % (VOCAB - 2) + 2 for w in text.lower().split()[: length - 2])]
  return np.asarray(ids + [EOS] * (length - len(ids)), np.int32)


@dataclasses.dataclass(frozen=True)
class Caption:
  """Adds `text`, the ids of the caption of the record's class."""

  captions: tuple[str, ...]
  length: int

  def __call__(self, record, rng):
    return record | dict(text=caption_ids(self.captions[record['label']], self.length))


def _tell_apart(captions: tuple[str, ...], length: int) -> None:
  """Raises UserError for captions that are the same to the text encoder."""
  seen: dict[bytes, str] = {}
  for caption in captions:
    other = seen.setdefault(caption_ids(caption, length).tobytes(), caption)
    if other != caption:
      raise UserError(
        f'{other!r} and {caption!r} are the same to the text encoder (model.text_length={length}, upper and lower case do not count): rename a class.'
      )


def captions_of(config: Any, source: Any) -> tuple[str, ...]:
  try:
    return tuple(config.caption.format(name) for name in source.classes)
  except (KeyError, IndexError, ValueError, AttributeError) as e:
    raise UserError(f"caption={config.caption!r}: text with one {{}} for the class's name.") from e


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  if source is not None and source.classes:  # room for the longest caption: cut ones could be the same
    words = max(len(caption.split()) for caption in captions_of(config, source))
    config.model.text_length = max(config.model.text_length, words + 2)
  if not isinstance(config.data.image_size, int):
    raise UserError(f'data.image_size={tuple(config.data.image_size)}: a CLIP takes squares; give one number.')
  model = teacher.new_clip(**config.model.to_dict(), image_size=config.data.image_size, vocab=VOCAB)
  return ClipTask(config, model), {}


@dataclasses.dataclass(frozen=True)
class ClipTask(Task):
  config: Any
  model: Any

  title = 'a small CLIP'

  def init(self, key):
    return {'params': teacher.fresh_clip_params(self.model, key)}

  @staticmethod
  def transforms(config, train, source):
    if not source.classes:
      raise UserError(f'{config.data.source} has no classes to make captions of; use a folder of class folders, or a ready teacher.')
    captions = captions_of(config, source)
    _tell_apart(captions, config.model.text_length)
    return [*image_transforms(config.data, train), Caption(captions, config.model.text_length)]

  def _logits(self, params, batch):
    """[B, B] scaled cosines, image against text."""
    text = batch['text']
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    images = normalize(unit_images(batch['image']), CLIP_MEAN, CLIP_STD)
    out = self.model.module.apply({'params': params}, text, images, jnp.ones_like(text), positions)
    image, text = quantizer.l2norm(out.image_embeds), quantizer.l2norm(out.text_embeds)
    return jnp.exp(params['logit_scale']) * image @ text.T

  def loss(self, params, model_state, frozen, batch, key):
    logits = self._logits(params, batch)
    # A class has one caption, so a batch holds each several times: all its images and captions are right answers.
    same = (batch['text'][:, None] == batch['text']).all(-1)
    target = same / same.sum(-1, keepdims=True)
    loss = sum(optax.softmax_cross_entropy(x, target).mean() for x in (logits, logits.T)) / 2
    return loss, ({}, {})

  def evaluate(self, params, model_state, frozen, batch):
    """Does the best caption in the batch say the right class? (Zero-shot accuracy once a batch has all classes.)"""
    best = self._logits(params, batch).argmax(-1)
    return dict(caption_acc=100.0 * (batch['label'][best] == batch['label']))

  def finish(self, params, workdir):
    folder = Path(workdir) / 'hf'
    self.model.save_pretrained(folder, params=jax.device_get(params))
