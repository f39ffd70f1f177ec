"""The explorer: a static site that shows a codebook, made of plain files that a browser opens from disk.

What it writes into a folder (`OUT`), all read by site/explorer.js:

  index.html  explorer.css  explorer.js
  data/summary.js            every code's figures, the names of the images, where each tokenizer came from
  data/compare.js            how the codes of two tokenizers correspond, where there are two
  data/basis.npz             what turns teacher features into the short ones of looks/; for images that are added later
  a/cards/000.jpg            64 codes in order of usage: a row of small patches each (b/ is the second tokenizer)
  a/details/000.jpg          the same codes with more patches, and more of what surrounds them
  a/means/000.png            their mean patch, and what a pixel decoder draws for them
  a/codes/000.js             their typical patches, heat map, neighbours, classes, images
  images/00000.jpg           an image; images/codes/000.js the codes of 50; images/looks/00000.js its features and attention
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitv2_jax.downstream import survey as surveys
from beitv2_jax.downstream.survey import Survey
from beitv2_jax.errors import UserError
from beitv2_jax.pictures.explorer_looks import Basis, Look, write_look, write_looks
from beitv2_jax.pictures.site_data import packed, read, rounded, unpacked, write
from beitv2_jax.progress import bar

SITE = Path(__file__).parent / 'site'
BLOCK = 64  # codes a sheet
IMAGE_BLOCK = 50  # images whose codes share a file
CELLS, WINDOW, DETAIL = 8, 5, 80  # typical patches of a code; patches that a picture of one is wide; and its pixels
CARD_CELLS, CARD_WINDOW, CARD = 4, 3, 48  # the same in a card
MEAN = 32
GREY = 128  # where there is no image


@dataclasses.dataclass(frozen=True)
class Book:
  """One tokenizer's codebook over a set of images. `faces` is float [K, patch, patch, 3] in [0, 1], NaN where a code does not occur."""

  name: str
  survey: Survey
  embedding: np.ndarray  # [K, C], rows of length 1 unless they are a grid (fsq)
  faces: np.ndarray | None = None


def build(out: Path, books: list[Book], images: Callable[[np.ndarray], Any], look: Look | None, about: dict[str, Any], shown: int) -> Path:
  """Writes the site of one or two tokenizers over the same images into `out`, and returns its index.html.

  Args:
    images: places among the surveyed images, rising, → an iterator of uint8 images [h, w, 3], one each.
    look: for what is drawn over the shown images; None leaves that out.
    about: `source`, `names` of the surveyed images, and whatever else site/explorer.js shows under About.
    shown: at most so many images can be opened, evenly spread over all.
  """
  check_folder(out)
  first = books[0].survey
  chosen = np.unique(np.linspace(0, len(first) - 1, min(shown, len(first))).round().astype(int))
  out.mkdir(parents=True, exist_ok=True)
  for folder in (
    'data',
    'images/codes',
    'images/looks',
    *(f'{key}/{kind}' for key in 'ab' for kind in ('cards', 'details', 'means', 'codes')),
  ):
    shutil.rmtree(out / folder, ignore_errors=True)
  for name in ('index.html', 'explorer.css', 'explorer.js'):
    shutil.copyfile(SITE / name, out / name)
  (out / 'data').mkdir()
  (out / 'images' / 'codes').mkdir(parents=True)
  typical = [surveys.typical(book.survey, CELLS) for book in books]
  with tempfile.TemporaryDirectory(dir=out) as temporary:
    crops = [Crops(Path(temporary) / f'{i}.crops', book.survey, places) for i, (book, places) in enumerate(zip(books, typical))]
    save_images(out, images, chosen, crops)
    described = [write_book(out, key, book, places, crop, chosen) for key, book, places, crop in zip('ab', books, typical, crops)]
  basis = write_looks(out, images, chosen, look) if look else None
  for begin in range(0, len(chosen), IMAGE_BLOCK):
    write_codes(out, begin, {key: book.survey.codes[chosen[begin : begin + IMAGE_BLOCK]] for key, book in zip('ab', books)})
  if len(books) == 2:
    write(out / 'data' / 'compare.js', 'compare', compare(*books))
  names = about.pop('names')
  summary = about | dict(
    surveyed=len(first),
    images=len(chosen),
    names=[names[i] for i in chosen],
    labels=None if first.labels is None else [int(first.labels[i]) for i in chosen],
    classes=first.classes if first.labels is not None else None,
    grid=list(first.codes.shape[1:]),
    image_block=IMAGE_BLOCK,
    block=BLOCK,
    cells=dict(count=CELLS, window=WINDOW, card_count=CARD_CELLS, card_window=CARD_WINDOW, card=CARD),
    books=described,
    look=None
    if look is None or basis is None
    else dict(target=look.target_is, features_from=look.features_from, dimensions=basis.target.shape[1], error=float(basis.error)),
  )
  write(out / 'data' / 'summary.js', 'summary', summary)
  return out / 'index.html'


