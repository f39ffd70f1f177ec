"""The tables of a study: which rows each has, and in what a row differs from the recipe.

A row is a tokenizer and a student trained on its codes, each with changes to the recipe of the study's size; what is not named is the same in
all rows. `tokenizer=None` has no tokenizer (the student predicts something else), `student=None` no pretraining (fresh weights).
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
  name: str
  tokenizer: dict[str, Any] | None = dataclasses.field(default_factory=dict)
  student: dict[str, Any] | None = dataclasses.field(default_factory=dict)
  teacher: str = 'trained'  # or 'random', one whose weights are as they were drawn


@dataclasses.dataclass(frozen=True)
class Table:
  question: str
  rows: tuple[Row, ...]


PAPER = Row('codes of the paper’s quantizer')
CONTROLS = (Row('the same from a random teacher', teacher='random'), Row('no pretraining', None, None))


def codes(count: int, dim: int, depth: int) -> Row:
  return Row(f'{count} codes of {dim}, decoder of {depth}', {'model.codes': count, 'model.code_dim': dim, 'model.decoder.depth': depth})


NO_REVIVAL = {'codebook.revive': 0.0}
TABLES: dict[str, Table] = {
  'quantizers': Table(
    'Does another quantizer use its codes better, and does that help what comes after?',
    (
      Row('EMA, dead codes revived'),
      Row('EMA, as the paper', NO_REVIVAL),
      Row('EMA with the rotation trick', NO_REVIVAL | {'model.gradient': 'rotation'}),
      Row('SimVQ', NO_REVIVAL | {'model.quantizer': 'simvq'}),
      Row('FSQ, 4 x 4 x 4', NO_REVIVAL | {'model.quantizer': 'fsq', 'model.levels': (4, 4, 4), 'model.codes': 64, 'model.code_dim': 3}),
      *CONTROLS,
    ),
  ),
  'targets': Table(
    'Are codes a better target than the teacher’s own features, or than pixels?',
    (
      PAPER,
      Row('codes, without patch aggregation', {}, {'model.head_layers': 0}),
      Row('features of the teacher', None, {'target': 'features'}),
      Row('normalised pixels', None, {'target': 'pixels'}),
      *CONTROLS,
    ),
  ),
  'masking': Table(
    'Blocks or single patches, and how many?',
    (
      PAPER,
      Row('single patches, as many', {}, {'mask.kind': 'random'}),
      Row('blocks, half as many', {}, {'mask.count': 0.5}),
      Row('blocks, 1.5 times as many', {}, {'mask.count': 1.5}),
      *CONTROLS,
    ),
  ),
  'aggregation': Table(
    'Does patch aggregation help, and from which block?',
    (
      PAPER,
      Row('none', {}, {'model.head_layers': 0}),
      Row('from a block earlier', {}, {'model.early_layer': -1}),
      Row('one aggregation block', {}, {'model.head_layers': 1}),
      Row('a head of its own', {}, {'model.shared_head': False}),
      *CONTROLS,
    ),
  ),
  'data': Table(
    'With how many images does pretraining pay? (Probes are fitted on all of them in each row.)',
    (
      *(Row(f'{count} images', {'data.limit': count}, {'data.limit': count}) for count in (100, 300, 1000)),
      Row('all images'),
      *CONTROLS,
    ),
  ),
  'codebook': Table(
    'How many codes, of how many dimensions, and how deep a decoder?',
    (
      codes(64, 16, 1),
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
