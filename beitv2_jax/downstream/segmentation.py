"""Exact segmentation scores.

Images are resized to the model's short side and looked at through windows, scores are taken at the original size, and mIoU, mean
class accuracy (mAcc) and pixel accuracy (aAcc) come from one confusion matrix over the data set. What happens between the network and
the softmax (upsampling, adding up and averaging overlapping windows, resizing) is linear and separable, so it is two matrices a
window, made on the host: exact at any size.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import scenes
from beitv2_jax.data.decode import Decoded
from beitv2_jax.downstream.trained import in_batches
from beitv2_jax.errors import UserError
from beitv2_jax.models.upernet import linear_weights
from beitv2_jax.progress import bar
from beitv2_jax.tasks import segment
from beitv2_jax.tasks.scores import confusion, segmentation_scores

WINDOWS = 8  # that go through the network at once


def window_starts(length: int, window: int, stride: int) -> list[int]:
  """Where windows begin on an axis: every `stride`, the last one moved back to end at the border."""
  count = max(length - window + stride - 1, 0) // stride + 1
  return [max(min(i * stride, length - window), 0) for i in range(count)]


def axis_matrices(length: int, window: int, cells: int, starts: list[int], out: int) -> np.ndarray:
  """[windows, out, cells]: scores of the windows' cells → their share of each output pixel, along one axis.

  A window's cells are interpolated to its pixels, overlapping windows averaged, and the axis of `length` pixels resized to `out`.
  """
  cover = np.zeros(length, np.float32)
  for s in starts:
    cover[s : s + window] += 1
  resize = linear_weights(length, out) if out != length else np.eye(length, dtype=np.float32)
  up = linear_weights(cells, window)
  return np.stack([resize[:, s : s + window] / cover[s : s + window] @ up[: length - s] for s in starts])


@jax.jit
def _merge(logits, rows, cols):
  """Class probabilities [H, W, K] from the windows' scores [r, c, h, w, K] and the axis matrices [r, H, h], [c, W, w]."""
  x = jnp.einsum('rHh,rchwk->cHwk', rows, logits, precision='highest')
  return jax.nn.softmax(jnp.einsum('cWw,cHwk->HWk', cols, x, precision='highest'))


def _up_to(x: np.ndarray, multiple: int, axis: int = 1) -> np.ndarray:
  """Padded with zeros along an axis, so that few sizes have to be compiled."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % multiple)
  return np.pad(x, pad)


def probabilities(
  logits_of: Callable, image: np.ndarray, size: tuple[int, int], mode: str = 'slide', scale: float = 1.0, flip: bool = False
) -> jax.Array:
  """Class probabilities [H', W', K] of a uint8 image [H, W, 3], H' and W' rounded up to 64.

  Args:
    logits_of: uint8 [n, *size, 3] → scores [n, h, w, K]; `size` is the network's input.
    mode: 'slide' resizes to the short side of `size` times `scale`, which counts as 1 below 1, for a window has nothing to see beyond the
      image (so does the official multi-scale test), with a long side within 4 times that, and slides by two thirds of a window;
      'whole' makes the image `size`.
  """
  h, w = image.shape[:2]
  if mode == 'whole':
    there = size
  else:
    scale = max(scale, 1.0)
    there = scenes.fitted_size(h, w, int(4 * min(size) * scale), int(min(size) * scale))
  x = scenes.resized(image, there)
  x = np.ascontiguousarray(x[:, ::-1]) if flip else x
  starts = [window_starts(n, s, max(s * 2 // 3, 1)) for n, s in zip(there, size)]
  windows = [scenes.padded(x[top : top + size[0], left : left + size[1]], size, scenes.FILL) for top in starts[0] for left in starts[1]]
  logits = jnp.asarray(in_batches(logits_of, np.stack(windows), batch=WINDOWS))
  logits = logits.reshape(len(starts[0]), len(starts[1]), *logits.shape[1:])
  rows, cols = (axis_matrices(n, s, cells, first, out) for n, s, cells, first, out in zip(there, size, logits.shape[2:4], starts, (h, w)))
  if flip:
    cols = cols[:, ::-1]
  return _merge(logits, _up_to(rows, 64), _up_to(cols, 64))


def predict(logits_of, image, size, mode='slide', scales=(1.0,), flip=False) -> np.ndarray:
  """The best class of every pixel, int [H, W], from the mean of the probabilities at all scales, and mirrored if `flip`."""
  flips = (False, True) if flip else (False,)
  times = collections.Counter(max(s, 1.0) if mode == 'slide' else 1.0 for s in scales)  # those that come to the same
  total = functools.reduce(jnp.add, [n * probabilities(logits_of, image, size, mode, s, f) for s, n in times.items() for f in flips])
  return np.asarray(total.argmax(-1))[: image.shape[0], : image.shape[1]]


def evaluate(model: Any, source: Any, labels: scenes.Labels, **options: Any) -> dict[str, Any]:
  """Scores of a segmenter (trained.Model) over a `scenes` source, and the number of `images` that decode. `options` go to `predict`."""
  if not hasattr(source, 'mask_names'):
    raise UserError('these images have no masks: give scenes:PATH.')
  decoded, size = Decoded(source, **config_lib.reading(model.config)), config_lib.image_shape(model.config)[:2]
  total, bad = np.zeros((labels.classes, labels.classes), np.int64), 0
  for i in bar(range(len(source)), 'images'):
    record = decoded[i]
    if record['bad']:  # it is the next one, which has its own turn
      bad += 1
      continue
    label = labels(record, None)['mask']
    total += confusion(label, predict(model.logits, record['image'], size, **options), labels.classes)
  if bad == len(source):
    raise UserError('none of the images decodes.')
  return segmentation_scores(total) | dict(images=len(source) - bad)


def labels_of(config: Any, reduce_zero: bool = False) -> scenes.Labels:
  """How mask values are classes: as the segmenter was trained, or for an imported one as `reduce_zero` says."""
  return segment.labels_of(config) if 'labels' in config else scenes.Labels(config.model.classes, reduce_zero)


def check_segmenter(model: Any, where: Any) -> None:
  if model.kind != 'segmenter':
    raise UserError(f'{where} holds a {model.kind} model, not a segmenter.')
