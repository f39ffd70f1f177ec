"""The documentation: links lead somewhere, commands and settings exist, code compiles, and the site builds without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from beitv2_jax import commands, recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md')] + sorted((ROOT / 'docs').glob('*.md'))
LINK = re.compile(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)')
COMMAND = re.compile(r'python -m beitv2_jax(?:\.main)?\b[^`\n|]*')


def anchors(page):
  """Of a page's headings, as GitHub and MyST make them."""
  titles = re.findall(r'(?m)^#+ (.*)$', page.read_text())
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for link in (a or b for a, b in LINK.findall(page.read_text())):
    if link.startswith(('http:', 'https:', 'mailto:')):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f'{page.name}: {link}'
    assert not anchor or anchor in anchors(target), f'{page.name}: no heading for {link}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles(page):
  for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.S):
    compile(block, page.name, 'exec')


def commands_of(page):
  text = page.read_text().replace('\\\n', ' ')
  for found in COMMAND.findall(text):
    yield shlex.split(found.split(' #')[0].split('<')[0].rstrip(' .,;:)'))


@pytest.mark.parametrize('page', [*PAGES, *sorted((ROOT / 'configs').glob('*_?16.py'))], ids=lambda page: page.name)
def test_commands_exist_and_take_what_they_are_given(page):
  """The command, the recipe with its arguments, and each --config.KEY; each --word is one that the command knows."""
  for words in commands_of(page):
    if words[2] == 'beitv2_jax' and len(words) == 3:
      continue
    training = words[2] == 'beitv2_jax.main' or words[3] == 'train'
    given = [w for w in words[3:] if w.startswith('--config') and '...' not in w]
    if training or words[3] in ('aot', 'bench', 'teach'):
      if not any(w.startswith('--config=') for w in given):
        continue  # spoken of, not given
      if any(part in w for w in given for part in ('NAME', 'FILE', 'KEY')):
        continue
      recipes.from_arguments([w for w in given if not w.endswith(('=', 'LATER'))])
    if not training:
      assert words[3] in commands.COMMANDS or words[3].isupper(), f'{page.name}: {words}'
      if words[3] in commands.COMMANDS:
        known = (ROOT / 'beitv2_jax' / 'commands' / f'{words[3]}.py').read_text() + (ROOT / 'beitv2_jax/commands/arguments.py').read_text()
        for word in words[4:]:
          if word.startswith('--') and not word.startswith('--config'):
            assert f"'{word.partition('=')[0]}'" in known, f'{page.name}: {words[3]} {word}'


def test_every_command_is_in_the_table_of_commands():
  text = (ROOT / 'docs' / 'commands.md').read_text() + (ROOT / 'docs' / 'teachers.md').read_text()
  for name in commands.COMMANDS:
    assert name in ('demo', 'train') or f'beitv2_jax {name}' in text, name


def test_every_page_is_in_the_site():
  index = (ROOT / 'docs' / 'index.md').read_text()
  for page in (ROOT / 'docs').glob('*.md'):
    assert page.stem == 'index' or f'\n{page.stem}\n' in index, page.name


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) < 120


@pytest.mark.parity
def test_the_site_builds_without_a_warning(tmp_path):
  command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', str(ROOT / 'docs'), str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'masked image modelling' in (tmp_path / 'method.html').read_text().lower()
  assert 'A trained model, ready to be asked' in (tmp_path / 'api.html').read_text()  # from a docstring
