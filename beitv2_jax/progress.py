"""A bar for long work, on a terminal only: a log is not filled with it."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable, unit: str, total: int | None = None, title: str | None = None) -> Any:
  """`items`, counted on stderr while they are worked through if stderr is a terminal."""
  return tqdm(items, desc=title, total=total, unit=f' {unit}', leave=False, disable=None, dynamic_ncols=True)