def check_folder(out: Path) -> None:
  """Raises UserError if `out` holds something else than an explorer: making one anew replaces what is there."""
  page = out / 'index.html'
  ours = page.is_file() and b'<title>Codebook explorer</title>' in page.read_bytes()
  if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not ours)):
    raise UserError(f'--out {out} is not empty and is no explorer: give a new folder.')


def add_images(out: Path, names: list[str], images: np.ndarray, codes: dict[str, np.ndarray], look: Look | None) -> int:
  """Puts images uint8 [b, h, w, 3] with their codes {book: [b, Gh, Gw]} into a site, to be looked at: figures of codes stay as they
  are. Returns the number of the first. Raises UserError if there is no such site."""
  summary = read_summary(out)
  if set(codes) != {book['key'] for book in summary['books']} or any(list(c.shape[1:]) != summary['grid'] for c in codes.values()):
    raise UserError(f'the site in {out} was made with other tokenizers: give the same --from and --compare.')
  start = summary['images']
  basis = Basis.load(out / 'data' / 'basis.npz') if look and summary['look'] else None
  for i, image in enumerate(images):
    save_jpeg(image, image_path(out, start + i))
    if basis and look:
      write_look(out, start + i, image[None], look, basis)
  begin = start // IMAGE_BLOCK * IMAGE_BLOCK
  if begin < start:  # the last block has room
    kept = read_codes(out, begin, summary['grid'])
    codes = {key: np.concatenate([kept[key], c]) for key, c in codes.items()}
  for i in range(0, start + len(images) - begin, IMAGE_BLOCK):
    write_codes(out, begin + i, {key: c[i : i + IMAGE_BLOCK] for key, c in codes.items()})
  summary['names'] += names
  if summary['labels'] is not None:
    summary['labels'] += [-1] * len(images)
  summary['added'] = [*summary.get('added', []), *range(start, start + len(images))]
  summary['images'] += len(images)
  write(out / 'data' / 'summary.js', 'summary', summary)
  return start


def read_summary(out: Path) -> dict[str, Any]:
  try:
    return read(out / 'data' / 'summary.js')
  except (OSError, ValueError) as e:
    raise UserError(
      f'no explorer in {out}: make one first, python -m beitv2_jax explore --from TOKENIZER --data SOURCE --out {out}.'
    ) from e


def image_path(out: Path, number: int) -> Path:
  return out / 'images' / f'{number:05d}.jpg'


def save_jpeg(image: np.ndarray, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path, quality=85)


class Crops:
  """The surroundings of each code's typical patches, uint8 [codes in order of usage, CELLS, DETAIL, DETAIL, 3], in a file."""

  def __init__(self, path: Path, survey: Survey, places: np.ndarray):
    counts = surveys.usage(survey)
    self.order = np.argsort(-counts, kind='stable')[: int((counts > 0).sum())]
    self.places = places[self.order]
    self.pixels = np.memmap(path, np.uint8, 'w+', shape=(len(self.order), CELLS, DETAIL, DETAIL, 3))
    self.pixels[:] = GREY
    self.grid = survey.codes.shape[1:]
    rows, cells = np.nonzero(self.places[..., 0] >= 0)
    images = self.places[rows, cells, 0]
    order = np.argsort(images, kind='stable')
    self.rows, self.cells, self.images = rows[order], cells[order], images[order]

  def take(self, place: int, image: np.ndarray) -> None:
    """Cuts out what is wanted of image number `place`; beyond its border all is grey."""
    begin, end = np.searchsorted(self.images, [place, place + 1])
    if begin == end:
      return
    patch = image.shape[0] // self.grid[0]
    margin = WINDOW // 2 * patch
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=GREY)
    for row, cell in zip(self.rows[begin:end], self.cells[begin:end]):
      top, left = self.places[row, cell, 1:] * patch
      window = Image.fromarray(padded[top : top + WINDOW * patch, left : left + WINDOW * patch])
      how = Image.Resampling.NEAREST if patch < DETAIL // WINDOW else Image.Resampling.BICUBIC
      self.pixels[row, cell] = np.asarray(window.resize((DETAIL, DETAIL), how))


