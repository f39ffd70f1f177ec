"""Augmentation on the device, on whole batches inside the jitted step: colour jitter, mixup and cutmix, random erasing."""

import math

import jax
import jax.numpy as jnp


def _grey(x: jax.Array) -> jax.Array:
  """Pillow's 'L', in whole numbers: [B, h, w, 3] → [B, h, w, 1]."""
  return jnp.floor((x * jnp.array([19595.0, 38470.0, 7471.0])).sum(-1, keepdims=True) / 65536 + 0.5)


def color_jitter(images: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
  """Pillow's brightness, contrast and saturation on uint8 images [B, h, w, 3], by `factors` [B, 3], in each image's `order` [B, 3].

  The same arithmetic as ImageEnhance; contrast pivots on the mean of what it is given, so on a crop it is not what it is on
  the whole image.
  """
  x = images.astype(jnp.float32)
  for i in range(3):
    grey = _grey(x)
    pivots = jnp.stack([jnp.zeros_like(grey), jnp.broadcast_to(jnp.floor(grey.mean((1, 2), keepdims=True) + 0.5), grey.shape), grey], 1)
    which = order[:, i]
    pivot = jnp.take_along_axis(pivots, which[:, None, None, None, None], 1)[:, 0]
    factor = jnp.take_along_axis(factors, which[:, None], 1)[:, :, None, None]
    x = jnp.floor(jnp.clip(pivot + factor * (x - pivot), 0, 255))
  return x.astype(jnp.uint8)


def mix(
  key: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float, switch: float = 0.5
) -> tuple[jax.Array, jax.Array]:
  """Mixup or cutmix of the batch with its reverse, one draw a batch (timm's batch mode).

  Args:
    images: [B, h, w, 3] float. targets: [B, K], rows that sum to 1.
    mixup, cutmix: parameters of the two beta distributions, 0 for never; with both, cutmix has probability `switch`.
  """
  if not mixup and not cutmix:
    return images, targets
  which, ratio, centre = jax.random.split(key, 3)
  h, w = images.shape[1:3]
  cut = jax.random.bernoulli(which, switch) if mixup and cutmix else bool(cutmix)
  lam_mix, lam_cut = (jax.random.beta(ratio, a or 1.0, a or 1.0) for a in (mixup, cutmix))
  # The box has a share 1 - lambda of the area before it is cut at the border.
  side = jnp.sqrt(1 - lam_cut)
  bounds = []
  for size, c in zip((h, w), jax.random.uniform(centre, (2,))):
    middle, half = jnp.floor(c * size), jnp.floor(side * size) // 2
    bounds.append((jnp.clip(middle - half, 0, size), jnp.clip(middle + half, 0, size)))
  inside = [(jnp.arange(n) >= low) & (jnp.arange(n) < high) for n, (low, high) in zip((h, w), bounds)]
  box = (inside[0][:, None] & inside[1][None])[None, :, :, None]
  weight = jnp.where(cut, jnp.where(box, 0.0, 1.0), lam_mix)
  lam = jnp.where(cut, 1 - box.mean(), lam_mix)
  return images * weight + images[::-1] * (1 - weight), targets * lam + targets[::-1] * (1 - lam)


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """[B] → [B, K]: 1 - s + s/K on the label, s/K elsewhere."""
  return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def random_erasing(key: jax.Array, images: jax.Array, probability: float, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)) -> jax.Array:
  """One box of N(0, 1) noise in a share `probability` of normalised images [B, h, w, 3]; ten tries for a box that fits."""
  if not probability:
    return images
  b, h, w, _ = images.shape
  apply, sizes, ratios, places, noise = jax.random.split(key, 5)
  areas = jax.random.uniform(sizes, (b, 10), minval=area[0], maxval=area[1]) * h * w
  ratios = jnp.exp(jax.random.uniform(ratios, (b, 10), minval=math.log(aspect[0]), maxval=math.log(aspect[1])))
  heights, widths = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
  fits = (heights < h) & (widths < w)
  first = fits.argmax(1)
  height, width = (jnp.take_along_axis(x, first[:, None], 1) for x in (heights, widths))
  u = jax.random.uniform(places, (b, 2))
  top, left = jnp.floor(u[:, :1] * (h - height + 1)), jnp.floor(u[:, 1:] * (w - width + 1))
  rows, cols = jnp.arange(h)[None], jnp.arange(w)[None]
  box = ((rows >= top) & (rows < top + height))[:, :, None] & ((cols >= left) & (cols < left + width))[:, None]
  erased = box & (jax.random.bernoulli(apply, probability, (b,)) & fits.any(1))[:, None, None]
  return jnp.where(erased[..., None], jax.random.normal(noise, images.shape, images.dtype), images)
