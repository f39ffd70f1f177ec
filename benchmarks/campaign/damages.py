"""Damage to the files that a run leaves: bits, zeros, cuts, deletions. What reads them must give the right numbers or say what is wrong."""

import shutil
from pathlib import Path

import numpy as np

RUN_FILES = ('config.json', 'metrics.jsonl', 'parameters.txt')


def flip_bit(path: Path, rng: np.random.Generator) -> str:
  data = bytearray(path.read_bytes())
  if not data:
    return delete(path, rng)
  place = int(rng.integers(len(data)))
  data[place] ^= 1 << int(rng.integers(8))
  path.write_bytes(data)
  return f'a bit of byte {place} flipped'


def zeros(path: Path, rng: np.random.Generator) -> str:
  data = bytearray(path.read_bytes())
  start, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 4097))
  data[start : start + length] = bytes(len(data[start : start + length]))
  path.write_bytes(data)
  return f'{length} zeros from byte {start}'


def cut(path: Path, rng: np.random.Generator) -> str:
  data = path.read_bytes()
  length = int(rng.integers(len(data) + 1))
  path.write_bytes(data[:length])
  return f'cut to {length} bytes'


def delete(path: Path, rng: np.random.Generator) -> str:
  path.unlink()
  return 'deleted'


def noise(path: Path, rng: np.random.Generator) -> str:
  path.write_bytes(rng.bytes(int(rng.integers(1, 2000))))
  return 'noise'


WAYS = (flip_bit, flip_bit, zeros, cut, delete, noise)


def damage(folder: Path, rng: np.random.Generator) -> str:
  """Damages one file under `folder`, or empties or removes one of its folders. Returns what was done."""
  files = sorted(f for f in folder.rglob('*') if f.is_file())
  if rng.random() < 0.1:
    folders = sorted(f for f in folder.rglob('*') if f.is_dir())
    if folders:
      chosen = folders[rng.integers(len(folders))]
      shutil.rmtree(chosen)
      if rng.random() < 0.5:
        chosen.mkdir()
      return f'{chosen.relative_to(folder)}: folder emptied or removed'
  path = files[rng.integers(len(files))]
  way = WAYS[rng.integers(len(WAYS))]
  return f'{path.relative_to(folder)}: {way(path, rng)}'
