"""The notebooks run from top to bottom, with few steps and without a network; git has them without outputs, beside the same as text."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity  # with that environment come the tools for notebooks

FOLDER = Path(__file__).parents[1] / 'notebooks'
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def read(name, ending='ipynb'):
  import jupytext

  return jupytext.read(FOLDER / f'{name}.{ending}')


def test_there_are_five():
  assert NAMES == ['explore_codebook', 'official_weights', 'quickstart', 'tpu', 'your_own_images']


@pytest.mark.parametrize('name', NAMES)
def test_git_has_no_outputs_and_the_same_as_text(name):
  notebook, text = read(name), read(name, 'py')
  cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
  assert cells(notebook) == cells(text), 'make notebooks brings both together'
  for cell in notebook.cells:
    assert not cell.get('outputs') and cell.get('execution_count') is None
    assert len(cell.source.splitlines()) <= 30, f'a long cell: {cell.source[:60]}'


@pytest.mark.parametrize('name', NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
  from nbclient import NotebookClient

  monkeypatch.setenv('BEITV2_JAX_QUICK', '1')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get('PYTHONPATH')))))
  monkeypatch.delenv('XLA_FLAGS', raising=False)  # those of a user
  notebook = read(name)
  NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
  kinds = {output.output_type for cell in notebook.cells for output in cell.get('outputs', ())}
  assert 'error' not in kinds and 'stream' in kinds
  pictures = [o for cell in notebook.cells for o in cell.get('outputs', ()) if 'image/png' in o.get('data', {})]
  assert bool(pictures) == (name in ('explore_codebook', 'quickstart', 'your_own_images'))
