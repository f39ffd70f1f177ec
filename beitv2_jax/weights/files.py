"""Arrays out of .pth and .safetensors files, and into .safetensors, without torch.

A .pth is a zip with a pickle inside, and a pickle can run code. This reader knows tensors, containers and plain settings;
anything else that a pickle names is refused before it is touched.
"""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beitv2_jax.errors import UserError

_DTYPES = dict(
  FloatStorage=np.float32, DoubleStorage=np.float64, HalfStorage=np.float16, BFloat16Storage=ml_dtypes.bfloat16,
  LongStorage=np.int64, IntStorage=np.int32, ShortStorage=np.int16, CharStorage=np.int8, ByteStorage=np.uint8, BoolStorage=np.bool_,
)  # fmt: skip


class _Settings:
  """Stands for an argparse.Namespace: official checkpoints carry their command line."""

  def __setstate__(self, state):
    pass


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
  if min((*size, *stride, offset), default=0) < 0:
    raise ValueError('a tensor has a negative size')
  last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else 0
  if last >= max(storage.size, 1):
    raise ValueError('a tensor reaches past the end of its data')
  if 0 in [s for n, s in zip(size, stride) if n > 1]:
    raise ValueError('a tensor repeats its data')
  part = storage[offset:]
  return np.lib.stride_tricks.as_strided(part, size, [s * part.itemsize for s in stride], writeable=False).copy()


def _parameter(data, *_):
  return data


class _Unpickler(pickle.Unpickler):
  """Only what a state dict needs."""

  def __init__(self, file, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self.archive, self.root = archive, root

  def find_class(self, module: str, name: str) -> Any:
    known = {
      ('collections', 'OrderedDict'): collections.OrderedDict,
      ('torch._utils', '_rebuild_tensor_v2'): _tensor,
      ('torch._utils', '_rebuild_parameter'): _parameter,
      ('torch', 'Size'): tuple,
      ('argparse', 'Namespace'): _Settings,
    }
    if (module, name) in known:
      return known[module, name]
    if module == 'torch' and name in _DTYPES:
      return name
    raise UserError(
      f'refused: opening the file would run {module}.{name}, which this reader does not. If you trust where it comes from, open it with torch and save its '
      'state dict alone (torch.save or safetensors).'
    )

  def persistent_load(self, pid: tuple) -> np.ndarray:
    _, kind, key, _, count = pid
    data = self.archive.read(f'{self.root}data/{key}')
    return np.frombuffer(data, _DTYPES[kind], count)


def read_pth(path: Path) -> Any:
  """The object a .pth holds, tensors as numpy arrays. Raises UserError for broken files and for pickles with code."""
  try:
    with zipfile.ZipFile(path) as archive:
      name = next((n for n in archive.namelist() if n.endswith('data.pkl')), None)
      if name is None:
        raise UserError(f'{path} is a zip without data.pkl: not a PyTorch checkpoint.')
      return _Unpickler(io.BytesIO(archive.read(name)), archive, name.removesuffix('data.pkl')).load()
  except UserError:
    raise
  except zipfile.BadZipFile as e:
    raise UserError(
      f'{path} is cut off, or not a PyTorch checkpoint of version 1.6 or newer ({path.stat().st_size:,} bytes). Download it again; a file in the older '
      'format has to be saved anew with torch, and a safetensors file needs that ending.'
    ) from e
  except Exception as e:  # a damaged pickle can fail in any way
    raise UserError(f'{path} is damaged: {type(e).__name__}: {e}. Download it again.') from e


def read_state(path: str | Path) -> dict[str, np.ndarray]:
  """{key: array} of a checkpoint: a .safetensors file, or the state dict inside a .pth (under model, module, state_dict or at the root)."""
  path = Path(path).expanduser()
  if path.is_dir() and (path / 'model.safetensors').is_file():
    path = path / 'model.safetensors'  # a directory as transformers writes it
  if not path.is_file():
    raise UserError(f'no file {path}.')
  if path.suffix.lower() == '.safetensors':
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
      return safetensors.load_file(path)
    except SafetensorError as e:
      raise UserError(f'{path} is not a whole safetensors file: {e}. Download it again.') from e
  state = read_pth(path)
  if not isinstance(state, dict):
    raise UserError(f'{path} holds a {type(state).__name__} where a dict of tensors was expected.')
  else:
    state = next((state[k] for k in ('model', 'module', 'state_dict') if isinstance(state.get(k), dict)), state)
    state = {k.removeprefix('module.'): v for k, v in state.items() if isinstance(v, np.ndarray)}  # data-parallel wrappers add that
  if not state:
    raise UserError(f'{path} holds no tensors under model, module, state_dict or its root.')
  return state
