"""Image files become pixels, and broken ones are stepped over: named in the log, counted, and an error when there are too many."""

import functools
import io
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from absl import logging
from PIL import Image

from beitv2_jax.errors import RunFailed, UserError

try:
  import pillow_heif  # ty: ignore

  pillow_heif.register_heif_opener()
except ImportError:  # HEIC is for those who install it
  pass
try:
  import tifffile
except ImportError:  # more than four bands are too
  tifffile: Any = None

UNDECODABLE = (
  OSError,
  ValueError,
  SyntaxError,
  EOFError,
  MemoryError,
  Image.DecompressionBombError,
)  # what `image` raises for a broken file
# Pillow knows others, some of which run programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000', 'HEIF')
TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # little and big endian; the last two are BigTIFF
MAX_PIXELS = 178_956_970  # Pillow's own limit: what claims more is an attack, or has to be cut up first
MAX_NEIGHBOURS = 16
LARGEST_CLASS = 2**16 - 1


def image(data: bytes | np.ndarray, value_range: Sequence[float] = (), channels: Sequence[int] = ()) -> np.ndarray:
  """Encoded bytes (or an array, as it is) → uint8 [h, w, 3], as Pillow's convert('RGB') gives. Raises one of UNDECODABLE.

  Args:
    value_range: (low, high), which become 0 and 255: for images of 16 bits or floats, which need it.
    channels: three bands by index, from 0, of images that have others than red, green and blue. One may be named several times.

  EXIF orientation is ignored, as in the official code; of an animation the first picture is taken.
  """
  if isinstance(data, np.ndarray):
    return data
  if data[:2] == b'\xff\xd8' and not channels:
    try:
      height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # Pillow may be more lenient, and has the last word
      colours = ''
    else:
      _check_size(int(width), int(height))
    if colours in ('YCbCr', 'Gray'):
      try:
        return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)  # these two are Pillow's choices
      except ValueError:
        pass
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # palettes with transparency, broken EXIF
      if channels and data[:4] in TIFF:
        return _bands(_tiff(data), value_range, channels)
      opened = Image.open(io.BytesIO(data), formats=_formats())
      _check_size(*opened.size)
      if not channels and opened.mode not in ('F', 'I') and not opened.mode.startswith('I;16'):
        return np.asarray(opened.convert('RGB'))
      return _bands(np.asarray(opened), value_range, channels)
  except Image.UnidentifiedImageError as e:
    raise ValueError(f'no image of a known kind ({", ".join(_formats())})') from e
  except UNDECODABLE:
    raise
  except Exception as e:  # Pillow's readers fail in many ways, such as AVIF's with RuntimeError
    raise ValueError(f'{type(e).__name__}: {e}') from e


def mask(data: bytes | np.ndarray) -> np.ndarray:
  """PNG of one channel or with a palette → its numbers, int [h, w]. Raises ValueError for colour images."""
  if isinstance(data, np.ndarray):
    return data
  opened = Image.open(io.BytesIO(data), formats=_formats())
  _check_size(*opened.size)
  numbers = np.array(opened)
  if numbers.ndim != 2:
    raise ValueError(f'the mask has mode {opened.mode}; a mask is one channel of class numbers, or a palette image')
  if numbers.dtype == bool:  # one bit a pixel
    return numbers.astype(np.int32)
  if not np.issubdtype(numbers.dtype, np.integer) or numbers.min(initial=0) < 0 or numbers.max(initial=0) > LARGEST_CLASS:
    raise ValueError(f'the mask has mode {opened.mode}; its values must be whole numbers from 0 to {LARGEST_CLASS}')
  return numbers.astype(np.int32)


def full_ade20k_mask(data: bytes) -> np.ndarray:
  """NAME_seg.png of ADE20K's full set, a colour image → class numbers, int32 [h, w]; 0 is none. Its own `loadAde20K`: R / 10 * 256 + G."""
  colours = image(data).astype(np.int32)
  return colours[..., 0] // 10 * 256 + colours[..., 1]


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of FORMATS that this Pillow reads."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise ValueError(f'{width} x {height} pixels, more than the {MAX_PIXELS:,} that are read')