def save_images(out: Path, images: Callable[[np.ndarray], Any], chosen: np.ndarray, crops: list[Crops]) -> None:
  """One pass over the images that are shown or have typical patches."""
  numbers = {int(place): number for number, place in enumerate(chosen)}
  wanted = np.unique(np.concatenate([chosen, *(crop.images for crop in crops)]))
  for place, image in zip(wanted, bar(images(wanted), 'images', len(wanted), 'pictures'), strict=True):
    if place in numbers:
      save_jpeg(image, image_path(out, numbers[place]))
    for crop in crops:
      crop.take(int(place), image)


def write_book(out: Path, key: str, book: Book, places: np.ndarray, crops: Crops, chosen: np.ndarray) -> dict[str, Any]:
  """Sheets and details of one tokenizer; returns what summary.js says of it."""
  survey, order = book.survey, crops.order
  counts, where = surveys.usage(survey), surveys.positions(survey)
  classes = surveys.class_counts(survey) if survey.labels is not None else None
  details = dict(
    nearest=surveys.nearest(book.embedding, 8), together=surveys.together(survey, 8), classes=classes, places=places, where=where,
    closeness=survey.closeness, images=images_with(survey, chosen), number={int(place): number for number, place in enumerate(chosen)},
  )  # fmt: skip
  for begin in range(0, len(order), BLOCK):
    block, codes = begin // BLOCK, order[begin : begin + BLOCK]
    write_sheets(out / key, block, codes, crops.pixels[begin : begin + BLOCK], book)
    write(out / key / 'codes' / f'{block:03d}.js', f'{key}/codes/{block}', {int(c): describe(int(c), details) for c in codes})
  share = counts / counts.sum()
  measure = 'cosine' if np.allclose(np.linalg.norm(book.embedding, axis=1), 1, atol=1e-3) else 'closeness'
  found = (places[:, :CARD_CELLS, 0] >= 0).sum(1)  # typical patches of a code that a card shows
  summary = dict(
    key=key, name=book.name, measure=measure, size=survey.size, used=len(order), patches=int(counts.sum()), order=order.tolist(), counts=counts.tolist(),
    perplexity=float(2 ** surveys.entropy(share)), spread=rounded(surveys.spread(where)), faces=book.faces is not None,
    map=rounded(project(book.embedding[order])), few={int(code): int(found[code]) for code in order if found[code] < CARD_CELLS},
  )  # fmt: skip
  if classes is not None:
    purity = surveys.purity(classes)
    summary |= dict(purity=rounded(purity), dominant=classes.argmax(1).tolist(), mean_purity=float((purity * share).sum()))
  return summary


def write_sheets(folder: Path, block: int, codes: np.ndarray, crops: np.ndarray, book: Book) -> None:
  """Three pictures of up to BLOCK codes, a row each."""
  rows, faces = len(codes), book.faces is not None
  detail = crops.transpose(0, 2, 1, 3, 4).reshape(rows * DETAIL, CELLS * DETAIL, 3)
  save_jpeg(detail, folder / 'details' / f'{block:03d}.jpg')
  edge = (WINDOW - CARD_WINDOW) // 2 * DETAIL // WINDOW
  card = Image.new('RGB', ((CARD_CELLS + faces) * CARD, rows * CARD))
  means = Image.new('RGB', ((1 + faces) * MEAN, rows * MEAN))
  for row, code in enumerate(codes):
    pictures = [crops[row, cell, edge : DETAIL - edge, edge : DETAIL - edge] for cell in range(CARD_CELLS)]
    small = [as_picture(book.survey.mean_patches[code])] + ([as_picture(book.faces[code])] if book.faces is not None else [])
    for cell, picture in enumerate(pictures + small[1:]):
      card.paste(Image.fromarray(picture).resize((CARD, CARD), Image.Resampling.BICUBIC), (cell * CARD, row * CARD))
    for cell, picture in enumerate(small):
      means.paste(Image.fromarray(picture).resize((MEAN, MEAN), Image.Resampling.BICUBIC), (cell * MEAN, row * MEAN))
  save_jpeg(np.asarray(card), folder / 'cards' / f'{block:03d}.jpg')
  (folder / 'means').mkdir(exist_ok=True)
  means.save(folder / 'means' / f'{block:03d}.png')


