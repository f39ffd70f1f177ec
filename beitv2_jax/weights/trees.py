"""Weights handed from one tree to another: strict, with a diff that names both sides."""

from typing import Any

import jax

from beitv2_jax.errors import UserError


def flatten(tree: Any) -> dict[str, Any]:
  """Nested tree → {'a/b/c': leaf}."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: tuple) -> str:
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def unflatten(flat: dict[str, Any]) -> dict:
  tree: dict = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for p in parents:
      node = node.setdefault(p, {})
    node[last] = leaf
  return tree


def check_same(have: Any, want: Any, have_name: str, want_name: str, hint: str = '') -> None:
  """Raises UserError unless both trees have the same paths and shapes; says which differ, at most five a kind."""
  have, want = flatten(have), flatten(want)
  missing = sorted(want.keys() - have.keys())
  extra = sorted(have.keys() - want.keys())
  shapes = [
    f'{k} {tuple(have[k].shape)} against {tuple(want[k].shape)}'
    for k in sorted(have.keys() & want.keys())
    if have[k].shape != want[k].shape
  ]
  parts = [
    f'{title}: {", ".join(names[:5])}{f" and {len(names) - 5} more" if len(names) > 5 else ""}'
    for title, names in (
      (f'only in {want_name}', missing),
      (f'only in {have_name}', extra),
      (f'shapes differ ({have_name} against {want_name})', shapes),
    )
    if names
  ]
  if parts:
    raise UserError(f'{have_name} does not fit {want_name}. {"; ".join(parts)}. {hint}'.strip())
