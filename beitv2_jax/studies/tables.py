"""The tables of a study: which rows each has, and in what a row differs from the recipe.

A row is a tokenizer and a student trained on its codes, each with changes to the recipe of the study's size; what is not named is the same in
all rows. Rows of one name are one row, whichever tables they stand in: they are trained once.
"""

import dataclasses
from typing import Any

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Relative:
  """A whole number made from the recipe's own, so that a table fits recipes of every size."""

  factor: float = 1.0
  added: int = 0

  def of(self, value: int) -> int:
    return max(1, round(value * self.factor)) + self.added


def times(factor: float) -> Relative:
  return Relative(factor)


def plus(number: int) -> Relative:
  return Relative(added=number)


@dataclasses.dataclass(frozen=True)
class Row:
  """`tokenizer=None` has no tokenizer (the student predicts something else). `student=None` is fresh weights, ENCODER the tokenizer's own
  encoder. `teacher` is TRAINED (the recipe's), RANDOM (the same with weights as they were drawn), or a row whose model teaches: its pretrained
  one, or its fine-tuned one if it has none."""

  name: str
  tokenizer: Changes | None = dataclasses.field(default_factory=dict)
  student: Changes | str | None = dataclasses.field(default_factory=dict)
  teacher: 'str | Row' = 'trained'


@dataclasses.dataclass(frozen=True)
class Table:
  question: str
  rows: tuple[Row, ...]


TRAINED, RANDOM, ENCODER = 'trained', 'random', 'encoder'
CODES = Row('codes of the recipe’s quantizer')
PIXELS = Row('normalised pixels', None, {'target': 'pixels'})
FRESH = Row('no pretraining', None, None)
CONTROLS = (Row('the same from a random teacher', teacher=RANDOM), FRESH)


def codes(count: int, dim: int, depth: int) -> Row:
  return Row(f'{count} codes of {dim}, decoder of {depth}', {'model.codes': count, 'model.code_dim': dim, 'model.decoder.depth': depth})


def few_images(count: int) -> Row:
  return Row(f'{count:,} images', {'data.limit': count}, {'data.limit': count})


def sizes(name: str, image: float, patch: float) -> Row:
  """Another number of pixels or of patches, with as large a share of them masked."""
  changes = {'data.image_size': times(image), 'model.patch_size': times(patch)}
  masked = {'mask.count': times((image / patch) ** 2), 'mask.min_block': times((image / patch) ** 2)}
  return Row(name, changes, changes | masked)


NO_REVIVAL = {'codebook.revive': 0.0}
TABLES: dict[str, Table] = {
  'quantizers': Table(
    'Does another quantizer use its codes better, and does that help what comes after?',
    (
      CODES,
      Row('EMA, as the paper: dead codes stay', NO_REVIVAL),
      Row('EMA with the rotation trick', NO_REVIVAL | {'model.gradient': 'rotation'}),
      Row('SimVQ', NO_REVIVAL | {'model.quantizer': 'simvq'}),
      Row('FSQ, 4 x 4 x 4', NO_REVIVAL | {'model.quantizer': 'fsq', 'model.levels': (4, 4, 4), 'model.codes': 64, 'model.code_dim': 3}),
      *CONTROLS,
    ),
  ),
  'targets': Table(
    'Are codes a better target than the teacher’s own features, or than pixels?',
    (
      CODES,
      Row('codes, without patch aggregation', {}, {'model.head_layers': 0}),
      Row('features of the teacher', None, {'target': 'features'}),
      PIXELS,
      *CONTROLS,
    ),
  ),
  'teachers': Table(
    'Whose features make good codes, and is the student better than the encoder of its tokenizer?',
    (
      CODES,
      Row('codes from a student of such codes', teacher=CODES),
      Row('codes from a model pretrained on pixels', teacher=PIXELS),
      Row('codes from a classifier', teacher=FRESH),
      Row('the tokenizer’s own encoder', student=ENCODER),
      *CONTROLS,
    ),
  ),
  'masking': Table(
    'Blocks or single patches, and how many?',
    (
      CODES,
      Row('single patches, as many', {}, {'mask.kind': 'random'}),
      Row('blocks, half as many', {}, {'mask.count': times(0.5)}),
      Row('blocks, 1.5 times as many', {}, {'mask.count': times(1.5)}),
      *CONTROLS,
    ),
  ),
  'aggregation': Table(
    'Does patch aggregation help, and from which block?',
    (
      CODES,
      Row('codes, without patch aggregation', {}, {'model.head_layers': 0}),
      Row('aggregation from a block earlier', {}, {'model.early_layer': plus(-1)}),
      Row('one aggregation block', {}, {'model.head_layers': 1}),
      Row('an aggregation head of its own', {}, {'model.shared_head': False}),
      *CONTROLS,
    ),
  ),
  'sizes': Table(
    'Larger images, or smaller patches?',
    (
      CODES,
      sizes('1.5 times as many pixels a side', 1.5, 1.0),
      sizes('patches of half the side', 1.0, 0.5),
      sizes('half as many pixels a side, patches too', 0.5, 0.5),
      *CONTROLS,
    ),
  ),
  'data': Table(
    'With how many images does pretraining pay? (Labels are those of all images in each row.)',
    (few_images(100), few_images(300), few_images(1000), few_images(10_000), CODES, *CONTROLS),
  ),
  'codebook': Table(
    'How many codes, of how many dimensions, and how deep a decoder?',
    (
      CODES,
      codes(16, 16, 1),
      codes(256, 16, 1),
      codes(64, 4, 1),
      codes(64, 32, 1),
      codes(64, 16, 2),
      codes(64, 16, 3),
      *CONTROLS,
    ),
  ),
}
