"""A tokenizer's codes over a whole set of images, and what they tell about each code.

Letters: n images, (Gh, Gw) patch grid, K codes, L classes. None of this needs a model again: figures come from the codes alone.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import sparse

from beitv2_jax import config as config_lib
from beitv2_jax.data import pipeline, transforms
from beitv2_jax.errors import UserError
from beitv2_jax.progress import bar


@dataclasses.dataclass(frozen=True)
class Survey:
  """Which code each patch has. `mean_patches` is float32 [K, patch, patch, 3] in [0, 1], 0 for codes that do not occur."""

  codes: np.ndarray  # int32 [n, Gh, Gw]
  closeness: np.ndarray  # float16 [n, Gh, Gw]: of each patch's vector to its code (trained.Model.assignments)
  size: int  # K
  mean_patches: np.ndarray
  labels: np.ndarray | None = None  # int [n]
  classes: list[str] | None = None
  records: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))  # where in the source each of the n images is

  def __len__(self) -> int:
    return len(self.codes)


def plain_batches(model: Any, source: Any, batch: int) -> Any:
  """Images of a source as the model takes them: dicts with `image` uint8 [b, h, w, 3], `valid`, and `label` where there are labels."""
  size = model.config.data.image_size
  steps = [transforms.CenterCrop(size if isinstance(size, int) else tuple(size), model.config.data.get('crop_pct', 0.875))]
  return pipeline.eval_batches(source, steps, seed=0, batch=batch, reading=config_lib.reading(model.config))


def survey(model: Any, source: Any, batch: int = 64) -> Survey:
  """The codes of all images of `source` that decode. Raises UserError if the model is no tokenizer or nothing decodes."""
  if model.kind != 'tokenizer':
    raise UserError(f'{model.kind} models have no codes; give a tokenizer.')
  size, patch = model.config.model.codes, model.config.model.patch_size
  sums, counts = np.zeros((size, patch * patch * 3), np.float32), np.zeros(size)
  codes, closeness, labels, records, seen = [], [], [], [], 0
  rows = plain_batches(model, source, batch)
  for part in bar(rows, 'batches', math.ceil(len(source) / batch), f'codes of {len(source):,} images'):
    found, near = (np.asarray(x)[part['valid']] for x in model.assignments(part['image']))
    records.append(seen + np.flatnonzero(part['valid']))
    seen += batch
    codes.append(found.astype(np.int32))
    closeness.append(near.astype(np.float16))
    if source.classes is not None:
      labels.append(part['label'][part['valid']])
    add_patches(sums, counts, part['image'][part['valid']], found)
  codes = np.concatenate(codes)
  if not len(codes):
    raise UserError('none of the images decodes.')
  means = (sums / np.maximum(counts, 1)[:, None] / 255).reshape(size, patch, patch, 3)
  classes = list(source.classes) if source.classes is not None else None
  return Survey(codes, np.concatenate(closeness), size, means, np.concatenate(labels) if labels else None, classes, np.concatenate(records))


def add_patches(sums: np.ndarray, counts: np.ndarray, images: np.ndarray, codes: np.ndarray) -> None:
  """Adds the patches of images uint8 [b, h, w, 3] to `sums` [K, patch * patch * 3] and `counts` [K] of their codes [b, Gh, Gw]."""
  b, rows, cols = codes.shape
  patch = images.shape[1] // rows
  patches = images.reshape(b, rows, patch, cols, patch * 3).swapaxes(2, 3).reshape(b * rows * cols, -1)
  flat = codes.reshape(-1)
  member = sparse.csr_matrix((np.ones(len(flat), np.float32), (flat, np.arange(len(flat)))), (len(sums), len(flat)))
  sums += member @ patches.astype(np.float32)
  counts += np.bincount(flat, minlength=len(counts))


def usage(survey: Survey) -> np.ndarray:
  """How many patches have each code, int [K]."""
  return np.bincount(survey.codes.reshape(-1), minlength=survey.size)


def positions(survey: Survey) -> np.ndarray:
  """How often each code occurs at each place of the image, int [K, Gh, Gw]."""
  n, rows, cols = survey.codes.shape
  places = survey.codes.reshape(n, -1).astype(np.int64) * (rows * cols) + np.arange(rows * cols)
  return np.bincount(places.reshape(-1), minlength=survey.size * rows * cols).reshape(survey.size, rows, cols)


def spread(positions: np.ndarray) -> np.ndarray:
  """[K] in [0, 1]: entropy of where in the image a code occurs, over its largest; 0 for one place only, 1 for everywhere alike."""
  flat = positions.reshape(len(positions), -1)
  return entropy(flat) / max(math.log2(flat.shape[1]), 1e-12)


def entropy(counts: np.ndarray) -> np.ndarray:
  """In bits, over the last axis; 0 where there are no counts."""
  p = counts / np.maximum(counts.sum(-1, keepdims=True), 1e-12)
  return -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0).sum(-1)


def class_counts(survey: Survey) -> np.ndarray:
  """How many patches of images of each class have each code, int [K, L]. Of a survey with labels."""
  assert survey.labels is not None and survey.classes is not None
  classes, cells = len(survey.classes), survey.codes.reshape(len(survey), -1).astype(np.int64)
  pairs = cells * classes + np.asarray(survey.labels, np.int64)[:, None]
  return np.bincount(pairs.reshape(-1), minlength=survey.size * classes).reshape(survey.size, classes)


def purity(classes: np.ndarray) -> np.ndarray:
  """[K] in [0, 1] from class counts [K, L]: 1 - (entropy of the classes of a code's patches) / (that of all patches'). 0 where there is one class.

  A code that occurs a few times only is pure by chance: look at its count too.
  """
  whole = float(entropy(classes.sum(0)))
  if whole < 1e-9:
    return np.zeros(len(classes))
  return np.where(classes.sum(1) > 0, np.clip(1 - entropy(classes) / whole, 0, 1), 0)


def typical(survey: Survey, count: int) -> np.ndarray:
  """The `count` patches nearest to each code, of different images: int [K, count, 3] of (image, row, column), -1 where there are no more."""
  n, rows, cols = survey.codes.shape
  flat = survey.codes.reshape(-1)
  order = np.lexsort((-survey.closeness.reshape(-1).astype(np.float32), flat))
  ends = np.cumsum(np.bincount(flat, minlength=survey.size))
  out = np.full((survey.size, count, 3), -1, np.int64)
  for code, (begin, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends)):
    if begin == end:
      continue
    nearest = order[begin:end]
    images, first = np.unique(nearest // (rows * cols), return_index=True)
    chosen = nearest[np.sort(first)[:count]]
    out[code, : len(chosen)] = np.stack([chosen // (rows * cols), chosen // cols % rows, chosen % cols], 1)
  return out


def together(survey: Survey, count: int) -> tuple[np.ndarray, np.ndarray]:
  """(codes [K, count] that share images with a code more often than chance, -1 where there are none; how much more often: the ratio).

  Ranked by (seen - expected) / sqrt(expected), which favours neither the rare nor the frequent; pairs seen fewer than three times are left out.
  """
  n, size = len(survey), survey.size
  present = np.unique(np.arange(n)[:, None] * size + survey.codes.reshape(n, -1).astype(np.int64))
  images = sparse.csr_matrix((np.ones(len(present), np.float32), (present // size, present % size)), (n, size))
  often = np.asarray(images.sum(0)).ravel()
  codes, ratios = np.full((size, count), -1), np.zeros((size, count), np.float32)
  columns, rows = images.tocsc(), images
  for begin in range(0, size, 256):
    seen = np.asarray((columns[:, begin : begin + 256].T @ rows).todense())
    expected = often[begin : begin + 256, None] * often[None] / n
    score = np.where(seen >= 3, (seen - expected) / np.sqrt(np.maximum(expected, 1e-9)), 0)
    score[np.arange(len(score)), begin + np.arange(len(score))] = 0  # itself
    best = np.argsort(-score, 1)[:, :count]
    value = np.take_along_axis(score, best, 1)
    width = best.shape[1]
    codes[begin : begin + 256, :width] = np.where(value > 0, best, -1)
    ratio = np.take_along_axis(seen / np.maximum(expected, 1e-9), best, 1)
    ratios[begin : begin + 256, :width] = np.where(value > 0, ratio, 0)
  return codes, ratios


def nearest(embedding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """(the codes [K, count] whose vectors are nearest to a code's, without itself, -1 where there are no more; their closeness: 1 less half
  the squared distance, which is the cosine of vectors of length 1)."""
  size, squares = len(embedding), (embedding * embedding).sum(1)
  codes, closeness = np.full((size, count), -1), np.zeros((size, count), np.float32)
  for begin in range(0, size, 1024):
    rows = slice(begin, begin + 1024)
    close = 1 + embedding[rows] @ embedding.T - (squares[rows, None] + squares) / 2
    close[np.arange(len(close)), begin + np.arange(len(close))] = -np.inf
    best = np.argsort(-close, 1)[:, : min(count, size - 1)]
    codes[rows, : best.shape[1]] = best
    closeness[rows, : best.shape[1]] = np.take_along_axis(close, best, 1)
  return codes, closeness


def contingency(a: Survey, b: Survey) -> sparse.csr_matrix:
  """How many patches have each pair of codes, [Ka, Kb]. Raises UserError if the two are not of the same patches."""
  if a.codes.shape != b.codes.shape:
    raise UserError(
      f'the two tokenizers see {a.codes.shape[1]} x {a.codes.shape[2]} and {b.codes.shape[1]} x {b.codes.shape[2]} patches of '
      f'{len(a):,} and {len(b):,} images: only equal grids over the same images can be compared, patch by patch.'
    )
  if not np.array_equal(a.records, b.records):
    raise UserError(
      'the two tokenizers did not read the same images: some decode for one of them only. Give both the same data.channels and value_range.'
    )
  ones = np.ones(a.codes.size)
  return sparse.csr_matrix((ones, (a.codes.reshape(-1), b.codes.reshape(-1))), (a.size, b.size))


def agreement(joint: sparse.csr_matrix) -> dict[str, float]:
  """Mutual information of two tokenizers' codes in bits, both entropies, and the information over the mean of the entropies."""
  a, b = (entropy(np.asarray(joint.sum(axis)).ravel()) for axis in (1, 0))
  information = float(a + b - entropy(joint.data))
  return dict(information=information, entropy_a=float(a), entropy_b=float(b), normalized=2 * information / max(float(a + b), 1e-12))
