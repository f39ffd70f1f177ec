"""Pictures of where a model looks and of what its features say, one sheet an image."""

import numpy as np
from PIL import Image, ImageDraw

from beitv2_jax.downstream.patch_features import principal_colors, similarity
from beitv2_jax.reports.draw import heat

GAP, LABEL = 8, 16


def sheet(image: np.ndarray, attention: np.ndarray, features: np.ndarray, colors: np.ndarray, patch: tuple[int, int] | None) -> Image.Image:
  """Two lines of named pictures of one image.

  image: uint8 [h, w, 3]; attention: [H, T, T] of one block, [CLS] first; features: [Gh, Gw, D]; colors: uint8 [Gh, Gw, 3];
  patch: (row, column) whose attention and similarity are drawn, besides [CLS]'s attention.
  """
  grid, size = features.shape[:2], image.shape[0] // features.shape[0]
  enlarge = lambda x: x.repeat(size, 0).repeat(size, 1)
  over = lambda values: (0.35 * image + 0.65 * enlarge(heat(values))).astype(np.uint8)
  query = 0 if patch is None else 1 + patch[0] * grid[1] + patch[1]
  where = '[CLS]' if patch is None else f'patch {patch[0]},{patch[1]}'
  seen = attention[:, query, 1:].reshape(-1, *grid)
  first = [('image', _mark(image, patch, size)), ('principal components', enlarge(colors)), (f'{where} attends to', over(seen.mean(0)))]
  if patch is not None:
    first += [('[CLS] attends to', over(attention[:, 0, 1:].mean(0).reshape(grid)))]
    first += [(f'similar to {where}', enlarge(heat(similarity(features, *patch), -1, 1)))]
  return _lay([first, [(f'head {i + 1}', over(head)) for i, head in enumerate(seen)]])


def sheets(
  images: np.ndarray, attention: np.ndarray, features: np.ndarray, patch: tuple[int, int] | None, one_by_one: bool = False
) -> list[Image.Image]:
  """One `sheet` an image. features: [B, Gh, Gw, D]; their colours are made over all images, or `one_by_one`."""
  colors = np.concatenate([principal_colors(f[None]) for f in features]) if one_by_one else principal_colors(features)
  return [sheet(*each, patch) for each in zip(images, attention, features, colors)]


def _mark(image: np.ndarray, patch: tuple[int, int] | None, size: int) -> np.ndarray:
  if patch is None:
    return image
  picture = Image.fromarray(image)
  top, left = patch[0] * size, patch[1] * size
  ImageDraw.Draw(picture).rectangle((left, top, left + size - 1, top + size - 1), outline='red', width=max(size // 8, 1))
  return np.asarray(picture)


def _lay(lines: list[list[tuple[str, np.ndarray]]]) -> Image.Image:
  h, w = lines[0][0][1].shape[:2]
  scale = max(1, 160 // w)
  h, w = h * scale, w * scale
  page = Image.new('RGB', (max(map(len, lines)) * (w + GAP) + GAP, len(lines) * (h + LABEL + GAP) + GAP), 'white')
  draw = ImageDraw.Draw(page)
  for r, line in enumerate(lines):
    for c, (name, picture) in enumerate(line):
      x, y = GAP + c * (w + GAP), GAP + r * (h + LABEL + GAP)
      draw.text((x, y), name, fill='black')
      page.paste(Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST), (x, y + LABEL))
  return page
