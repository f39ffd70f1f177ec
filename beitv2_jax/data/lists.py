"""Lists of images in a text file, a CSV file, or lines of JSON."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np

from beitv2_jax.data.folders import Files
from beitv2_jax.data.listing import EXTENSIONS, held_out
from beitv2_jax.errors import UserError

LOOKED_FOR = 64  # files of a list that are looked for before anything starts


class ListFile(Files):
  """Lines of `path`, of `path label` (a number or a name), or of JSON {"class": name, "files": [paths]} (ImageNet-21k's index).

  Also a .csv of path and label, with or without a line of titles. Paths are relative to the list's folder, or to data.dir where that is
  given. Labels that are all numbers from 0 on are class numbers; others are names. FILE,FILE names a list for training and one for
  evaluation.
  """

  def __init__(self, where: str, split: str, data_dir: str = '', holdout: float = 0.1, **_):
    lists = [Path(p.strip()).expanduser() for p in where.split(',')]
    for path in lists:
      if not path.is_file():
        raise UserError(f'no list {path.absolute()}: data.source=list:FILE needs a text file with one image a line.')
    parsed = [_read(p) for p in lists[:2]]
    classes, number = _classes([(path, lines) for path, lines in zip(lists, parsed)])
    own = len(lists) > 1
    path, lines = (lists[split == 'eval'], parsed[split == 'eval']) if own else (lists[0], parsed[0])
    if not lines:
      raise UserError(f'{path} names no images.')
    names, labels = [name for name, _, _ in lines], [label for _, label, _ in lines]
    if any(x is None for x in labels) and any(x is not None for x in labels):
      raise UserError(f'{path}: some lines have a label and some have none.')
    root = Path(data_dir).expanduser() if data_dir else path.parent
    _look_for(path, root, names)
    numbers = None if labels[0] is None else [number[str(x)] for x in labels]
    super().__init__(root, names, numbers, classes or None, None if own else held_out(len(names), split, holdout))


def _classes(lists: list[tuple[Path, list]]) -> tuple[list[str], dict[str, int]]:
  """(names of the classes, label → number) of all lists together."""
  lines = [(path, label, number) for path, entries in lists for _, label, number in entries if label is not None]
  labels = {label for _, label, _ in lines}
  is_number = lambda label: label.isdigit() and str(int(label)) == label
  if labels and any(map(is_number, labels)):
    for path, label, line in lines:  # where some are class numbers, -1 or 0.0 is an error and no further name
      if not is_number(label):
        raise UserError(f'{path}, line {line}: the label {label!r} stands among class numbers, which count from 0 and are whole.')
      if int(label) > 10**6:
        raise UserError(f'{path}, line {line}: a label of {label} is no class number; labels count from 0.')
    count = max(map(int, labels)) + 1
    return [str(i) for i in range(count)], {str(i): i for i in range(count)}
  for path, label, line in lines:
    if re.fullmatch(r'[-+]\d+', label):
      raise UserError(f'{path}, line {line}: the label {label} is no class number; they count from 0.')
  names = sorted(labels)
  return names, {name: i for i, name in enumerate(names)}


def _look_for(path: Path, root: Path, names: list[str]) -> None:
  sample = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, LOOKED_FOR).astype(int))]
  missing = [name for name in sample if not (root / name).is_file()]
  if missing:
    raise UserError(
      f'{path} names {missing[0]}, but there is no {root / missing[0]} ({len(missing)} of {len(sample)} looked for are missing); --config.data.dir=DIR says '
      'where its paths begin.'
    )


def _read(path: Path) -> list[tuple[str, str | None, int]]:
  """(name, label or None, line number) of every image."""
  try:
    text = path.read_text('utf-8-sig')
  except UnicodeDecodeError as e:
    raise UserError(f'{path} is not UTF-8: save it in that encoding.') from e
  if path.suffix.lower() == '.csv':
    return _read_csv(path, text)
  entries = []
  for number, line in enumerate(text.splitlines(), 1):
    line = line.strip()
    if line.startswith('{'):
      try:
        entry = json.loads(line)
        entries += [(str(file), str(entry['class']), number) for file in entry['files']]
      except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path}, line {number}: expected {{"class": ..., "files": [...]}}.') from e
    elif quoted := re.fullmatch(r'"([^"]+)"\s*(.*)', line):
      entries.append((quoted[1], quoted[2] or None, number))
    elif line:
      if not entries and _is_image(line.split(',')[0]) and ',' in line and not _is_image(line):
        raise UserError(f'{path}, line {number}: {line[:80]!r} looks like CSV; give the file that ending.')
      head, _, tail = line.rpartition('\t') if '\t' in line else line.rpartition(' ')
      labelled = head and not _is_image(tail)  # file names may hold blanks
      entries.append((head.strip(), tail, number) if labelled else (line, None, number))
  return entries


def _read_csv(path: Path, text: str) -> list[tuple[str, str | None, int]]:
  entries = []
  for number, row in enumerate(csv.reader(text.splitlines(), skipinitialspace=True), 1):
    if not row or (number == 1 and not _is_image(row[0])):  # a line of titles
      continue
    if len(row) > 2:
      raise UserError(f'{path}, line {number}: {len(row)} columns; expected a path and a label.')
    entries.append((row[0].strip(), row[1].strip() if len(row) == 2 else None, number))
  return entries


def _is_image(name: str) -> bool:
  return os.path.splitext(name.strip())[1].lower() in EXTENSIONS
