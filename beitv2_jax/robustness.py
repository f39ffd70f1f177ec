"""A trained classifier on other test sets: python -m beitv2_jax.robustness --config=configs/robustness.py --from=DIR --config.sets.a=folder:PATH ...

A set whose folders are some of the model's classes is judged among those alone, as the official code does for ImageNet-A and -R: the
head's rows are selected, in the model's order. ReaL counts a prediction as right if it is among an image's labels, and leaves out
images that have none.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from beitv2_jax.errors import UserError
from beitv2_jax.main import entry, given_config, use_compilation_cache


def imagenet_classes() -> list[str]:
  """The WordNet ids of ImageNet-1k in the order of its labels (tensorflow-datasets carries the list)."""
  import tensorflow_datasets as tfds

  return (Path(tfds.__file__).parent / 'datasets' / 'imagenet2012' / 'labels.txt').read_text().split()


def class_subset(classes: list[str], model_classes: list[str]) -> np.ndarray:
  """Where each class of a data set stands among the model's. Names, or numbers as ImageNet-V2's folders have them.

  Raises UserError for classes that the model doesn't know.
  """
  place = {name: i for i, name in enumerate(model_classes)}
  if all(c in place for c in classes):
    return np.array([place[c] for c in classes])
  if all(c.isdigit() and int(c) < len(model_classes) for c in classes):
    return np.array([int(c) for c in classes])
  strange = [c for c in classes if c not in place]
  raise UserError(
    f'the model does not know {len(strange)} of the {len(classes)} classes, such as {strange[:3]}; it knows {model_classes[:3]} ...'
  )


def model_classes(config: Any) -> list[str]:
  """The class names that a model was trained with; ImageNet-1k's for an imported one of 1,000 classes, or else numbers."""
  names = list(config.get('class_names') or ())
  if names:
    return names
  return imagenet_classes() if config.model.classes == 1000 else [str(i) for i in range(config.model.classes)]


def all_logits(model: Any, source: Any, crop_pct: float, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(logits [n, classes], labels [n]) over a source, every image once."""
  from beitv2_jax.data import pipeline, transforms

  size = model.config.data.image_size
  rows = pipeline.eval_batches(
    source, [transforms.CenterCrop(size if isinstance(size, int) else tuple(size), crop_pct)], seed=0, batch=batch
  )
  logits, labels = [], []
  for part in tqdm(rows, total=-(-len(source) // batch), unit=' batches', leave=False):
    logits.append(np.asarray(model.logits(part['image']))[part['valid']])
    labels.append(part['label'][part['valid']])
  return np.concatenate(logits), np.concatenate(labels)


def accuracy(logits: np.ndarray, labels: np.ndarray, subset: np.ndarray) -> dict[str, float]:
  """% top-1 and top-5 among the classes of `subset`; labels count in it."""
  best = np.argsort(-logits[:, subset], 1, kind='stable')[:, :5] == labels[:, None]
  return dict(acc1=100 * float(best[:, 0].mean()), acc5=100 * float(best.any(1).mean()), images=len(labels), classes=len(subset))


def real_accuracy(logits: np.ndarray, allowed: list[list[int]]) -> dict[str, float]:
  """% of the images with any label whose best class is one of them."""
  judged = [int(row.argmax()) in labels for row, labels in zip(logits, allowed) if labels]
  return dict(acc1=100 * float(np.mean(judged)), images=len(judged))


def validation_number(source: Any, i: int) -> int:
  """The number in ILSVRC2012_val_00000042.JPEG, from 1."""
  name = source.file_name(i) if hasattr(source, 'file_name') else os.path.basename(source.name(i))
  found = re.search(r'ILSVRC2012_val_(\d{8})', name)
  if not found:
    raise UserError(f'ReaL needs the names of the validation images, such as ILSVRC2012_val_00000042.JPEG; this one is {name}.')
  return int(found[1])


def run(model: Any, c: Any) -> dict[str, dict]:
  """{set: figures} of the sets that the config names."""
  from beitv2_jax.data import sources

  if model.kind != 'classifier':
    raise UserError(f'this is a {model.kind} model, not a classifier.')
  named = {k: v for k, v in c.sets.items() if v}
  if not named or (c.real and not c.sets.imagenet):
    raise UserError('name at least one set, such as --config.sets.a=folder:PATH; ReaL needs sets.imagenet.')
  opened = {k: sources.make(v, 'eval', c.data_dir, holdout=1.0) for k, v in named.items()}
  for key, source in opened.items():
    if not source.classes:
      raise UserError(f'{named[key]} has no labels.')
  subsets = {k: class_subset(s.classes, model_classes(model.config)) for k, s in opened.items()}
  real = json.loads(Path(c.real).read_text()) if c.real else None
  out = {}
  for key, source in opened.items():
    logits, labels = all_logits(model, source, c.crop_pct, c.batch_size)
    out[key] = accuracy(logits, labels, subsets[key])
    if key == 'imagenet' and real:
      out['real'] = real_accuracy(logits, [real[validation_number(source, i) - 1] for i in range(len(source))])
  return out


def main(_) -> None:
  from beitv2_jax import api

  given = flags.FLAGS
  if not given['from'].value:
    raise UserError('give --from=DIR: the workdir of a classifier, or an imported one.')
  use_compilation_cache()
  out = run(api.load(given['from'].value), given_config())
  print('set        images  classes   top-1   top-5')
  for name, r in out.items():
    print(f'{name:10s}{r["images"]:7,d}{r.get("classes", ""):>9}{r["acc1"]:8.2f}' + (f'{r["acc5"]:8.2f}' if 'acc5' in r else ''))
  if given.json:
    Path(given.json).write_text(json.dumps(out, indent=2))


if __name__ == '__main__':
  flags.DEFINE_string('from', None, 'Workdir of a classifier, or an imported one.')
  flags.DEFINE_string('json', None, 'Also write the figures there.')
  sys.exit(entry(main))
