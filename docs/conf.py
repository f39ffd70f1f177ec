"""The documentation site: make docs."""

import beitv2_jax

project, author = 'beitv2_jax', 'the beitv2_jax authors'
version = release = beitv2_jax.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['deflist']
myst_heading_anchors = 3
html_theme = 'sphinx_book_theme'
html_title = f'beitv2_jax {version}'
html_copy_source = False
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
default_role = 'code'
smartquotes = False  # --config is two hyphens


def tables_as_they_are(app, what, name, obj, options, lines):
  """Tables in docstrings are drawn with bars, as in Markdown."""
  out, inside = [], False
  for line in lines:
    bar = line.lstrip().startswith('|')
    if bar and not inside:
      out += ['', '::', '']
    elif inside and not bar:
      out.append('')
    out.append(f'  {line}' if bar else line)
    inside = bar
  lines[:] = [*out, '']


def setup(app):
  app.connect('autodoc-process-docstring', tables_as_they_are)
