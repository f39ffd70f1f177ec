"""Classification: fine-tuning of what pretraining left, or training from scratch (paper section 3.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from beitv2_jax import config as config_lib
from beitv2_jax.data import augment
from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.images import network_images
from beitv2_jax.tasks.base import Task
from beitv2_jax.weights import adapt, trees


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  """The number of classes, and their names, come from the data."""
  if source is not None:
    if not source.classes:
      raise UserError(f'{config.data.source} has no labels; classification needs class folders, or a list with labels.')
    if len(source.classes) < 2:
      raise UserError(
        f'{config.data.source} has {len(source.classes)} class ({source.classes[0]}): there is nothing to tell apart. Give a folder with one folder a class, '
        'of at least two classes.'
      )
    if config.model.classes not in (0, len(source.classes)):
      raise UserError(
        f'model.classes={config.model.classes}, but data.source={config.data.source} has {len(source.classes)} classes; leave it 0 to take them from there.'
      )
    config.model.classes, config.class_names = len(source.classes), tuple(source.classes)
  config.model.classes = config.model.classes or 1000
  if (config.mixup or config.cutmix) and config.batch_size // config.accumulate % 2:
    raise UserError(f'mixup and cutmix pair images: batch_size={config.batch_size} in {config.accumulate} parts is odd.')
  return ClassifyTask(config, from_config.build(config)), {}


def adopt_backbone(theirs: Any, variables: Any, grid: tuple[int, int], prefix: str = 'backbone') -> dict:
  """Another stage's parameters as those of a model with a per-block bias table on `grid`: a pretrained, tokenizer or classifier stage.

  Raises UserError for other stages.
  """
  params, source = variables['params'], config_lib.patch_grid(theirs)
  if theirs.task == 'pretrain':
    return adapt.pretrain_to_classifier(params, source, grid)
  if theirs.task == 'tokenizer':  # its encoder
    return adapt.fit_grid({'backbone': params['encoder']['vit']}, source, grid)
  if theirs.task in ('classifier', 'segmenter'):
    return adapt.fit_grid(params, source, grid)
  raise UserError(f'init_from holds a {theirs.task} stage; start from a pretrain, tokenizer or classifier one.')


def check_sizes(theirs: Any, ours: Any) -> None:
  """Says in words what a tree's diff says in shapes."""
  m = theirs.model.encoder if theirs.task == 'tokenizer' else theirs.model
  wrong = [f'{k} {m[k]} there, {ours.model[k]} here' for k in ('width', 'depth', 'heads') if m[k] != ours.model[k]]
  wrong += [f'patch_size {theirs.model.patch_size} there, {ours.model.patch_size} here'] * (
    theirs.model.patch_size != ours.model.patch_size
  )
  needs = dict(abs_pos=True, rel_pos='none', layer_scale=0.0) if theirs.task == 'tokenizer' else {}
  wrong += [
    f'model.{k}={ours.model[k]!r}, a tokenizer needs {v!r} (the recipe argument encoder sets it)'
    for k, v in needs.items()
    if ours.model[k] != v
  ]
  if wrong:
    raise UserError(
      f'init_from={ours.init_from} holds a {theirs.task} stage of another model: {"; ".join(wrong)}. Set model.* to its sizes.'
    )


def fresh_where_missing(given: dict, fresh: dict, fresh_parts: tuple[str, ...]) -> dict:
  """`given` parameters with those of `fresh_parts` (first names of paths) taken from `fresh` where they lack."""
  flat, want = trees.flatten(given), trees.flatten(fresh)
  return trees.unflatten(flat | {k: v for k, v in want.items() if k not in flat and k.split('/')[0].startswith(fresh_parts)})


def head_in_order(head: Any, theirs: tuple[str, ...], config: Any) -> Any:
  """A classifier's head with its outputs in the order of this config's classes; classes are the same if their names are."""
  ours = tuple(config.class_names)
  if not theirs or not ours or theirs == ours:  # an imported checkpoint may have no names
    return head
  if set(theirs) != set(ours):
    new = sorted(set(ours) - set(theirs))
    raise UserError(
      f'init_from={config.init_from} knows other classes: {", ".join(new[:3])} of {config.data.source} are not among them. --config.fresh_head=True keeps '
      'its backbone and starts a new head.'
    )
  logging.warning('the classes of init_from=%s stand in another order here; the outputs of its head follow their names', config.init_from)
  order = np.array([theirs.index(name) for name in ours])
  return jax.tree.map(lambda x: x[..., order], head)


