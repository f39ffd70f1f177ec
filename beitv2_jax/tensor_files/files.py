"""{name: array} out of checkpoint files: .pth, .safetensors, and the directories that transformers writes."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.tensor_files import pickles

SAFETENSORS = dict(
  F64=np.float64, F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16, F8_E4M3=ml_dtypes.float8_e4m3fn, F8_E5M2=ml_dtypes.float8_e5m2,
  I64=np.int64, I32=np.int32, I16=np.int16, I8=np.int8, U64=np.uint64, U32=np.uint32, U16=np.uint16, U8=np.uint8, BOOL=np.bool_,
)  # fmt: skip
WHOLE = ('model.safetensors', 'pytorch_model.bin')  # files of a model in one piece, as transformers names them


def read_state(path: str | Path) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint. Raises UserError for what is none.

  Args:
    path: a .safetensors file; a .pth or .bin of PyTorch, whose state dict is at its root or under model, module or state_dict; or a
      directory as transformers writes it, in one file or several.
  """
  path = Path(path).expanduser()
  parts = _parts(path) if path.is_dir() else [path]
  state: dict[str, np.ndarray] = {}
  for part in parts:
    if not part.is_file():
      raise UserError(f'no file {part}.')
    state |= _read_safetensors(part) if part.suffix.lower() == '.safetensors' else _read_pth(part)
  return state


def _parts(folder: Path) -> list[Path]:
  found = next((folder / name for name in WHOLE if (folder / name).is_file()), None)
  if found:
    return [found]
  index = next((folder / f'{name}.index.json' for name in WHOLE if (folder / f'{name}.index.json').is_file()), None)
  if not index:
    raise UserError(f'no {" or ".join(WHOLE)} in {folder}, nor an index of several.')
  try:
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    return [folder / Path(name).name for name in names]
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{index} is damaged ({type(e).__name__}).') from e


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  from safetensors import SafetensorError, deserialize

  try:
    entries: Any = deserialize(path.read_bytes())
  except SafetensorError as e:
    raise UserError(f'{path} is not a whole safetensors file: {e}. Download it again.') from e
  strange = next((f'{name} is {entry["dtype"]}' for name, entry in entries if entry['dtype'] not in SAFETENSORS), None)
  if strange:
    raise UserError(f'{path}: {strange}, which is not read here; save it as float32.')
  return {name: np.frombuffer(entry['data'], SAFETENSORS[entry['dtype']]).reshape(entry['shape']) for name, entry in entries}


def _read_pth(path: Path) -> dict[str, np.ndarray]:
  state = pickles.read(path)
  if not isinstance(state, dict):
    raise UserError(f'{path} holds a {type(state).__name__} where a dict of tensors was expected.')
  state = next((state[k] for k in ('model', 'module', 'state_dict') if isinstance(state.get(k), dict)), state)
  arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
  strange = next((name for name in arrays if not isinstance(name, str)), None)
  if strange is not None:
    raise UserError(f'{path} has an array called {strange!r}; the names in a state dict are text.')
  arrays = {name.removeprefix('module.'): value for name, value in arrays.items()}  # data-parallel wrappers add that
  if not arrays:
    raise UserError(f'{path} holds no tensors under model, module, state_dict or its root.')
  total = sum(value.nbytes for value in arrays.values())
  if total > 4 * path.stat().st_size + 2**26:
    raise UserError(
      f'{path} has {path.stat().st_size:,} bytes and tensors of {total:,}: they share their data, as in no model of this family.'
    )
  return arrays
