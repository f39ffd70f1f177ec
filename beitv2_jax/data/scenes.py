"""Images with a mask of class numbers, and what training does to both: ADE20K's recipe as mmsegmentation has it (paper section 3.3)."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitv2_jax.data import decode
from beitv2_jax.data.folders import read_file
from beitv2_jax.data.listing import SPLITS, Names, held_out, images_under
from beitv2_jax.data.transforms import Record, Rng
from beitv2_jax.errors import UserError

IGNORE = decode.LARGEST_CLASS  # in masks of class numbers: no class
FILL = (124, 116, 104)  # ImageNet's mean: zero once normalised
MASK_FOLDERS = ('annotations', 'masks', 'labels')


def _pairs_of_folders(root: Path) -> dict[str, tuple[Path, Path]]:
  """{split, or '' for a folder without splits: (images, masks)} in any of the usual layouts."""
  found = {}
  for split, names in SPLITS.items():
    for n in names:
      for m in MASK_FOLDERS:
        for images, masks in ((root / 'images' / n, root / m / n), (root / n / 'images', root / n / m), (root / n, root / f'{n}annot')):
          if split not in found and images.is_dir() and masks.is_dir():
            found[split] = images, masks
      full = root / 'images' / 'ADE' / n
      if split not in found and full.is_dir():
        found[split] = full, full
  for m in MASK_FOLDERS:
    if not found and (root / 'images').is_dir() and (root / m).is_dir():
      found[''] = root / 'images', root / m
  return found


class Scenes:
  """A folder of images and one of PNG masks with the same names: source[i] → dict(image, mask), both as encoded bytes.

  Layouts: images/training + annotations/training (ADE20K), train/images + train/masks, train + trainannot (CamVid), images +
  masks, of which a share is held out, or images/ADE/training with NAME_seg.png beside NAME.jpg (ADE20K's full set, whose classes are
  numbered from 1 in two colours). `classes` are the lines of classes.txt, or the names in objectInfo150.txt, where there is one.
  """

  def __init__(self, where: str, split: str, holdout: float = 0.1, **_):
    root = Path(where).expanduser()
    if root.is_file():
      raise UserError(f'data.source=scenes:{where} is a file; unpack it (unzip -q {root.name}) and name the folder that comes out.')
    pairs = _pairs_of_folders(root) if root.is_dir() else {}
    if not pairs and root.is_dir():  # where an archive was unpacked into a folder made for it
      inner = [d for d in sorted(root.iterdir()) if d.is_dir() and _pairs_of_folders(d)]
      if len(inner) == 1:
        root, pairs = inner[0], _pairs_of_folders(inner[0])
    if not pairs or (split not in pairs and '' not in pairs):
      have = f'only {", ".join(pairs)} there' if pairs else 'none there'
      raise UserError(
        f'no {split} images with masks under {root.absolute()} ({have}): looked for images/training + annotations/training, train/images + train/masks, '
        'train + trainannot, or images + masks (for evaluation with validation or val).'
      )
    images, masks = pairs.get(split) or pairs['']
    self.full = images == masks
    names = [n for n in images_under(images) if not self.full or n.endswith('.jpg')]
    self.images, self.masks = str(images), str(masks)
    self.names, self.mask_names = Names(names), Names(_masks_of(names, images, masks))
    self.keep = np.arange(len(names)) if split in pairs else held_out(len(names), split, holdout)
    self.classes = _class_names(root)

  def __len__(self) -> int:
    return len(self.keep)

  def __getitem__(self, i: int) -> dict:
    mask = os.path.join(self.masks, self.mask_names[int(self.keep[i])])
    stored = read_file(mask)
    return dict(image=read_file(self.name(i)), mask=decode.full_ade20k_mask(stored) if self.full else stored)

  def name(self, i: int) -> str:
    return os.path.join(self.images, self.names[int(self.keep[i])])


def _masks_of(names: list[str], images: Path, masks: Path) -> list[str]:
  """The mask of each image: of the same path but for its ending, or else of the same name in another folder if only one has it."""
  ending = '_seg.png' if images == masks else ''
  found = [n for n in images_under(masks) if n.endswith(ending)]
  by_path = {n.removesuffix(ending) if ending else os.path.splitext(n)[0]: n for n in found}
  by_name: dict[str, list[str]] = {}
  for n in found:
    by_name.setdefault(Path(n).stem, []).append(n)
  candidates = [[by_path[p]] if (p := os.path.splitext(n)[0]) in by_path else by_name.get(Path(n).stem, []) for n in names]
  lacking = [n for n, c in zip(names, candidates) if not c]
  if lacking or not names:
    raise UserError(f'{len(lacking)} of the {len(names)} images in {images} have no mask of their name in {masks}, such as {lacking[:3]}.')
  for name, several in zip(names, candidates):
    if len(several) > 1:
      raise UserError(f'{images / name} could have any of the masks {", ".join(several[:3])} in {masks}: give both the same sub-folders.')
  taken: dict[str, str] = {}
  for name, (mask,) in zip(names, candidates):
    if taken.setdefault(mask, name) != name:
      raise UserError(
        f'{images / taken[mask]} and {images / name} would share the mask {masks / mask}: give images and masks the same sub-folders.'
      )
  return [mask for (mask,) in candidates]


@dataclasses.dataclass(frozen=True)
class Survey:
  """How often each stored value occurs in the masks that were looked at."""

  counts: dict[int, int]  # pixels of each stored value
  labels: 'Labels'
  looked_at: int
  masks: int

  def __str__(self) -> str:
    total, stored = max(sum(self.counts.values()), 1), sorted(self.counts, key=lambda v: -self.counts[v])
    numbers, none = self.labels.numbers(np.array(stored, np.int64))
    meaning = ['no class' if skip else f'class {number}' for number, skip in zip(numbers, none)]
    shown = [f'{value} ({what}) {100 * self.counts[value] / total:.1f} %' for value, what in list(zip(stored, meaning))[:8]]
    more = f' and {len(stored) - 8} more' * (len(stored) > 8)
    return f'{", ".join(shown)}{more} of the pixels in {self.looked_at:,} of {self.masks:,} masks'

  def problem(self, must_occur: bool) -> str:
    """What cannot be meant; '' if nothing is wrong. With `must_occur` also classes that are nowhere, if all masks were looked at."""
    numbers, none = self.labels.numbers(np.array(sorted(self.counts), np.int64))
    there = set(numbers[~none].tolist())
    ignored = [int(v) for v, skip in zip(sorted(self.counts), none) if skip]
    hint = (
      f' {ignored[-1]} is taken for no class; if it is one, --config.labels.values="(0, {ignored[-1]})" or labels.ignore says so.'
      if ignored
      else ''
    )
    if len(there) < 2:
      return f'all labelled pixels are of one class.{hint}' if there else f'no pixel has a class.{hint}'
    missing = sorted(set(range(self.labels.classes)) - there)
    if must_occur and missing and self.looked_at == self.masks:
      return f'{len(missing)} of {self.labels.classes} classes never occur, such as class {missing[0]}: is model.classes right?{hint}'
    return ''


def survey(source: Any, labels: 'Labels', limit: int = 500) -> Survey:
  """Looks at up to `limit` masks, evenly spread over a source. Raises UserError for a value that is no class, with the mask's name."""
  counts: dict[int, int] = {}
  chosen = np.unique(np.linspace(0, len(source) - 1, limit).astype(int))
  for i in chosen:
    try:
      mask = decode.mask(source[int(i)]['mask'])
    except decode.UNDECODABLE:
      continue  # the pipeline names and counts what does not decode
    values, pixels = np.unique(mask, return_counts=True)
    numbers, none = labels.numbers(values.astype(np.int64))
    if (numbers[~none] >= labels.classes).any():
      labels(dict(mask=mask, image=np.broadcast_to(np.uint8(0), (*mask.shape, 3))), None)  # raises
    for value, count in zip(values.tolist(), pixels.tolist()):
      counts[value] = counts.get(value, 0) + count
  return Survey(counts, labels, len(chosen), len(source))


