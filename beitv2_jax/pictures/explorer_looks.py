"""What the explorer draws over images besides codes: features that are alike, features as colours, where patches look."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax.downstream import patch_features
from beitv2_jax.pictures.site_data import packed, write
from beitv2_jax.progress import bar

DIMENSIONS = 32  # of the short features


@dataclasses.dataclass(frozen=True)
class Look:
  """What is drawn over images besides codes. `features` and `looks` take uint8 images [b, h, w, 3].

  `target(images)` → [b, N, V], features whose similarity is shown; `patches(images)` → [b, N, D], coloured by principal components;
  `attention(images)` → [b, 1 + N, N], where [CLS] and each patch look. `target_is` says in words what `target` is, `features_from`
  which other model than the tokenizer the rest is of.
  """

  target: Callable[[np.ndarray], np.ndarray]
  patches: Callable[[np.ndarray], np.ndarray]
  attention: Callable[[np.ndarray], np.ndarray]
  target_is: str
  features_from: str = ''


@dataclasses.dataclass(frozen=True)
class Basis:
  """Directions onto which features are laid: of `target` [V, d], and, less their mean, of `patches` [D, 3] with their range [2, 3]."""

  target: np.ndarray
  scale: Any  # a short feature's unit in int8
  mean: np.ndarray
  colors: np.ndarray
  range: np.ndarray
  error: Any  # mean error of a cosine made from short features

  @classmethod
  def fit(cls, target: np.ndarray, patches: np.ndarray) -> 'Basis':
    """From features of a sample of patches, [m, V] and [m, D]."""
    target = unit(target.astype(np.float64))
    vectors = np.linalg.eigh(target.T @ target)[1][:, ::-1][:, : min(DIMENSIONS, target.shape[1])]
    short = target @ vectors
    scale = float(127 / max(np.abs(short).max(), 1e-12))
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, len(target), (2, 20_000))
    error = float(np.abs((short[i] * short[j]).sum(1) - (target[i] * target[j]).sum(1)).mean())
    return cls(vectors.astype(np.float32), scale, *patch_features.principal_components(patches.astype(np.float64)), error)

  def save(self, path: Path) -> None:
    np.savez(path, **dataclasses.asdict(self))

  @classmethod
  def load(cls, path: Path) -> 'Basis':
    with np.load(path, allow_pickle=False) as file:
      values = dict(file)
    return cls(**values)

  def short(self, target: np.ndarray) -> np.ndarray:
    """[N, V] → int8 [N, d]."""
    return np.clip(np.rint(unit(target) @ self.target * self.scale), -127, 127).astype(np.int8)

  def colored(self, patches: np.ndarray) -> np.ndarray:
    """[N, D] → uint8 [N, 3]."""
    return patch_features.colored(patches, self.mean, self.colors, self.range)


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def write_looks(
  out: Path, images: Callable[[np.ndarray], Any], chosen: np.ndarray, look: Look, batch: int = 16, sample: int = 128
) -> Basis:
  """Features and attention of the shown images, laid onto directions that a sample of them gives."""
  few = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(sample, len(chosen))).round().astype(int))]
  target, patches = [], []
  for part in in_groups(images(few), batch):
    target.append(np.concatenate(look.target(part)))
    patches.append(np.concatenate(look.patches(part)))
  basis = Basis.fit(np.concatenate(target), np.concatenate(patches))
  basis.save(out / 'data' / 'basis.npz')
  done = 0
  for part in bar(in_groups(images(chosen), batch), 'batches', math.ceil(len(chosen) / batch), 'features and attention'):
    write_look(out, done, part, look, basis)
    done += len(part)
  return basis


def write_look(out: Path, start: int, images: np.ndarray, look: Look, basis: Basis) -> None:
  for i, (target, patches, attention) in enumerate(zip(look.target(images), look.patches(images), look.attention(images))):
    # Against the largest of each row, by its root: what little attention there is elsewhere can be seen too.
    share = np.sqrt(attention / np.maximum(attention.max(-1, keepdims=True), 1e-12))
    value = dict(
      features=packed(basis.short(target)),
      scale=float(basis.scale),
      colors=packed(basis.colored(patches)),
      attention=packed(np.rint(255 * share).astype(np.uint8)),
    )
    write(out / 'images' / 'looks' / f'{start + i:05d}.js', f'looks/{start + i}', value)


def in_groups(images: Any, size: int) -> Any:
  group = []
  for image in images:
    group.append(image)
    if len(group) == size:
      yield np.stack(group)
      group = []
  if group:
    yield np.stack(group)
