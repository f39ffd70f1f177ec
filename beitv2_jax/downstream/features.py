"""Frozen features of a whole data set, kept on disk: those of ImageNet-1k from a base model take 47 GB."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, sources, transforms
from beitv2_jax.downstream import probes, trained
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar

FEW = 100  # evaluation images below which a figure is hardly one


def extract(
  model: Any, source: Any, path: Path, view: int | None = None, tokens: bool = False, batch: int = 64
) -> tuple[np.ndarray, np.ndarray]:
  """(features [n, blocks, 2, D], labels [n]) of a labelled source; with `tokens` the last block's, [n, T, D], instead.

  The features are half floats in the file `path`, mapped into memory. Those of the centre crop of every image, or of its random crop
  and flip number `view`. Raises UserError for a source without labels, or where the disk is too small.
  """
  if not source.classes or hasattr(source, 'mask_names'):
    raise UserError('probes need labels: class folders, or a list with labels.')
  size = model.config.data.image_size
  size = size if isinstance(size, int) else tuple(size)
  steps = [transforms.CenterCrop(size, 0.875)] if view is None else [transforms.RandomResizedCrop(size), transforms.Flip()]
  rows = pipeline.eval_batches(source, steps, seed=view or 0, batch=batch, max_bad=0.0, reading=config_lib.reading(model.config))
  labels, shape = [], None
  with path.open('wb') as file:
    for part in bar(rows, 'batches', -(-len(source) // batch), f'features of {len(source):,} images'):
      features = _tokens(model, part['image']) if tokens else np.asarray(model.pooled_layers(part['image']))
      features = features[part['valid']].astype(np.float16)
      if shape is None:
        shape = (len(source), *features.shape[1:])
        _check_disk(path, 2 * int(np.prod(shape)))
      file.write(features.tobytes())
      labels.append(part['label'][part['valid']])
  return np.memmap(path, np.float16, 'r', shape=shape), np.concatenate(labels)


def _tokens(model: Any, images: np.ndarray) -> np.ndarray:
  out = model.features(images)
  return np.concatenate([np.asarray(out['cls'])[:, None], out['patches']], 1)


def _check_disk(path: Path, needed: int) -> None:
  free = shutil.disk_usage(path.parent).free
  if needed > free:
    raise UserError(
      f'the features take {needed / 2**30:,.0f} GiB and {path.parent} has {free / 2**30:,.0f} GiB free; give --out a folder on a larger disk.'
    )


def probe_all(
  model: Any, sources: dict, folder: Path, views: int = 0, epochs: int = 100, shots=(1, 5, 10), attentive: bool = False, batch: int = 64
) -> dict[str, Any]:
  """All probes of a model on sources['train'] and sources['eval'], in % accuracy: `layers` [blocks, 3] and single figures.

  Features are kept in `folder`. `images`, `classes` and `error`, the standard error of the best probe, say how much a figure means.
  """
  train, train_labels = extract(model, sources['train'], folder / 'train.f16', batch=batch)
  test, test_labels = extract(model, sources['eval'], folder / 'eval.f16', batch=batch)
  classes = len(np.unique(train_labels))
  if classes < 2:
    raise UserError(f'the training images have {classes} class: a probe needs at least two to tell apart.')
  crops = [extract(model, sources['train'], folder / f'train_view_{v}.f16', v, batch=batch)[0] for v in range(views)]
  layers = probes.layer_probes(crops or [train], train_labels, test, test_labels, epochs)
  best = float(layers.max())
  out = dict(
    layers=layers,
    probe=best,
    probe_layer=int(layers.max(1).argmax()) + 1,
    knn=probes.knn(train[:, -1, 1], train_labels, test[:, -1, 1], test_labels),
    images=len(test_labels),
    classes=classes,
    error=probes.standard_error(best, len(test_labels)),
  )
  out |= few_labels(train[:, -1, 1], train_labels, test[:, -1, 1], test_labels, shots)
  if attentive:
    tokens = [extract(model, sources[s], folder / f'{s}_tokens.f16', tokens=True, batch=batch)[0] for s in ('train', 'eval')]
    out['attentive'] = probes.attentive_probe(tokens[0], train_labels, tokens[1], test_labels)
  return out


def few_labels(train, train_labels, test, test_labels, shots) -> dict[str, float]:
  """{'shots_5': % accuracy with 5 labels a class, ...} on features [n, D], standardised by all training images."""
  mean, std = probes.moments(train)
  args = (train, train_labels, (np.asarray(test, np.float32) - mean) / std, test_labels)
  return {f'shots_{count}': probes.few_label_probe(*args, labels=count, mean=mean, std=std) for count in shots}


def caution(images: int, classes: int) -> str | None:
  """What to say of figures that rest on few images, if they do."""
  if images >= FEW:
    return None
  return f'only {images} images of {classes} classes were scored: the figures say little; give at least some hundred (--holdout).'


def images_of(config, split: str) -> tuple[np.ndarray, np.ndarray]:
  """All images of a split, resized and centre-cropped: uint8 [n, h, w, 3], labels [n]."""
  source = sources.make(config.data.source, split, config.data.dir, config.data.holdout)
  steps = transforms.image_transforms(config.data, train=False)
  batches = list(pipeline.eval_batches(source, steps, seed=0, batch=64, reading=config_lib.reading(config)))
  valid = np.concatenate([b['valid'] for b in batches])
  return tuple(np.concatenate([b[k] for b in batches])[valid] for k in ('image', 'label'))


def last_block_means(model: Any, images: np.ndarray) -> np.ndarray:
  """Mean of the last block's patch tokens, [n, D]."""
  return trained.in_batches(model.features, images)['patches'].mean(1)
