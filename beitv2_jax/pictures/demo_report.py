"""What the demo's models are worth, and what they see: probes of frozen features, pictures, summary.json and report.html."""

import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.data.masking import BlockMask
from beitv2_jax.downstream import features, imagine, probes, trained
from beitv2_jax.models import teacher as teachers
from beitv2_jax.models.images import unit_images
from beitv2_jax.reports import draw
from beitv2_jax.reports.page import Page
from beitv2_jax.tasks.scores import code_statistics
from beitv2_jax.training import metrics


def teacher_features(config, images: np.ndarray) -> np.ndarray:
  model, params = teachers.load('clip', config.teacher.name, config_lib.patch_grid(config))
  return trained.in_batches(lambda x: model.apply(params, unit_images(jnp.asarray(x))), images).mean(1)


def masked_accuracy(model: trained.Model, codes: np.ndarray, images: np.ndarray) -> dict:
  """Accuracy (%) of the last branch at masked patches of held-out images, and of the best guess by position alone."""
  m = model.config.mask
  draw = BlockMask(model.grid, m.count, m.min_block, m.max_block, m.min_aspect).draw
  masks = np.stack([draw(np.random.default_rng(i)) for i in range(len(images))])
  logits = trained.in_batches(lambda x, m: model.masked_logits(x, m)[-1], images, masks)
  predicted = logits.argmax(-1).reshape(codes.shape)
  frequent = np.array([[np.bincount(codes[:, r, c]).argmax() for c in range(codes.shape[2])] for r in range(codes.shape[1])])
  return dict(
    mim_acc=100 * float((predicted == codes)[masks].mean()),
    mim_acc_floor=100 * float((frequent[None] == codes)[masks].mean()),
    masks=masks,
    predicted=predicted,
  )


NAMES = dict(
  pretrained='BEiT v2, pretrained here',
  random_init='the same model, untrained',
  random_teacher='pretrained from an untrained teacher',
  teacher='the teacher (has seen every training label)',
  pixels='raw pixels',
)
HEADER = ['frozen features of', 'linear probe %', '5 labels a class %', 'k-NN %']


def report(out: Path, began: float, control: bool) -> None:
  """Writes summary.json, codebook.png, imagined.png and report.html into `out`, whose stages are trained, and prints the table.

  `began` is when the demo started (time.time()), `control` whether the chain from an untrained teacher is there too.
  """
  print('\nProbing frozen features ...', flush=True)
  vqkd, model = trained.load(out / 'vqkd'), trained.load(out / 'pretrained')
  images, labels = features.images_of(model.config, 'eval')
  codes = trained.in_batches(vqkd.tokens, images)
  counts = np.bincount(codes.reshape(-1), minlength=vqkd.config.model.codes)
  masked = masked_accuracy(model, codes, images)
  summary: dict[str, Any] = feature_scores(out, vqkd, model, images, labels, control) | dict(
    codes_used=int((counts > 0).sum()),
    codes_total=len(counts),
    perplexity=float(code_statistics(counts.astype(np.float64))['perplexity']),
    mim_acc=masked['mim_acc'],
    mim_acc_floor=masked['mim_acc_floor'],
    seconds=round(time.time() - began, 1),
  )
  (out / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
  rows = [[name, *(f'{summary[k][m]:.1f}' for m in ('probe', 'probe5', 'knn'))] for k, name in NAMES.items() if summary[k]]
  facts = [
    f'codes used on {len(images)} held-out images: {summary["codes_used"]} of {summary["codes_total"]}, perplexity {summary["perplexity"]:.1f}',
    f'masked codes predicted right: {summary["mim_acc"]:.1f} % (the most frequent code of each position: {summary["mim_acc_floor"]:.1f} %)',
    f'{summary["seconds"]:.0f} s for the whole chain',
  ]
  write_page(out, rows, facts, images, codes, len(counts), masked)
  print_table(rows)
  print('\n' + '\n'.join(facts) + f'\n\nPictures: {out}/report.html   Numbers: {out}/summary.json')


def feature_scores(out: Path, vqkd: Any, model: Any, images: np.ndarray, labels: np.ndarray, control: bool) -> dict[str, Any]:
  """{whose features: probes on the held-out `images`}, by the keys of NAMES."""
  train_images, train_labels = features.images_of(model.config, 'train')

  def score(make):
    return probes.scores(make(train_images), train_labels, make(images), labels)

  return dict(
    pretrained=score(lambda x: features.last_block_means(model, x)),
    random_init=score(lambda x: features.last_block_means(trained.Model(model.config), x)),
    random_teacher=score(lambda x: features.last_block_means(trained.load(out / 'random_pretrained'), x)) if control else None,
    teacher=score(lambda x: teacher_features(vqkd.config, x)),
    pixels=score(lambda x: x.reshape(len(x), -1).astype(np.float32)),
  )


def write_page(out: Path, rows: list, facts: list[str], images: np.ndarray, codes: np.ndarray, size: int, masked: dict) -> None:
  page = Page('BEiT v2 from scratch, at toy size')
  page.table(HEADER, rows)
  for fact in facts:
    page.text(fact)
  page.heading('What the codes mean')
  sheet = draw.gallery(images, codes, size)
  sheet.save(out / 'codebook.png')
  page.picture(sheet, 'Codebook gallery: each strip is one code, with patches of held-out images that have it; the most used codes first.')
  tinted = [[image, draw.overlay(image, c, size)] for image, c in zip(images[:16], codes[:16])]
  page.picture(draw.strip(tinted), 'Codes over images: one colour a code.')
  page.heading('What pretraining learned')
  few = slice(0, 16)
  grid = draw.masked_predictions(images[few], masked['masks'][few], codes[few], masked['predicted'][few], size)
  page.picture(
    grid, 'From the top: the image; what the model sees; the codes behind the mask; the codes it predicts, crossed out where wrong.'
  )
  page.heading('What the codes look like')
  drawing = trained.load(out / 'pixels')
  means, counts = imagine.mean_patches(images, codes, size)
  page.picture(
    draw.faces(imagine.faces(drawing, codes)[0], means, counts),
    'The face of a code: what the pixel decoder draws for it, beside the mean of its patches.',
  )
  steps = imagine.behind_mask(trained.load(out / 'pretrained'), drawing, images[few], masked['masks'][few], steps=3)
  sheet = draw.imagined(images[few], masked['masks'][few], imagine.as_codes(drawing, images[few]), [x for _, x in steps])
  sheet.save(out / 'imagined.png')
  page.picture(
    sheet,
    'From the top: the image; what the model sees; the image as the codebook sees it, drawn from its codes alone; and what the model imagines '
    'behind the mask, in three steps, what it is most certain of first.',
  )
  page.heading('Curves')
  page.begin_charts()
  for stage, keys, title in CURVES:
    steps = metrics.read(out / stage)
    page.curves(title, {k: [(row['step'], row[k]) for row in steps] for k in keys})
  page.end_charts()
  page.save(out / 'report.html')


CURVES = (
  ('teacher', ('loss',), 'teacher: contrastive loss'),
  ('vqkd', ('rec_loss',), 'VQ-KD: 1 - cosine to the teacher'),
  ('vqkd', ('perplexity',), 'VQ-KD: codes in use (perplexity of a batch)'),
  ('pretrained', ('mim_acc_1', 'mim_acc_2'), 'pretraining: masked codes right, %'),
)


def print_table(rows: list) -> None:
  widths = [max(len(str(row[i])) for row in [HEADER, *rows]) for i in range(len(HEADER))]
  print()
  for row in [HEADER, *rows]:
    print('  '.join(str(cell).ljust(w) if i == 0 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
