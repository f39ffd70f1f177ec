"""From trained models and a source of images to an explorer; explorer_files.py writes it."""

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data import sources
from beitv2_jax.downstream import image_files, imagine, survey, trained
from beitv2_jax.errors import UserError
from beitv2_jax.models.images import unit_images
from beitv2_jax.pictures import explorer_files as files
from beitv2_jax.pictures import explorer_looks
from beitv2_jax.tasks import teachers


@dataclasses.dataclass(frozen=True)
class Models:
  """What is looked at: a tokenizer, and if they were given another one, a pixel decoder of the first, and a model of features."""

  tokenizer: trained.Model
  name: str
  other: trained.Model | None = None
  other_name: str = ''
  pixels: trained.Model | None = None
  features: trained.Model | None = None
  features_name: str = ''

  @classmethod
  def load(cls, tokenizer: str, other: str | None, pixels: str | None, features: str | None) -> 'Models':
    """Raises UserError if they do not belong together."""
    models = cls(
      trained.load(tokenizer),
      tokenizer,
      trained.load(other) if other else None,
      other or '',
      trained.load(pixels) if pixels else None,
      trained.load(features) if features else None,
      features or '',
    )
    for model, what in ((models.tokenizer, '--from'), (models.other, '--compare')):
      if model and model.kind != 'tokenizer':
        raise UserError(f'{what} is a {model.kind} model; an explorer is of a tokenizer.')
    first = models.tokenizer
    size = config_lib.image_shape(first.config)
    for model, what in ((models.other, '--compare'), (models.features, '--features-from'), (models.pixels, '--pixels')):
      if model and (config_lib.image_shape(model.config) != size or model.grid != first.grid):
        raise UserError(
          f'{what} takes images of {config_lib.image_shape(model.config)[:2]} in {model.grid} patches, the tokenizer of {size[:2]} in '
          f'{first.grid}: they cannot be shown on the same images.'
        )
    if models.other and config_lib.preparation(models.other.config) != config_lib.preparation(first.config):
      raise UserError(
        '--compare was trained on images that are cropped or read in another way (data.crop_pct, channels, value_range): its patches are others.'
      )
    if models.pixels:
      models.pixels._must_be('pixels')
      if not trained.same_codebook(first, models.pixels):
        raise UserError(f'the pixel decoder in {pixels} is of another tokenizer than {tokenizer}: its codes do not mean the same.')
    if models.features:
      models.features._must_be('tokenizer', 'pretrain', 'classifier', 'segmenter')
    return models

  @property
  def tokenizers(self) -> dict[str, trained.Model]:
    return {'a': self.tokenizer} | ({'b': self.other} if self.other else {})


class Images:
  """Images of a source, of one split or of both, as one list; at most `limit`, evenly spread."""

  def __init__(self, parts: list, limit: int, where: str):
    self.where, self.parts, self.classes = where, parts, parts[0].classes
    places = [(p, i) for p, part in enumerate(parts) for i in range(len(part))]
    if len(places) > limit:
      places = [places[i] for i in np.linspace(0, len(places) - 1, limit).round().astype(int)]
    self.places = places

  @classmethod
  def of(cls, source: str, split: str, data_dir: str, limit: int) -> 'Images':
    parts = []
    for name in ('train', 'eval') if split == 'all' else (split,):
      try:
        parts.append(sources.make(source, name, data_dir))
      except UserError:  # a source need not have both
        if split != 'all' or (name == 'eval' and not parts):
          raise
    if any(hasattr(part, 'mask_names') for part in parts):
      raise UserError(f'{source} are images with masks: give --data folder:PATH of the images alone.')
    if len(parts) == 2 and parts[0].classes != parts[1].classes:  # such as a labelled part beside one without labels
      parts = parts[:1]
    return cls(parts, limit, source)

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, i: int) -> dict:
    part, place = self.places[i]
    return self.parts[part][place]

  def name(self, i: int) -> str:
    part, place = self.places[i]
    name = getattr(self.parts[part], 'name', None)
    return name(place) if name else f'image {place}'


