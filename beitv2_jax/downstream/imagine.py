"""What codes look like: the face of a code, an image as the codebook sees it, and what a pretrained model imagines behind a mask."""

import numpy as np

from beitv2_jax.downstream import trained
from beitv2_jax.errors import UserError


def faces(pixels: trained.Model, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What the decoder draws for each code, the mean over where it occurs: as `mean_patches` gives it, NaN for codes that don't occur.

  An image of one code alone is like none that the decoder has seen, and what it draws there says little.
  """
  drawn = trained.in_batches(pixels.pixels, codes, batch=min(32, len(codes)))
  return mean_patches(np.rint(255 * drawn), codes, pixels.config.model.codes)


def mean_patches(images: np.ndarray, codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """(mean of the patches that have each code, float [K, patch, patch, 3] in [0, 1] and NaN for none; how many there are [K]).

  images: [B, h, w, 3] from 0 to 255; codes: int [B, Gh, Gw].
  """
  b, rows, cols = codes.shape
  patch = images.shape[1] // rows
  patches = images.reshape(b, rows, patch, cols, patch, 3).swapaxes(2, 3).reshape(-1, patch * patch * 3) / 255
  flat = codes.reshape(-1)
  counts, sums = np.bincount(flat, minlength=size), np.zeros((size, patches.shape[1]))
  np.add.at(sums, flat, patches)
  with np.errstate(invalid='ignore'):
    return (sums / counts[:, None]).reshape(size, patch, patch, 3).astype(np.float32), counts


def as_codes(pixels: trained.Model, images: np.ndarray, batch: int = 32) -> np.ndarray:
  """Images as the codebook sees them, drawn from their codes alone: float [B, h, w, 3] in [0, 1]."""
  return trained.in_batches(lambda x: pixels.pixels(pixels.tokens(x)), images, batch=min(batch, len(images)))


def behind_mask(
  pretrained: trained.Model, pixels: trained.Model, images: np.ndarray, masks: np.ndarray, steps: int = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
  """What a pretrained model imagines where `masks` [B, Gh, Gw] is True.

  One (codes [B, Gh, Gw], images uint8 [B, h, w, 3]) a step. At each step the patches it is most certain of are drawn into the image by the
  pixel decoder, and count as seen from then on; with one step all are predicted at once. Raises UserError if the two were made with
  tokenizers whose codes are not the same.
  """
  if not trained.same_codebook(pretrained.tokenizer, pixels):
    raise UserError('the pretrained model and the pixel decoder were made with different tokenizers: their codes do not mean the same.')
  if pretrained.grid != pixels.grid:
    raise UserError(f'the pretrained model has {pretrained.grid} patches, the pixel decoder {pixels.grid}.')
  masks, left, out = np.asarray(masks, bool), np.asarray(masks, bool).copy(), []
  patch, images = pixels.config.model.patch_size, np.array(images)
  # The tokenizer looks at the whole image for each code: codes of what is seen must not tell of what is hidden.
  codes = np.array(pixels.tokens(np.where(masks.repeat(patch, 1).repeat(patch, 2)[..., None], 128, images).astype(np.uint8)))
  for step in range(steps):
    logits = np.asarray(pretrained.masked_logits(images, left)[-1], np.float32).reshape(*left.shape, -1)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    certain = np.where(left, probabilities.max(-1) / probabilities.sum(-1), -1.0).reshape(len(left), -1)
    count = -(-left.reshape(len(left), -1).sum(1) // (steps - step))
    rank = np.argsort(np.argsort(-certain, 1), 1)
    chosen = (rank < count[:, None]).reshape(left.shape) & left
    codes = np.where(chosen, logits.argmax(-1), codes)
    shown = np.where(left & ~chosen, 0, codes)  # what is hidden still is not told; any code will do there
    drawn = np.asarray(pixels.pixels(shown))
    where = chosen.repeat(patch, 1).repeat(patch, 2)[..., None]
    images = np.where(where, np.rint(255 * drawn), images).astype(np.uint8)
    left &= ~chosen
    hidden = left.repeat(patch, 1).repeat(patch, 2)[..., None]
    out.append((np.where(masks & ~left, codes, -1), np.where(hidden, 128, images).astype(np.uint8)))
  return out
