"""The names of a model's classes, and which of them a data set has."""

from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError


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
  names: list[str] = list(config.get('class_names') or ())
  if names:
    return names
  return imagenet_classes() if config.model.classes == 1000 else [str(i) for i in range(config.model.classes)]