def _class_names(root: Path) -> list[str] | None:
  if (root / 'classes.txt').is_file():
    return (root / 'classes.txt').read_text().splitlines()
  if (root / 'objectInfo150.txt').is_file():  # ADE20K's: a table whose last column is the name
    return [line.split('\t')[-1].strip() for line in (root / 'objectInfo150.txt').read_text().splitlines()[1:]]
  return None


def resized(array: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
  """Bilinear without antialiasing at half-pixel centres, as OpenCV's; or the nearest pixel, for masks."""
  (h, w), (new_h, new_w) = array.shape[:2], size
  if nearest:  # of any number of bits
    rows, cols = (((np.arange(new) + 0.5) * (old / new)).astype(int) for new, old in ((new_h, h), (new_w, w)))
    return array[rows[:, None], cols]
  bilinear = Image.Resampling.BILINEAR
  return np.asarray(Image.fromarray(array).transform((new_w, new_h), Image.Transform.AFFINE, (w / new_w, 0, 0, 0, h / new_h, 0), bilinear))


def fitted_size(h: int, w: int, long: float, short: float) -> tuple[int, int]:
  """The largest size of the same ratio whose sides stay within (long, short)."""
  factor = min(long / max(h, w), short / min(h, w))
  return int(h * factor + 0.5), int(w * factor + 0.5)


@dataclasses.dataclass(frozen=True)
class Labels:
  """Masks [h, w] as they are stored → class numbers from 0, IGNORE for no class, uint16.

  `values` are the stored values of the classes, in their order, as (0, 255) for a binary mask; empty, the numbers are the classes'.
  `reduce_zero`: 0 is no class and 1 is class 0 (ADE20K). `ignore` are stored values that mean no class. Raises UserError for any
  other value.
  """

  classes: int
  reduce_zero: bool = False
  ignore: tuple[int, ...] = (255,)
  values: tuple[int, ...] = ()

  def __call__(self, record: Record, rng: Rng | None) -> Record:
    mask = record['mask'].astype(np.int64)
    out, none = self.numbers(mask)
    if (out[~none] >= self.classes).any():
      worst = int(mask[~none][out[~none] >= self.classes].max())
      raise UserError(
        f'a mask holds {worst}, but there are {self.classes} classes{self._counted()}. Set model.classes, or, if it means no class, '
        f'--config.labels.ignore="({worst},255)".'
      )
    if mask.shape != record['image'].shape[:2]:
      raise UserError(f'a mask is {mask.shape[0]}x{mask.shape[1]}, its image {record["image"].shape[0]}x{record["image"].shape[1]}.')
    return record | dict(mask=np.where(none, IGNORE, out).astype(np.uint16))

  def numbers(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers, which of them are none) of stored values; unknown ones come out too large."""
    if self.values:
      known, order = np.asarray(self.values), np.argsort(self.values)
      place = np.searchsorted(known[order], stored).clip(max=len(known) - 1)
      out = np.where(known[order][place] == stored, order[place], self.classes)
      return out, np.isin(stored, [v for v in self.ignore if v not in self.values])
    out = stored - 1 if self.reduce_zero else stored
    return out, np.isin(stored, self.ignore) | (out < 0)

  def _counted(self) -> str:
    return f' stored as {self.values}' if self.values else ' counted from 1' * self.reduce_zero


@dataclasses.dataclass(frozen=True)
class RandomResize:
  """To fit (4s, s) times one factor of U(ratio): image and mask together."""

  short: int
  ratio: tuple[float, float] = (0.5, 2.0)

  def __call__(self, record: Record, rng: Rng) -> Record:
    r = rng.uniform(*self.ratio)
    size = fitted_size(*record['mask'].shape, int(4 * self.short * r), int(self.short * r))
    return record | dict(image=resized(record['image'], size), mask=resized(record['mask'], size, nearest=True))


@dataclasses.dataclass(frozen=True)
class RandomCrop:
  """A crop of `size`, smaller where the image is: ten tries for one in which no class has `max_share` of the labelled pixels or more."""

  size: tuple[int, int]
  max_share: float = 0.75

  def __call__(self, record: Record, rng: Rng) -> Record:
    h, w = record['mask'].shape
    for _ in range(11):
      top, left = (int(rng.integers(0, max(n - s, 0) + 1)) for n, s in zip((h, w), self.size))
      box = slice(top, top + self.size[0]), slice(left, left + self.size[1])
      cut = record['mask'][box]
      counts = np.bincount(cut[cut != IGNORE])
      if np.count_nonzero(counts) > 1 and counts.max() < self.max_share * counts.sum():
        break
    return record | dict(image=record['image'][box], mask=record['mask'][box])


@dataclasses.dataclass(frozen=True)
class FlipBoth:
  def __call__(self, record: Record, rng: Rng) -> Record:
    if rng.random() < 0.5:
      record = record | {k: np.ascontiguousarray(record[k][:, ::-1]) for k in ('image', 'mask')}
    return record


@dataclasses.dataclass(frozen=True)
class PhotometricDistortion:
  """Brightness ±32, contrast and saturation U(0.5, 1.5), hue ±18 of 180 degrees, each with probability 1/2; contrast first or last."""

  def __call__(self, record: Record, rng: Rng) -> Record:
    x, on = record['image'], rng.random(5) < 0.5
    scale = lambda x, alpha, beta=0.0: np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)
    contrast = lambda x: scale(x, rng.uniform(0.5, 1.5))
    if on[0]:
      x = scale(x, 1.0, rng.uniform(-32, 32))
    if on[1] and on[2]:
      x = contrast(x)
    if on[3] or on[4]:
      hsv = np.array(Image.fromarray(x).convert('HSV'))
      if on[3]:
        hsv[..., 1] = scale(hsv[..., 1], rng.uniform(0.5, 1.5))
      if on[4]:
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(rng.uniform(-18, 18) / 180 * 256)) % 256
      x = np.array(Image.fromarray(hsv, 'HSV').convert('RGB'))
    if on[1] and not on[2]:
      x = contrast(x)
    return record | dict(image=x)


@dataclasses.dataclass(frozen=True)
class Pad:
  """At the bottom and right, up to `size`: the image with ImageNet's mean, the mask with IGNORE."""

  size: tuple[int, int]

  def __call__(self, record: Record, rng: Rng) -> Record:
    return record | dict(image=padded(record['image'], self.size, FILL), mask=padded(record['mask'], self.size, IGNORE))


def padded(array: np.ndarray, size: tuple[int, int], fill) -> np.ndarray:
  out = np.empty((*size, *array.shape[2:]), array.dtype)
  out[:] = np.asarray(fill, array.dtype)
  out[: array.shape[0], : array.shape[1]] = array
  return out


@dataclasses.dataclass(frozen=True)
class Fit:
  """The whole image, made to fit `size` in its own ratio: what the quick evaluation during training looks at."""

  size: tuple[int, int]

  def __call__(self, record: Record, rng: Rng) -> Record:
    h, w = record['mask'].shape
    factor = min(self.size[0] / h, self.size[1] / w)
    size = max(1, int(h * factor)), max(1, int(w * factor))
    return record | dict(image=resized(record['image'], size), mask=resized(record['mask'], size, nearest=True))
