"""What a stage trains.

`make(config)` returns a task and its frozen weights: those the stage uses but does not train (teacher, tokenizer). They are
an argument of the jitted step, never part of its checkpoint.
"""

from typing import Any

from beitv2_jax.data import taught
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import classify, clip, pixels, pretrain, regress, segment, tokenizer
from beitv2_jax.tasks.base import Task


def sources_of(config: Any, opened: dict[str, Any]) -> dict[str, Any]:
  """The sources that a task sees: those opened, with a teacher's features from disk where the config says so. Raises UserError."""
  if config.task == 'tokenizer' and config.teacher.kind == 'disk':
    return {split: taught.Taught(source, config.teacher.name, split) for split, source in opened.items()}
  return opened


def host_transforms(config: Any, source: Any) -> Any:
  """What training does to a record on the host, without opening the weights that a task uses."""
  classes: dict[str, type[Task]] = {
    'clip': clip.ClipTask,
    'tokenizer': tokenizer.TokenizerTask,
    'pretrain': pretrain.PretrainTask,
    'classifier': classify.ClassifyTask,
    'segmenter': segment.SegmentTask,
    'pixels': pixels.PixelsTask,
  }
  return classes[config.task].transforms(config, True, source)


def make(config: Any, abstract: bool = False, source: Any = None) -> tuple[Task, Any]:
  """(task, frozen weights as numpy arrays). Reads what earlier stages left; raises UserError when it is not there.

  `source` is the training data, whose classes some tasks need. With `abstract` nothing is read: the frozen weights are shapes, of
  the released teacher and tokenizer.
  """
  makers = {
    'clip': clip.make,
    'tokenizer': tokenizer.make,
    'pretrain': lambda config, abstract, source: (
      pretrain.make(config, abstract, source) if config.get('target', 'codes') == 'codes' else regress.make(config, abstract)
    ),
    'classifier': classify.make,
    'segmenter': segment.make,
    'pixels': pixels.make,
  }
  if config.task not in makers:
    raise UserError(f'no task {config.task!r}; use one of {", ".join(makers)}.')
  return makers[config.task](config, abstract, source)