def build(models: Models, source: Images, out: Path, shown: int, batch: int) -> Path:
  """Looks through all images of `source` and writes the explorer into `out`; returns its page."""
  files.check_folder(out)  # before the work
  found = {key: survey.survey(model, source, batch) for key, model in models.tokenizers.items()}
  first = found['a']

  def images(places: np.ndarray) -> Iterator[np.ndarray]:
    some = sources.Picked(source, first.records[places])
    for part in survey.plain_batches(models.tokenizer, some, batch):
      yield from part['image'][part['valid']]

  names = {'a': models.name, 'b': models.other_name}
  books = []
  for key, model in models.tokenizers.items():
    embedding = np.asarray(model.variables['codebook']['quantizer']['embedding'], np.float32)
    faces = code_faces(models.pixels, found[key]) if key == 'a' and models.pixels else None
    books.append(files.Book(names[key], found[key], embedding, faces))
  about = dict(
    title=f'Codebook of {Path(models.name).name or models.name}',
    made=datetime.datetime.now().astimezone().isoformat(timespec='minutes'),
    source=source.where,
    names=[Path(source.name(int(i))).name for i in first.records],
    side=config_lib.image_shape(models.tokenizer.config)[0],
    skipped=len(source) - len(first),
  )
  return files.build(out, books, images, look_of(models), about, shown)


def code_faces(pixels: trained.Model, found: survey.Survey, most: int = 1000) -> np.ndarray:
  """What the decoder draws for each code in up to `most` of the images where it occurs."""
  places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
  return imagine.faces(pixels, found.codes[places])[0]


def look_of(models: Models) -> explorer_looks.Look:
  """Attention and features of the model that was given for them, or else of the tokenizer's encoder; and the teacher's features, or
  what the tokenizer's decoder makes of them where the teacher cannot be opened."""
  model = models.features or models.tokenizer
  config = models.tokenizer.config
  try:
    opened, params = teachers.opened(config, 'float32')
    apply = jax.jit(opened.apply)
    target = lambda images: apply(params, unit_images(jnp.asarray(images)))
    target_is = "the teacher's features"
  except (UserError, AttributeError, KeyError):
    target = models.tokenizer.reconstruct
    target_is = "the teacher's features as the tokenizer's decoder predicts them (the teacher itself could not be opened here)"
  in_parts = lambda function, images: trained.in_batches(function, images, batch=min(16, len(images)))
  return explorer_looks.Look(
    target=lambda images: np.asarray(in_parts(target, images), np.float32),
    patches=lambda images: in_parts(model.features, images)['patches'],
    attention=lambda images: in_parts(lambda x: model.attention(x)[..., 1:].mean(1), images),
    target_is=target_is,
    features_from=models.features_name,
  )


def add(models: Models, out: Path, paths: list[str], batch: int) -> str:
  """Puts image files into the explorer in `out`; returns what was done, in words."""
  summary = files.read_summary(out)
  if [book['name'] for book in summary['books']] != [models.name, *([models.other_name] if models.other else [])]:
    raise UserError(f'the explorer in {out} is of {" and ".join(book["name"] for book in summary["books"])}: give the same.')
  side = config_lib.image_shape(models.tokenizer.config)[0]
  look, was = (look_of(models), summary['look']) if summary['look'] else (None, {})
  if was.get('features_from', models.features_name) != models.features_name:
    raise UserError(
      f'the explorer in {out} has features of {was["features_from"] or "the tokenizer"}: give the same --features-from, or none.'
    )
  if look and look.target_is != was['target']:
    raise UserError(f'the explorer in {out} shows {was["target"]}, and now it would be {look.target_is}: make it anew.')
  config = models.tokenizer.config
  first, count = None, 0
  for names, images in image_files.prepared(image_files.find_images(paths), side, batch, **config_lib.preparation(config)):
    codes = {key: trained.in_batches(model.tokens, images, batch=batch) for key, model in models.tokenizers.items()}
    start = files.add_images(out, [name.name for name in names], images, codes, look)
    first, count = start if first is None else first, count + len(names)
  if first is None:
    raise UserError('none of the images decodes.')
  return f'added {count} images to {out}/index.html: the first is #image={first}'
