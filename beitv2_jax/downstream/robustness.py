"""A trained classifier on other test sets than its own.

A set with images of some of the model's classes is judged among those alone, as the official code does for ImageNet-A and -R: the
head's rows are selected, in the model's order. ReaL counts a prediction as right if it is among an image's labels, and leaves out
images that have none.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, sources, transforms
from beitv2_jax.downstream.classes import class_subset, model_classes
from beitv2_jax.downstream.probes import standard_error
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar


def all_logits(model: Any, source: Any, crop_pct: float, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(logits [n, classes], labels [n], places in the source [n]) of every image that decodes, once."""
  size = model.config.data.image_size
  rows = pipeline.eval_batches(
    source,
    [transforms.CenterCrop(size if isinstance(size, int) else tuple(size), crop_pct)],
    seed=0,
    batch=batch,
    reading=config_lib.reading(model.config),
  )
  logits, labels, valid = [], [], []
  for part in bar(rows, 'batches', -(-len(source) // batch)):
    logits.append(np.asarray(model.logits(part['image']))[part['valid']])
    labels.append(part['label'][part['valid']])
    valid.append(part['valid'])
  return np.concatenate(logits), np.concatenate(labels), np.flatnonzero(np.concatenate(valid))


def accuracy(logits: np.ndarray, labels: np.ndarray, subset: np.ndarray) -> dict[str, float]:
  """% top-1 and top-5 among the classes of `subset`; labels count in it."""
  best = np.argsort(-logits[:, subset], 1, kind='stable')[:, :5] == labels[:, None]
  acc1 = 100 * float(best[:, 0].mean())
  error = standard_error(acc1, len(labels))
  return dict(acc1=acc1, acc1_error=error, acc5=100 * float(best.any(1).mean()), images=len(labels), classes=len(subset))


def real_accuracy(logits: np.ndarray, allowed: list[list[int]]) -> dict[str, float]:
  """% of the images with any label whose best class is one of them."""
  judged = [int(row.argmax()) in labels for row, labels in zip(logits, allowed, strict=True) if labels]
  return dict(acc1=100 * float(np.mean(judged)), images=len(judged))


def validation_number(source: Any, i: int) -> int:
  """The number in ILSVRC2012_val_00000042.JPEG, from 1."""
  name = source.file_name(i) if hasattr(source, 'file_name') else os.path.basename(source.name(i))
  found = re.search(r'ILSVRC2012_val_(\d{8})', name)
  if not found:
    raise UserError(f'ReaL needs the names of the validation images, such as ILSVRC2012_val_00000042.JPEG; this one is {name}.')
  return int(found[1])


def _real_labels(path: str) -> list[list[int]]:
  try:
    return json.loads(Path(path).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'--real {path} does not read ({e}): it is real.json of google-research/reassessed-imagenet.') from e


def run(
  model: Any, sets: dict[str, str], real: str = '', data_dir: str = '', crop_pct: float = 0.875, batch: int = 64
) -> dict[str, dict[str, Any]]:
  """{set: figures} of `sets`, {name: labelled source}. `real` is a file of ReaL's labels, judged on the set named imagenet."""
  if model.kind != 'classifier':
    raise UserError(f'this is a {model.kind} model, not a classifier.')
  sets = {name: source for name, source in sets.items() if source}
  if not sets or (real and 'imagenet' not in sets):
    raise UserError('name at least one set, such as --data a=folder:PATH; ReaL needs one named imagenet.')
  opened = {name: sources.make(source, 'eval', data_dir, holdout=1.0) for name, source in sets.items()}
  for name, source in opened.items():
    if not source.classes:
      raise UserError(f'{sets[name]} has no labels.')
  subsets = {name: class_subset(s.classes, model_classes(model.config)) for name, s in opened.items()}
  allowed = _real_labels(real) if real else None
  out = {}
  for name, source in opened.items():
    logits, labels, places = all_logits(model, source, crop_pct, batch)
    there = np.unique(labels)  # a set may name all of ImageNet's classes and have images of 200 (ImageNet-A and -R in TFDS)
    out[name] = accuracy(logits, np.searchsorted(there, labels), subsets[name][there])
    if name == 'imagenet' and allowed:
      out['real'] = real_accuracy(logits, [allowed[validation_number(source, int(i)) - 1] for i in places])
  return out