@dataclasses.dataclass(frozen=True)
class ClassifyTask(Task):
  config: Any
  model: Classifier
  title = 'a classifier'
  headline = ('acc1',)

  def init(self, key):
    variables = from_config.init(self.model, self.config, key)
    return variables | ({'ema': variables['params']} if self.config.ema_decay else {})

  def adopt(self, theirs, variables, fresh):
    config = self.config
    check_sizes(theirs, config)
    params = adopt_backbone(theirs, variables, config_lib.patch_grid(config))
    if theirs.task == 'classifier' and theirs.model.classes != config.model.classes:
      if not config.fresh_head:
        raise UserError(
          f'init_from={config.init_from} knows {theirs.model.classes} classes, {config.data.source} has {config.model.classes}. '
          '--config.fresh_head=True keeps its backbone and starts a new head.'
        )
      params = {k: v for k, v in params.items() if k != 'head'}
    if theirs.task == 'classifier' and not config.fresh_head:
      params = params | {'head': head_in_order(params['head'], tuple(theirs.get('class_names') or ()), config)}
    # fc_norm and the head start fresh after pretraining, as in the official code.
    params = fresh_where_missing(
      params, fresh['params'], ('fc_norm', 'norm', 'head') if theirs.task != 'classifier' or config.fresh_head else ()
    )
    return {'params': params} | ({'ema': params} if config.ema_decay else {})

  @staticmethod
  def transforms(config, train, source):
    steps = image_transforms(config.data, train, 0.0 if config.rand_augment else config.color_jitter)
    return [*steps, RandAugment(config.rand_augment)] if train and config.rand_augment else steps

  def look_at(self, sources):
    config = self.config
    if not sources['eval'].classes:
      raise UserError(
        f'{config.data.source} has labels for training and none for evaluation: give both, or point at the training part alone.'
      )
    names = [str(name) for name in config.class_names]
    shown = ', '.join(names[:8]) + (f' ... {names[-1]}' if len(names) > 8 else '')
    return [*super().look_at(sources), f'{len(names)} classes: {shown}']

  def _logits(self, params, images, **kwargs):
    return self.model.apply({'params': params}, images, **kwargs).astype(jnp.float32)

  def loss(self, params, model_state, frozen, batch, key):
    config = self.config
    erase, mix, drop = jax.random.split(key, 3)
    images = network_images(batch['image'], self.config)
    images = augment.random_erasing(erase, images, config.random_erasing)
    targets = augment.smooth_targets(batch['label'], config.model.classes, config.label_smoothing)
    images, targets = augment.mix(mix, images, targets, config.mixup, config.cutmix)
    logits = self._logits(params, images, train=True, rngs={'drop_path': drop})
    acc = 100.0 * (logits.argmax(-1) == targets.argmax(-1)).mean()
    return optax.softmax_cross_entropy(logits, targets).mean(), ({}, dict(acc1=acc))

  def update(self, model_state, stats, key, params):
    if not self.config.ema_decay:
      return model_state, {}
    d = self.config.ema_decay
    return {'ema': jax.tree.map(lambda e, p: d * e + (1 - d) * p, model_state['ema'], params)}, {}

  def evaluate(self, params, model_state, frozen, batch):
    images = network_images(batch['image'], self.config)
    out = self._scores(params, images, batch['label'])
    if self.config.ema_decay:
      out |= {f'ema_{k}': v for k, v in self._scores(model_state['ema'], images, batch['label']).items()}
    return out

  def samples(self, params, model_state, frozen, batch):
    logits = self._logits(params, network_images(batch['image'], self.config))
    return dict(image=batch['image'], label=batch['label'], predicted=logits.argmax(-1))

  def _scores(self, params, images, labels):
    logits = self._logits(params, images)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return dict(acc1=100.0 * best[:, 0], acc5=100.0 * best.any(1), loss=loss)