def as_picture(patch: np.ndarray) -> np.ndarray:
  return np.rint(255 * np.clip(np.nan_to_num(patch, nan=0.5), 0, 1)).astype(np.uint8)


def images_with(survey: Survey, chosen: np.ndarray, count: int = 24) -> dict[int, list]:
  """{code: [[number of a shown image, places of the code in it], ...]}, the images with most of it first."""
  found: dict[int, list] = {}
  for number, place in enumerate(chosen):
    flat = survey.codes[place].reshape(-1)
    order = np.argsort(flat, kind='stable')
    codes, begins = np.unique(flat[order], return_index=True)
    for code, cells in zip(codes, np.split(order, begins[1:])):
      found.setdefault(int(code), []).append([number, cells.tolist()])
  return {code: sorted(images, key=lambda x: -len(x[1]))[:count] for code, images in found.items()}


def describe(code: int, details: dict[str, Any]) -> dict[str, Any]:
  """What codes/NNN.js says of one code."""
  typical = [
    [details['number'].get(int(i), -1), int(r), int(c), round(float(details['closeness'][i, r, c]), 3)]
    for i, r, c in details['places'][code]
    if i >= 0
  ]
  heat = details['where'][code]
  pairs = lambda name: [[int(c), round(float(v), 3)] for c, v in zip(*(x[code] for x in details[name])) if c >= 0]
  out = dict(
    typical=typical,
    heat=packed(np.rint(255 * heat / max(heat.max(), 1)).astype(np.uint8)),
    most=int(heat.max()),
    nearest=pairs('nearest'),
    together=pairs('together'),
    images=details['images'].get(code, []),
  )
  if details['classes'] is not None:
    counts = details['classes'][code]
    top = np.argsort(-counts, kind='stable')[:6]
    out['classes'] = [[int(c), round(float(counts[c] / counts.sum()), 4)] for c in top if counts[c]]
  return out


def project(vectors: np.ndarray) -> np.ndarray:
  """Unit vectors [k, C] in two dimensions within [0, 1], by t-SNE (scikit-learn)."""
  if len(vectors) < 4:
    return np.stack([np.linspace(0.2, 0.8, len(vectors)), np.full(len(vectors), 0.5)], 1)
  from sklearn.manifold import TSNE

  places = TSNE(perplexity=min(30, (len(vectors) - 1) / 3), init='pca', random_state=0, n_jobs=-1).fit_transform(vectors)
  low, high = places.min(0), places.max(0)
  return (places - low) / np.maximum(high - low, 1e-9)


def compare(a: Book, b: Book) -> dict[str, Any]:
  """What compare.js says: how far two tokenizers' codes tell of each other, and which go together."""
  joint = surveys.contingency(a.survey, b.survey)

  def matches(table):
    """{code: [[other code, share of this code's patches that have it], ...]}, three at most."""
    table, out = table.tocsr(), {}
    for code in np.flatnonzero(np.diff(table.indptr)):
      begin, end = table.indptr[code : code + 2]
      counts, others = table.data[begin:end], table.indices[begin:end]
      best = np.argsort(-counts, kind='stable')[:3]
      out[int(code)] = [[int(others[i]), round(float(counts[i] / counts.sum()), 3)] for i in best]
    return out

  return surveys.agreement(joint) | dict(a=matches(joint), b=matches(joint.T))


def write_codes(out: Path, begin: int, codes: dict[str, np.ndarray]) -> None:
  """The codes of up to IMAGE_BLOCK images from number `begin` on, in four bytes each."""
  value = {key: packed(c.astype('<u4')) for key, c in codes.items()}
  write(out / 'images' / 'codes' / f'{begin // IMAGE_BLOCK:03d}.js', f'images/{begin // IMAGE_BLOCK}', value)


def read_codes(out: Path, begin: int, grid: list[int]) -> dict[str, np.ndarray]:
  value = read(out / 'images' / 'codes' / f'{begin // IMAGE_BLOCK:03d}.js')
  return {key: unpacked(c, '<u4').reshape(-1, *grid).astype(np.int32) for key, c in value.items()}


def size_on_disk(out: Path) -> int:
  return sum(p.stat().st_size for p in out.rglob('*') if p.is_file())
