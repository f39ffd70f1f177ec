"""Weights files changed by rules: names, shapes, types, numbers, traps in the pickle, and the bytes of the file."""

import io
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from benchmarks.campaign import damages

TYPES = (np.float16, np.float64, np.int64, np.int8, np.uint8, np.bool_, ml_dtypes.bfloat16)
STORAGES = {
  np.dtype(np.float32): 'FloatStorage',
  np.dtype(np.float64): 'DoubleStorage',
  np.dtype(np.int64): 'LongStorage',
  np.dtype(np.float16): 'HalfStorage',
}
TRAPS = ('', '', 'deflated', 'strides', 'offset', 'negative', 'keys', 'shared', 'settings', 'code', 'memo', 'attributes', 'bomb')


def names(state: dict, rng: np.random.Generator) -> str:
  """A key is removed, or called something else."""
  key = _any(state, rng)
  new = str(
    rng.choice([f'{key}.x', f'module.{key}', key.replace('0', '7'), key.replace('blocks.', 'blocks.100000000'), 'x', 'é' * 50, key.upper()])
  )
  value = state.pop(key)
  if rng.random() < 0.7:
    state[new] = value
  return f'{key} is now {new[:40]!r}'


def shape(state: dict, rng: np.random.Generator) -> str:
  key = _any(state, rng)
  value = state[key]
  ways = [value.reshape(-1), value[None], value[:0], value.reshape(-1)[:1].reshape(()), value.T, np.concatenate([value, value]), value[:1]]
  state[key] = np.ascontiguousarray(ways[rng.integers(len(ways))])
  return f'{key}: {value.shape} is now {state[key].shape}'


def dtype(state: dict, rng: np.random.Generator) -> str:
  key = _any(state, rng)
  state[key] = state[key].astype(TYPES[rng.integers(len(TYPES))])
  return f'{key} is now {state[key].dtype}'


def number(state: dict, rng: np.random.Generator) -> str:
  """One value that is not finite, in float32 at least."""
  key = _any(state, rng)
  wrong = [(np.float32, np.nan), (np.float32, np.inf), (np.float64, 1e300), (ml_dtypes.bfloat16, np.nan), (np.float16, np.inf)]
  kind, value = wrong[rng.integers(len(wrong))]
  state[key] = state[key].astype(kind)
  state[key].flat[rng.integers(state[key].size)] = value
  return f'{key}: a {value} as {np.dtype(kind)}'


WAYS = (names, names, shape, shape, dtype, number)


def _any(state: dict, rng: np.random.Generator) -> str:
  return sorted(k for k, v in state.items() if v.size and v.ndim)[
    rng.integers(0, 10**9) % sum(bool(v.size and v.ndim) for v in state.values())
  ]


def write(folder: Path, state: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[Path, str]:
  """A file with one or two things wrong. Returns it, and what is wrong."""
  state = {k: v.copy() for k, v in state.items()}
  done = [WAYS[rng.integers(len(WAYS))](state, rng) for _ in range(rng.integers(0, 3))]
  if rng.random() < 0.5:
    path = folder / 'file.safetensors'
    path.write_bytes(save({k: np.ascontiguousarray(v) for k, v in state.items()}))
  else:
    trap = TRAPS[rng.integers(len(TRAPS))]
    path = folder / 'file.pth'
    path.write_bytes(as_pth(state, trap))
    done.append(f'trap: {trap}')
  if rng.random() < 0.3:
    done.append(damages.WAYS[rng.integers(len(damages.WAYS) - 2)](path, rng))
  return path, ', '.join(done)


def as_pth(state: dict[str, np.ndarray], trap: str = '') -> bytes:
  """A .pth as PyTorch writes it, with a trap built in."""
  out = io.BytesIO()
  method = zipfile.ZIP_DEFLATED if trap in ('deflated', 'bomb') else zipfile.ZIP_STORED
  with zipfile.ZipFile(out, 'w', method) as archive:
    entries = []
    for i, (key, value) in enumerate(state.items()):
      value = np.ascontiguousarray(value) if value.dtype in STORAGES else np.ascontiguousarray(value, np.float32)
      archive.writestr(f'archive/data/{i}', bytes(2**28) if trap == 'bomb' and i == 0 else value.tobytes())
      strides = [s // value.itemsize for s in value.strides]
      size, offset = list(value.shape), 0
      if trap == 'strides':
        size, strides = [10**6 for _ in size], [1 for _ in size]
      if trap == 'negative':
        strides = [-s for s in strides]
      offset = 10**9 if trap == 'offset' else 0
      storage = (
        _tuple(
          _text('storage'),
          _global('torch', STORAGES[value.dtype]),
          _text(str(0 if trap == 'shared' else i)),
          _text('cpu'),
          _int(value.size),
        )
        + b'Q'
      )
      tensor = (
        _global('torch._utils', '_rebuild_tensor_v2')
        + _tuple(storage, _int(offset), _tuple(*map(_int, size)), _tuple(*map(_int, strides)), b'\x89', b'}')
        + b'R'
      )
      entries.append((_int(i) if trap == 'keys' else _text(key)) + tensor)
    tensors = _global('collections', 'OrderedDict') + b')R(' + b''.join(entries) + b'u'
    if trap == 'attributes':
      tensors += b'}(' + _text('items') + _int(1) + _text('get') + _int(2) + b'ub'
    model = _text('model') + tensors
    if trap == 'settings':
      model += _text('args') + _global('mmengine.config', 'Config') + b')R}(' + _text('lr') + _int(1) + b'ub'
    if trap == 'code':
      model += _text('args') + _global('os', 'system') + _tuple(_text('touch /tmp/beitv2_jax_ran_code')) + b'R'
    start = b'\x80\x02' + (b'Nr\xff\xff\xff\x7f0' if trap == 'memo' else b'')  # into memo number 2**31
    archive.writestr('archive/data.pkl', start + b'}(' + model + b'u.')
  return out.getvalue()


def _text(text: str) -> bytes:
  return b'X' + struct.pack('<I', len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
  return b'\x8a\x08' + struct.pack('<q', number)


def _global(module: str, name: str) -> bytes:
  return f'c{module}\n{name}\n'.encode()


def _tuple(*items: bytes) -> bytes:
  return b'(' + b''.join(items) + b't'
