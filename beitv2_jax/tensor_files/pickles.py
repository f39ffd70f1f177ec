"""Arrays out of PyTorch's .pth files, without torch and without running what a pickle names.

A .pth is a zip (or, before PyTorch 1.6, a stream) with a pickle inside, and a pickle can run code. This reader knows tensors and
containers. Other things that checkpoints carry, such as settings objects, become empty stand-ins; what could only be an attack is refused.
No file can make it use much more memory than the file's own size.
"""

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
ATTACKS = {
  'builtins',
  '__builtin__',
  'os',
  'posix',
  'nt',
  'subprocess',
  'sys',
  'shutil',
  'runpy',
  'importlib',
  'socket',
  'pty',
  'ctypes',
  'code',
}
MAX_PICKLE = 2**25  # bytes of the pickle alone: those of the official checkpoints have 0.2 MB
OLD_MAGIC = 0x1950A86A20F9469CFC6C


class _Dict(dict):
  """An OrderedDict; state dicts carry attributes, which are not needed and may not replace a dict's own."""

  __slots__ = ()

  def __setstate__(self, state):
    pass


class _StandIn:
  """For an object of a class that is not known: takes whatever it is given, and does nothing."""

  def __new__(cls, *args, **kwargs):
    return object.__new__(cls)

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass

  def __setitem__(self, key, value):
    pass

  def append(self, item):
    pass

  def extend(self, items):
    pass


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
  """A view of a storage: nothing is copied."""
  if min((*size, *stride, offset), default=0) < 0:
    raise ValueError('a tensor has a negative size')
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
  count = 1
  for n in size:
    count *= n
  if last >= max(storage.size, 1) or count > max(storage.size, 1):
    raise ValueError('a tensor reaches past the end of its data, or repeats them')
  part = storage[offset:]
  return np.lib.stride_tricks.as_strided(part, size, [s * part.itemsize for s in stride], writeable=False)


def _parameter(data, *_):
  return data


class _Unpickler(pickle._Unpickler):  # the one in Python, whose memo does not grow to the largest number a file names
  """Only what a state dict needs. `storage(key, dtype, count)` gives a tensor's numbers."""

  def __init__(self, file, storage):
    super().__init__(file)
    self.storage = storage

  def find_class(self, module: str, name: str) -> Any:
    known = {
      ('collections', 'OrderedDict'): _Dict,
      ('torch._utils', '_rebuild_tensor_v2'): _tensor,
      ('torch._utils', '_rebuild_parameter'): _parameter,
      ('torch', 'Size'): tuple,
    }
    if (module, name) in known:
      return known[module, name]
    if module in ('torch', 'torch.storage') and name in _DTYPES:
      return name
    if module.partition('.')[0] in ATTACKS and (module, name) not in (('builtins', 'set'), ('__builtin__', 'set')):
      raise UserError(
        f'refused: opening the file would run {module}.{name}, which this reader does not. If you trust where it comes from, open it with torch and save its '
        'state dict alone (torch.save or safetensors).'
      )
    return _StandIn

  def persistent_load(self, pid: tuple) -> np.ndarray:
    _, kind, key, _, count, *_ = pid
    return self.storage(key, np.dtype(_DTYPES[kind]), count)


def read(path: Path) -> Any:
  """The object a .pth holds, tensors as numpy arrays (views of what was read). Raises UserError for broken files and for pickles with code."""
  try:
    return _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)
  except UserError:
    raise
  except MemoryError as e:
    raise UserError(f'{path} asks for more memory than there is.') from e
  except Exception as e:  # a damaged pickle can fail in any way
    raise UserError(
      f'{path} is cut off or damaged, or not a PyTorch checkpoint ({type(e).__name__}: {str(e)[:200]}). Download it again.'
    ) from e


def _read_zip(path: Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    name = next((n for n in archive.namelist() if n.endswith('data.pkl')), None)
    if name is None:
      raise UserError(f'{path} is a zip without data.pkl: not a PyTorch checkpoint.')
    root, size = name.removesuffix('data.pkl'), path.stat().st_size
    unpacked = sum(info.file_size for info in archive.infolist())
    if archive.getinfo(name).file_size > MAX_PICKLE or unpacked > 20 * size + 2**26:
      raise UserError(f'{path} unpacks from {size:,} to {unpacked:,} bytes, which no checkpoint does: it is damaged, or an attack.')
    read: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
      if key not in read:
        read[key] = np.frombuffer(archive.read(f'{root}data/{key}'), dtype, count)
      return read[key].view(dtype)

    return _Unpickler(io.BytesIO(archive.read(name)), storage).load()


def _read_stream(path: Path) -> Any:
  """The format before PyTorch 1.6: pickles of a magic number, a version, the machine, the object and its storages' keys; then their data."""
  size, filled = path.stat().st_size, {}
  with path.open('rb') as file:

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
      if key not in filled:
        if count * dtype.itemsize + sum(a.nbytes for a in filled.values()) > size:
          raise ValueError('the data are longer than the file')
        filled[key] = np.zeros(count, dtype)  # its numbers come later
      return filled[key].view(dtype)

    unpickler = lambda: _Unpickler(file, storage)
    if unpickler().load() != OLD_MAGIC or unpickler().load() != 1001:
      raise ValueError('no PyTorch file')
    unpickler().load()  # byte order and sizes of the machine it was written on: all are little endian by now
    result, keys = unpickler().load(), unpickler().load()
    for key in keys:
      count = int.from_bytes(file.read(8), 'little')
      if key in filled:
        if count != filled[key].size:
          raise ValueError('a storage of another length than its tensors say')
        data = file.read(filled[key].nbytes)
        filled[key][:] = np.frombuffer(data, filled[key].dtype)
    return result