def _tiff(data: bytes) -> np.ndarray:
  """A TIFF of any number of bands → [h, w] or [h, w, bands]; Pillow, where tifffile is not installed, reads up to four."""
  if tifffile is None:
    try:
      opened = Image.open(io.BytesIO(data), formats=['TIFF'])
    except Image.UnidentifiedImageError as e:
      raise ValueError("Pillow does not read this TIFF; pip install 'beitv2_jax[tiff]' for those of more than four bands") from e
    _check_size(*opened.size)
    return np.asarray(opened)
  with tifffile.TiffFile(io.BytesIO(data)) as file:
    page = file.pages.first
    _check_size(page.imagewidth, page.imagelength * max(page.samplesperpixel // 4, 1))
    pixels = page.asarray()
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and page.planarconfig == 2 else pixels


def _bands(pixels: np.ndarray, value_range: Sequence[float], channels: Sequence[int]) -> np.ndarray:
  """Any number of bands of any type → uint8 [h, w, 3]."""
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  if pixels.dtype != np.uint8:
    if len(value_range) != 2:
      raise ValueError(
        f'values of type {pixels.dtype}: data.value_range=(LOW, HIGH) in the config says which become black and white, such as (0, 65535)'
      )
    low, high = value_range
    pixels = np.clip((pixels.astype(np.float32) - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
  if channels and max(channels) >= pixels.shape[2]:
    more = "; pip install 'beitv2_jax[tiff]' reads all bands of a TIFF" if tifffile is None else ''
    raise ValueError(f'{pixels.shape[2]} bands, so no data.channels={tuple(channels)}{more}')
  return pixels[..., list(channels) or [0, 0, 0]]


class Decoded:
  """A source whose images are RGB arrays. One that won't decode is named in the log and replaced by the next that does.

  `bad` in a record says how many were stepped over for it. `options` go to `image`.
  """

  def __init__(self, source: Sequence, **options: Any):
    self.source, self.options = source, options
    self.said: set[str] = set()  # names of those that were spoken of

  def __len__(self) -> int:
    return len(self.source)

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    _end_with_parent()  # pickles are read by decoding processes

  def __getitem__(self, i: int) -> dict:
    for bad in range(MAX_NEIGHBOURS):
      j = (i + bad) % len(self.source)
      try:
        record = self.source[j]
        masks = {'mask': mask(record['mask'])} if 'mask' in record else {}
        return record | masks | dict(image=image(record['image'], **self.options), bad=np.int32(bad))
      except UNDECODABLE as e:
        name = getattr(self.source, 'name', str)(j)
        if name not in self.said and len(self.said) < 20:
          self.said.add(name)
          logging.warning('%s does not decode (%s); using the next image.%s', name, e, ' No more of these.' * (len(self.said) == 20))
    raise UserError(f'{MAX_NEIGHBOURS} images in a row do not decode; the last was {name}. Is the data set intact?')


@functools.cache
def _end_with_parent() -> None:
  """A decoding process whose training was killed would wait for ever for somebody to take its batches."""
  parent = multiprocessing.parent_process()
  if parent is None:  # in training itself
    return

  def watch():
    while os.getppid() == parent.pid:  # as it was told, for it may be gone already
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class Counted:
  """Batches without their `bad` counts; too many end the run. `bad` and `seen` are this process's counts so far."""

  def __init__(self, batches: Iterator[dict], max_bad: float):
    self.batches, self.max_bad, self.bad, self.seen = batches, max_bad, 0, 0

  def __iter__(self):
    return self

  def __next__(self) -> dict:
    try:
      batch = dict(next(self.batches))
    except RuntimeError as e:
      if 'orker process' not in str(e):
        raise
      raise RunFailed(
        f'a decoding process died ({(str(e).splitlines() or [""])[0][:200]}). Where memory runs out the system ends the largest process: lower '
        '--config.data.workers. The same command goes on from the last checkpoint.'
      ) from e
    counts = batch.pop('bad')
    real = batch.get('valid', np.ones(len(counts), bool))  # not what fills a batch up, which may repeat a broken image
    if 'valid' in batch:  # an evaluation does not count an image twice because its neighbour is broken
      batch['valid'] = real & (counts == 0)
    self.bad, self.seen = self.bad + int(counts[real].sum()), self.seen + int(real.sum())
    if self.bad > self.max_bad * max(self.seen, 1000):
      raise UserError(
        f'{self.bad} of the first {self.seen} images do not decode, more than data.max_bad={self.max_bad} allows; the log names the first ones. '
        'Mend the data set, or raise --config.data.max_bad.'
      )
    return batch

  def close(self) -> None:
    getattr(self.batches, 'close', lambda: None)()
