"""What comes out of a study: `OUT/TABLE/table.json`, `table.md` and `table.html`."""

import json
from pathlib import Path

import numpy as np

from beitv2_jax.reports.page import Page
from beitv2_jax.studies.plan import Study, fingerprint

# What is reported of a row: (key, title, digits).
FIGURES = (
  ('codes_used', 'codes used %', 1),
  ('perplexity', 'perplexity', 1),
  ('rec_loss', '1 - cosine to the teacher', 3),
  ('finetune', 'fine-tuning %', 1),
  ('probe', 'linear probe %', 1),
  ('probe5', '5 labels a class %', 1),
  ('knn', 'k-NN %', 1),
  ('miou', 'mIoU %', 1),
)


def gathered(study: Study) -> dict[str, dict[str, list[float]]]:
  """{row: {figure: its values, one a seed}}, of what is done."""
  out: dict[str, dict[str, list[float]]] = {row.name: {} for row in study.rows}
  for row, _, folder in study.cells():
    if (folder / 'scores.json').is_file():
      for key, value in json.loads((folder / 'scores.json').read_text())['scores'].items():
        out[row.name].setdefault(key, []).append(value)
  return out


def cell_text(values: list[float], digits: int) -> str:
  if not values:
    return ''
  spread = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
  return f'{np.mean(values):.{digits}f}{spread}'


def table_rows(study: Study) -> tuple[list[str], list[list[str]]]:
  values = gathered(study)
  keys = [figure for figure in FIGURES if any(figure[0] in row for row in values.values())]
  rows = [[name, *(cell_text(row.get(key, []), digits) for key, _, digits in keys)] for name, row in values.items()]
  return ['', *(title for _, title, _ in keys)], rows


def markdown(study: Study) -> str:
  header, rows = table_rows(study)
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return '\n'.join([line(header), line(['---'] * len(header)), *map(line, rows)]) + '\n'


def write(study: Study, folder: Path) -> None:
  """The three files, of what is done."""
  values = gathered(study)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.json').write_text(
    json.dumps(dict(question=study.table.question, seeds=study.seeds, code=fingerprint(study.recipe), rows=values), indent=2) + '\n'
  )
  (folder / 'table.md').write_text(markdown(study))
  page = Page(f'Study: {study.name}')
  page.text(study.table.question)
  page.table(*table_rows(study))
  seeds = max((len(v) for row in values.values() for v in row.values()), default=0)
  page.text(f'Mean and standard deviation over {seeds} seed{"s" * (seeds != 1)}.')
  for key, title, _ in FIGURES:
    shown = {name: row[key] for name, row in values.items() if key in row}
    if shown:
      page.intervals(title, shown)
  page.save(folder / 'table.html')
