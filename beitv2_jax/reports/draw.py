"""Pictures that explain a model: which patches share a code, codes over images, masks with predicted codes, samples of a run."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

# Dark blue over green to yellow, even in lightness, and readable without seeing red and green apart: six points of matplotlib's viridis.
HEAT = np.array([(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)], float)


def heat(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
  """[h, w] → colours, uint8 [h, w, 3], from `low` (the smallest value) to `high` (the largest)."""
  low = values.min() if low is None else low
  high = values.max() if high is None else high
  place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
  left = np.minimum(place.astype(int), len(HEAT) - 2)
  share = (place - left)[..., None]
  return np.rint(HEAT[left] * (1 - share) + HEAT[left + 1] * share).astype(np.uint8)


def patches_of(images: np.ndarray, patch: int) -> np.ndarray:
  """uint8 [B, h, w, 3] → [B, Gh, Gw, patch, patch, 3]."""
  b, h, w, c = images.shape
  return images.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)


def gallery(
  images: np.ndarray, codes: np.ndarray, size: int, columns: int = 10, codes_shown: int = 64, across: int = 4, scale: int = 3
) -> Image.Image:
  """One strip for each of the `codes_shown` most used codes: up to `columns` patches that have it, `across` strips a line.

  images: uint8 [B, h, w, 3]; codes: int [B, Gh, Gw]; size: number of codes.
  """
  patch = images.shape[1] // codes.shape[1]
  tiles, flat = patches_of(images, patch).reshape(-1, patch, patch, 3), codes.reshape(-1)
  counts = np.bincount(flat, minlength=size)
  order = [c for c in np.argsort(-counts, kind='stable')[:codes_shown] if counts[c]]
  cell, rng = patch + 1, np.random.default_rng(0)
  strip_width = columns * cell + patch
  sheet = np.full((max(-(-len(order) // across), 1) * (cell + 2), across * strip_width - patch, 3), 255, np.uint8)
  for n, code in enumerate(order):
    y, left = n // across * (cell + 2), n % across * strip_width
    for c, i in enumerate(rng.permutation(np.flatnonzero(flat == code))[:columns]):
      sheet[y : y + patch, left + c * cell : left + c * cell + patch] = tiles[i]
  return _enlarge(sheet, scale)


def palette(size: int) -> np.ndarray:
  """uint8 [size, 3]: one colour a code, neighbours far apart."""
  hues = (np.arange(size) * 0.618034) % 1
  return np.array(
    [[255 * v for v in colorsys.hsv_to_rgb(h, 0.45 + 0.4 * (i % 2), 0.95 - 0.25 * (i % 3))] for i, h in enumerate(hues)], np.uint8
  )


def overlay(image: np.ndarray, codes: np.ndarray, size: int, strength: float = 0.55, where: np.ndarray | None = None) -> np.ndarray:
  """uint8 image [h, w, 3] tinted by the code of each patch (only where `where` [Gh, Gw] is True)."""
  patch = image.shape[0] // codes.shape[0]
  tint = palette(size)[codes].repeat(patch, 0).repeat(patch, 1)
  weight = np.full(codes.shape, strength) if where is None else strength * where
  weight = weight.repeat(patch, 0).repeat(patch, 1)[..., None]
  return (image * (1 - weight) + tint * weight).astype(np.uint8)


def strip(columns: list[list[np.ndarray]], gap: int = 4) -> Image.Image:
  """Images side by side: columns of equal-sized uint8 pictures; small ones are enlarged to about 96 pixels."""
  h, w, _ = columns[0][0].shape
  sheet = np.full((len(columns[0]) * (h + gap), len(columns) * (w + gap), 3), 255, np.uint8)
  for x, column in enumerate(columns):
    for y, picture in enumerate(column):
      sheet[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = picture
  return _enlarge(sheet, max(1, round(96 / w)))


def masked_predictions(images: np.ndarray, masks: np.ndarray, codes: np.ndarray, predicted: np.ndarray, size: int) -> Image.Image:
  """Rows: image; what the model sees; true codes of the masked patches; predicted codes, wrong ones crossed out.

  masks: bool [B, Gh, Gw]; codes, predicted: int [B, Gh, Gw].
  """
  columns = []
  for image, mask, true, guess in zip(images, masks, codes, predicted):
    patch = image.shape[0] // mask.shape[0]
    hidden = np.where(mask.repeat(patch, 0).repeat(patch, 1)[..., None], 128, image).astype(np.uint8)
    told = overlay(hidden, guess, size, 1.0, mask)
    for r, c in np.argwhere(mask & (true != guess)):
      box = told[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
      box[np.eye(patch, dtype=bool) | np.eye(patch, dtype=bool)[::-1]] = 0
    columns.append([image, hidden, overlay(hidden, true, size, 1.0, mask), told])
  return strip(columns)


def faces(drawn: np.ndarray, means: np.ndarray, counts: np.ndarray, shown: int = 64, across: int = 16, scale: int = 3) -> Image.Image:
  """Pairs of what a decoder draws for a code (left) and the mean of its real patches, the `shown` most used codes first.

  drawn, means: float [K, patch, patch, 3] in [0, 1]; counts: [K].
  """
  order = [c for c in np.argsort(-counts, kind='stable')[:shown] if counts[c]]
  patch = drawn.shape[1]
  width, height = 2 * patch + 4, patch + 4
  sheet = np.full((max(-(-len(order) // across), 1) * height, across * width, 3), 255, np.uint8)
  for n, code in enumerate(order):
    y, x = n // across * height, n % across * width
    sheet[y : y + patch, x : x + patch] = to_pixels(drawn[code])
    sheet[y : y + patch, x + patch : x + 2 * patch] = to_pixels(means[code])
  return _enlarge(sheet, scale)


def to_pixels(image: np.ndarray) -> np.ndarray:
  """Floats in [0, 1] → uint8."""
  return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def imagined(images: np.ndarray, masks: np.ndarray, seen_as: np.ndarray, steps: list[np.ndarray]) -> Image.Image:
  """Rows: image; what the model sees; the image as the codebook sees it; then one row a step of what it imagines behind the mask.

  images, and each of `steps`: uint8 [B, h, w, 3]; masks: bool [B, Gh, Gw]; seen_as: float [B, h, w, 3] in [0, 1].
  """
  patch = images.shape[1] // masks.shape[1]
  hidden = np.where(masks.repeat(patch, 1).repeat(patch, 2)[..., None], 128, images).astype(np.uint8)
  return strip([[images[i], hidden[i], to_pixels(seen_as[i]), *(step[i] for step in steps)] for i in range(len(images))])


def _enlarge(sheet: np.ndarray, scale: int) -> Image.Image:
  return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


# What `samples` draws for each kind of stage.
CAPTIONS = dict(
  pretrain='From the top: the image; what the model sees; the codes behind the mask; the codes it predicts, crossed out where wrong.',
  tokenizer="From the top: the image; its codes, one colour each; how far the decoder is from the teacher's features (yellow: far).",
  pixels='From the top: the image; what the decoder draws from its codes alone.',
  classifier='Below each image: the class that is predicted, and in brackets the right one where it is another.',
  segmenter='From the top: the image; the right mask; the predicted one.',
)


def samples(task: str, arrays: dict[str, np.ndarray], names: list[str] | None = None, size: int = 0) -> Image.Image:
  """What a task's `samples` gave, as one picture. `names` are those of classes, `size` is the number of codes."""
  images = arrays['image']
  if task == 'pretrain':
    return masked_predictions(images, arrays['mask'], arrays['codes'], arrays['predicted'], size)
  if task == 'tokenizer':
    patch = images.shape[1] // arrays['codes'].shape[1]
    far = [heat(d, 0, max(float(arrays['distance'].max()), 1e-6)).repeat(patch, 0).repeat(patch, 1) for d in arrays['distance']]
    return strip([[image, overlay(image, codes, size), d] for image, codes, d in zip(images, arrays['codes'], far)])
  if task == 'pixels':
    return strip([[image, to_pixels(drawn)] for image, drawn in zip(images, arrays['drawn'])])
  if task == 'segmenter':
    colors = np.concatenate([palette(255), np.zeros((1, 3), np.uint8)])  # 255 is what no class is
    tinted = lambda image, mask: (0.4 * image + 0.6 * colors[np.clip(mask, 0, 255)]).astype(np.uint8)
    return strip(
      [[image, tinted(image, mask), tinted(image, guess)] for image, mask, guess in zip(images, arrays['mask'], arrays['predicted'])]
    )
  return captioned(images, [told(int(p), int(t), names) for p, t in zip(arrays['predicted'], arrays['label'])])


def told(predicted: int, right: int, names: list[str] | None) -> str:
  name = lambda i: names[i] if names and i < len(names) else str(i)
  return name(predicted) if predicted == right else f'{name(predicted)} ({name(right)})'


def captioned(images: np.ndarray, words: list[str]) -> Image.Image:
  """Images in a row with a line of words below each."""
  row = strip([[image] for image in images])
  page = Image.new('RGB', (row.width, row.height + 14), 'white')
  page.paste(row, (0, 0))
  pen, step = ImageDraw.Draw(page), row.width // len(images)
  for i, text in enumerate(words):
    pen.text((i * step, row.height), text[: max(step // 6, 1)], fill='black')
  return page
