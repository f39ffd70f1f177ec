"""Data as scripts: a browser does not let a page from disk read other files, but it runs scripts, so each calls explorer.load(name, value)."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, name: str, value: Any) -> None:
  """`value` as a script that hands it to the page under `name`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(value, separators=(',', ':'), ensure_ascii=False, allow_nan=False).replace('</', '<\\/')
  temporary = path.with_suffix('.tmp')
  temporary.write_text(f'explorer.load({json.dumps(name)},{text})\n', encoding='utf-8', errors='replace')  # file names may be no text
  temporary.replace(path)


def read(path: Path) -> Any:
  """What `write` wrote."""
  text = path.read_text(encoding='utf-8')
  return json.loads(text[text.index(',') + 1 : text.rindex(')')])


def packed(array: np.ndarray) -> str:
  """Base64 of an array's bytes, little endian, row by row."""
  return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def rounded(values: np.ndarray, digits: int = 3) -> list:
  return np.round(np.asarray(values, np.float64), digits).tolist()


def unpacked(text: str, dtype: str) -> np.ndarray:
  """The numbers of `packed`, in one row."""
  return np.frombuffer(base64.b64decode(text), dtype)
