"""Exact segmentation scores: python -m beitv2_jax.segmentation --from DIR --data scenes:PATH [--mode slide|whole] [--scales 1.0 ...] [--flip]

Images are resized to the model's short side and looked at through windows, scores are taken at the original size, and mIoU, mean
class accuracy (mAcc) and pixel accuracy (aAcc) come from one confusion matrix over the data set. What happens between the network and
the softmax (upsampling, adding up and averaging overlapping windows, resizing) is linear and separable, so it is two matrices a
window, made on the host: exact at any size.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.data import scenes
from beitv2_jax.errors import UserError, one_line
from beitv2_jax.models.upernet import linear_weights


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """int64 [K, K]: pixels of class (row) predicted as (column); label 255 doesn't count."""
  known = label != scenes.IGNORE
  cells = label[known].astype(np.int64) * classes + predicted[known]
  return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def scores(matrix: np.ndarray) -> dict[str, Any]:
  """mIoU, mAcc and aAcc in % and the IoU of every class (NaN for one that is nowhere) of a confusion matrix [K, K]."""
  hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
  with np.errstate(invalid='ignore', divide='ignore'):
    iou, acc = 100 * hit / (true + predicted - hit), 100 * hit / true
  return dict(miou=float(np.nanmean(iou)), macc=float(np.nanmean(acc)), aacc=float(100 * hit.sum() / max(matrix.sum(), 1e-9)), iou=iou)


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
    mode: 'slide' resizes to the short side of `size` times `scale` (long side within 4 times that) and slides by two thirds of a window;
      'whole' makes the image `size`.
  """
  h, w = image.shape[:2]
  if mode == 'whole':
    there = size
  else:
    there = scenes.fitted_size(h, w, int(4 * min(size) * scale), int(min(size) * scale))
  x = scenes.resized(image, there)
  x = np.ascontiguousarray(x[:, ::-1]) if flip else x
  starts = [window_starts(n, s, max(s * 2 // 3, 1)) for n, s in zip(there, size)]
  windows = [scenes.padded(x[top : top + size[0], left : left + size[1]], size, scenes.FILL) for top in starts[0] for left in starts[1]]
  logits = jnp.concatenate([logits_of(np.stack(windows[i : i + 8])) for i in range(0, len(windows), 8)])
  logits = logits.reshape(len(starts[0]), len(starts[1]), *logits.shape[1:])
  rows, cols = (axis_matrices(n, s, cells, first, out) for n, s, cells, first, out in zip(there, size, logits.shape[2:4], starts, (h, w)))
  if flip:
    cols = cols[:, ::-1]
  return _merge(logits, _up_to(rows, 64), _up_to(cols, 64))


def predict(logits_of, image, size, mode='slide', scales=(1.0,), flip=False) -> np.ndarray:
  """The best class of every pixel, int [H, W], from the mean of the probabilities at all scales, and mirrored if `flip`."""
  flips = (False, True) if flip else (False,)
  total = sum(probabilities(logits_of, image, size, mode, s, f) for s in scales for f in flips)
  return np.asarray(total.argmax(-1))[: image.shape[0], : image.shape[1]]


def evaluate(model: Any, source: Any, labels: scenes.Labels, **how: Any) -> dict[str, Any]:
  """Scores of a segmenter (api.Model) over a `scenes` source. `how` goes to `predict`."""
  from tqdm import tqdm

  from beitv2_jax import config as config_lib
  from beitv2_jax.data.pipeline import Decoded

  decoded, total = Decoded(source), 0
  for i in tqdm(range(len(source)), unit=' images', disable=len(source) < 20):
    record = decoded[i]
    label = labels(record, None)['mask']
    best = predict(model.logits, record['image'], config_lib.image_shape(model.config)[:2], **how)
    total = total + confusion(label, best, labels.classes)
  return scores(total)


@one_line
def main(argv: list[str] | None = None) -> None:
  from beitv2_jax import api
  from beitv2_jax.data import sources
  from beitv2_jax.main import use_compilation_cache
  from beitv2_jax.robustness import model_classes
  from beitv2_jax.tasks import segment

  parser = argparse.ArgumentParser(
    prog='python -m beitv2_jax.segmentation', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--from', dest='source', required=True, help='workdir of a segmenter, or an imported one')
  parser.add_argument('--data', help='scenes:PATH; by default what it was trained on')
  parser.add_argument('--mode', choices=('slide', 'whole'), default='slide')
  parser.add_argument(
    '--scales', type=float, nargs='+', default=[1.0], help='the official multi-scale test: 0.5 0.75 1 1.25 1.5 1.75 with --flip'
  )
  parser.add_argument('--flip', action='store_true')
  parser.add_argument('--reduce-zero', action='store_true', help='mask value 0 is no class, 1 is class 0 (ADE20K), for imported models')
  parser.add_argument('--json', type=Path, help='also write the scores there')
  args = parser.parse_args(argv)
  use_compilation_cache()
  model = api.load(args.source)
  if model.kind != 'segmenter':
    raise UserError(f'{args.source} holds a {model.kind} model, not a segmenter.')
  c = model.config
  if not (args.data or c.data.source.startswith('scenes:')):
    raise UserError('give --data scenes:PATH.')
  labels = segment.labels_of(c) if 'labels' in c else scenes.Labels(c.model.classes, args.reduce_zero)
  result = evaluate(
    model,
    sources.make(args.data or c.data.source, 'eval', holdout=c.data.holdout),
    labels,
    mode=args.mode,
    scales=args.scales,
    flip=args.flip,
  )
  names = model_classes(c)
  for name, iou in zip(names, result['iou']):
    print(f'{name:24s} IoU {iou:6.2f}' if np.isfinite(iou) else f'{name:24s} IoU  nowhere')
  print(f'mIoU {result["miou"]:.2f}  mAcc {result["macc"]:.2f}  aAcc {result["aacc"]:.2f}')
  if args.json:
    args.json.write_text(json.dumps(result | dict(iou=dict(zip(names, result['iou'].tolist()))), indent=2))


if __name__ == '__main__':
  sys.exit(main())
