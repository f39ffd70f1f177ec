"""Semantic segmentation: UperNet on a pretrained backbone (paper section 3.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from beitv2_jax import config as config_lib
from beitv2_jax.data import scenes
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.images import network_images
from beitv2_jax.models.upernet import Segmenter, resample
from beitv2_jax.tasks import classify
from beitv2_jax.tasks.base import Task
from beitv2_jax.tasks.scores import segmentation_scores

HEADS = ('fpn', 'psp', 'lateral', 'classifier', 'aux')  # what no other stage has


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  if source is not None and not hasattr(source, 'mask_names'):
    raise UserError(f'{config.data.source} has no masks; segmentation needs data.source=scenes:PATH.')
  names = getattr(source, 'classes', None)
  if names and len(names) != config.model.classes:
    raise UserError(f'{config.data.source} names {len(names)} classes, model.classes is {config.model.classes}.')
  config.class_names = tuple(names or ())
  return SegmentTask(config, from_config.build(config)), {}


def labels_of(config: Any) -> scenes.Labels:
  labels = config.labels
  return scenes.Labels(config.model.classes, labels.reduce_zero, tuple(labels.ignore), tuple(labels.get('values', ())))


@dataclasses.dataclass(frozen=True)
class SegmentTask(Task):
  config: Any
  model: Segmenter
  title = 'a segmenter (UperNet)'
  headline = ('pixel_acc',)

  def init(self, key):
    return from_config.init(self.model, self.config, key)

  def adopt(self, theirs, variables, fresh):
    classify.check_sizes(theirs, self.config)
    params = classify.adopt_backbone(theirs, variables, config_lib.patch_grid(self.config))
    if theirs.task == 'segmenter':
      return variables | {'params': params}
    params = classify.fresh_where_missing({'backbone': params['backbone']}, fresh['params'], HEADS)
    return fresh | {'params': params}

  @staticmethod
  def transforms(config, train, source):
    size = config_lib.image_shape(config)[:2]
    if not train:
      return [labels_of(config), scenes.Fit(size), scenes.Pad(size)]
    return [
      labels_of(config),
      scenes.RandomResize(min(size), tuple(config.data.resize_ratio)),
      scenes.RandomCrop(size),
      scenes.FlipBoth(),
      scenes.PhotometricDistortion(),
      scenes.Pad(size),
    ]

  def look_at(self, sources):
    config, labels, lines = self.config, labels_of(self.config), super().look_at(sources)
    for split, source in sources.items():
      survey = scenes.survey(source, labels)
      lines.append(f'{split} masks: {survey}')
      problem = survey.problem(must_occur=split == 'train')
      if problem and not config.labels.get('any', False):
        raise UserError(f'{config.data.source}: {problem} The {split} masks hold: {survey}. --config.labels.any=True trains all the same.')
    return lines

  def _apply(self, variables, images, **kwargs):
    return self.model.apply(variables, network_images(images, self.config), **kwargs)

  def loss(self, params, model_state, frozen, batch, key):
    drop_path, dropout = jax.random.split(key)
    rngs = dict(drop_path=drop_path, dropout=dropout)
    outs, changed = self._apply({'params': params, **model_state}, batch['image'], train=True, mutable=['batch_stats'], rngs=rngs)
    mask = batch['mask'].astype(jnp.int32)
    known = mask != scenes.IGNORE
    # The official mean is over all pixels, those without a class included (with loss 0).
    count = known.size if self.config.average_over_ignored else jnp.maximum(known.sum(), 1)

    def cross_entropy(logits):
      logits = resample(logits.astype(jnp.float32), mask.shape[1:])
      return jnp.where(known, optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, mask, 0)), 0).sum() / count, logits

    loss, logits = cross_entropy(outs[0])
    aux = cross_entropy(outs[1])[0] if outs[1] is not None else 0.0
    right = (logits.argmax(-1) == mask) & known
    metrics = dict(decode_loss=loss, aux_loss=jnp.asarray(aux, jnp.float32), pixel_acc=100 * right.sum() / jnp.maximum(known.sum(), 1))
    return loss + self.config.aux_weight * aux, (changed, metrics)

  def update(self, model_state, stats, key, params):
    return model_state | jax.tree.map(lambda x: x.mean(0), stats), {}

  def evaluate(self, params, model_state, frozen, batch):
    """Confusion [K, K] (true, predicted) of each image, made to fit the model's input: quick, not the exact figure of `segmentation`."""
    logits = self._apply({'params': params, **model_state}, batch['image'])[0]
    mask = batch['mask'].astype(jnp.int32)
    best, k = resample(logits.astype(jnp.float32), mask.shape[1:]).argmax(-1), self.config.model.classes
    cell = jnp.where(mask == scenes.IGNORE, k * k, mask * k + best).reshape(len(mask), -1)
    counts = jax.vmap(lambda c: jnp.zeros(k * k + 1).at[c].add(1.0))(cell)
    return dict(confusion=counts[:, :-1].reshape(-1, k, k))

  def samples(self, params, model_state, frozen, batch):
    logits = self._apply({'params': params, **model_state}, batch['image'])[0].astype(jnp.float32)
    return dict(image=batch['image'], mask=batch['mask'], predicted=resample(logits, batch['mask'].shape[1:]).argmax(-1))

  def summarize(self, means):
    return {f'quick_{k}': v for k, v in segmentation_scores(np.asarray(means['confusion'])).items() if np.isscalar(v)}
