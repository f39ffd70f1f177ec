"""python -m beitv2_jax.demo: the whole chain at toy size, then a table, runs/demo/report.html and summary.json.

Every stage is one `python -m beitv2_jax.main --config=configs/demo.py:stage=...`, which is printed before it runs.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from beitv2_jax import api, metrics, probe
from beitv2_jax import config as config_lib
from beitv2_jax.analysis import codes as pictures
from beitv2_jax.analysis.report import Report
from beitv2_jax.data import pipeline, sources
from beitv2_jax.data.masking import BlockMask
from beitv2_jax.data.transforms import image_transforms
from beitv2_jax.errors import UserError
from beitv2_jax.main import use_compilation_cache
from beitv2_jax.models import teacher as teachers
from beitv2_jax.tasks import tokenizer

_OUT = flags.DEFINE_string('out', 'runs/demo', 'Where everything goes.')
_DATA = flags.DEFINE_string('data', 'digits', 'Images: digits, or folder:PATH with one folder a class.')
_FULL = flags.DEFINE_bool('full', False, 'Also the control: the same chain from an untrained teacher.')
_STEPS = flags.DEFINE_float('steps', 1.0, 'Share of the usual training steps, for a quick look.')

STEPS = dict(teacher=450, vqkd=600, pretrain=3000)


def train(stage: str, folder: Path, steps: int | None = None, **settings) -> None:
  """Runs one stage in its own process; exits with its code if it fails."""
  steps = max(1, round(STEPS[stage] * _STEPS.value)) if steps is None else steps
  settings = {'data.source': _DATA.value, 'steps': steps} | {k.replace('__', '.'): v for k, v in settings.items()}
  command = [sys.executable, '-m', 'beitv2_jax.main', f'--config=configs/demo.py:stage={stage}', f'--workdir={folder}']
  command += [f'--config.{k}={v}' for k, v in settings.items()]
  print('\n$ python ' + ' '.join(command[1:]), flush=True)
  done = subprocess.run(command)
  if done.returncode:
    sys.exit(done.returncode)


def chain(out: Path, prefix: str = '', teacher_steps: int | None = None) -> None:
  train('teacher', out / f'{prefix}teacher', teacher_steps)
  train('vqkd', out / f'{prefix}vqkd', teacher__name=out / f'{prefix}teacher' / 'hf')
  train('pretrain', out / f'{prefix}pretrained', tokenizer_from=out / f'{prefix}vqkd')


def load_images(config, split: str) -> tuple[np.ndarray, np.ndarray]:
  """All images of a split, resized and centre-cropped: uint8 [n, h, w, 3], labels [n]."""
  source = sources.make(config.data.source, split, config.data.dir, config.data.holdout)
  steps = image_transforms(config.data, train=False)
  batches = list(pipeline.eval_batches(source, steps, seed=0, batch=64))
  valid = np.concatenate([b['valid'] for b in batches])
  return tuple(np.concatenate([b[k] for b in batches])[valid] for k in ('image', 'label'))


def teacher_features(config, images: np.ndarray) -> np.ndarray:
  model, params = teachers.load('clip', config.teacher.name, config_lib.patch_grid(config))
  return api.in_batches(lambda x: model.apply(params, tokenizer.unit_images(jnp.asarray(x))), images).mean(1)


def pooled(model: api.Model, images: np.ndarray) -> np.ndarray:
  """Mean of the last block's patch tokens, [n, D]."""
  return api.in_batches(model.features, images)['patches'].mean(1)


def masked_accuracy(model: api.Model, codes: np.ndarray, images: np.ndarray) -> dict:
  """Accuracy (%) of the last branch at masked patches of held-out images, and of the best guess by position alone."""
  m = model.config.mask
  draw = BlockMask(model.grid, m.count, m.min_block, m.max_block, m.min_aspect).draw
  masks = np.stack([draw(np.random.default_rng(i)) for i in range(len(images))])
  logits = api.in_batches(lambda x, m: model.masked_logits(x, m)[-1], images, masks)
  predicted = logits.argmax(-1).reshape(codes.shape)
  frequent = np.array([[np.bincount(codes[:, r, c]).argmax() for c in range(codes.shape[2])] for r in range(codes.shape[1])])
  return dict(
    mim_acc=100 * float((predicted == codes)[masks].mean()),
    mim_acc_floor=100 * float((frequent[None] == codes)[masks].mean()),
    masks=masks,
    predicted=predicted,
  )


def main(_) -> None:
  use_compilation_cache()
  began, out = time.time(), Path(_OUT.value)
  sources.make(_DATA.value, 'train')  # a wrong path shows here, not after a stage
  chain(out)
  if _FULL.value:
    chain(out, 'random_', teacher_steps=0)
  report(out, began)


def report(out: Path, began: float) -> None:
  """Probes, pictures, runs/demo/summary.json and report.html."""
  print('\nProbing frozen features ...', flush=True)
  vqkd, model = api.load(out / 'vqkd'), api.load(out / 'pretrained')
  train_images, train_labels = load_images(model.config, 'train')
  images, labels = load_images(model.config, 'eval')

  def score(features):
    return probe.scores(features(train_images), train_labels, features(images), labels)

  summary = dict(
    pretrained=score(lambda x: pooled(model, x)),
    random_init=score(lambda x: pooled(api.Model(model.config), x)),
    random_teacher=None,
    teacher=score(lambda x: teacher_features(vqkd.config, x)),
    pixels=score(lambda x: x.reshape(len(x), -1).astype(np.float32)),
  )
  if _FULL.value:
    control = api.load(out / 'random_pretrained')
    summary['random_teacher'] = score(lambda x: pooled(control, x))
  codes = api.in_batches(vqkd.tokens, images)
  counts = np.bincount(codes.reshape(-1), minlength=vqkd.config.model.codes)
  masked = masked_accuracy(model, codes, images)
  summary |= dict(
    codes_used=int((counts > 0).sum()),
    codes_total=len(counts),
    perplexity=float(tokenizer.code_statistics(counts.astype(np.float64))['perplexity']),
    mim_acc=masked['mim_acc'],
    mim_acc_floor=masked['mim_acc_floor'],
    seconds=round(time.time() - began, 1),
  )
  (out / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')

  names = dict(
    pretrained='BEiT v2, pretrained here',
    random_init='the same model, untrained',
    random_teacher='pretrained from an untrained teacher',
    teacher='the teacher (has seen every training label)',
    pixels='raw pixels',
  )
  header = ['frozen features of', 'linear probe %', '5 labels a class %', 'k-NN %']
  rows = [[text, *(f'{summary[k][m]:.1f}' for m in ('probe', 'probe5', 'knn'))] for k, text in names.items() if summary[k]]
  facts = [
    f'codes used on {len(images)} held-out images: {summary["codes_used"]} of {summary["codes_total"]}, perplexity {summary["perplexity"]:.1f}',
    f'masked codes predicted right: {summary["mim_acc"]:.1f} % (the most frequent code of each position: {summary["mim_acc_floor"]:.1f} %)',
    f'{summary["seconds"]:.0f} s for the whole chain',
  ]
  page = Report('BEiT v2 from scratch, at toy size')
  page.table(header, rows)
  for fact in facts:
    page.text(fact)
  page.text('What the codes mean', 'h2')
  sheet = pictures.gallery(images, codes, len(counts))
  sheet.save(out / 'codebook.png')
  page.picture(sheet, 'Codebook gallery: each strip is one code, with patches of held-out images that have it; the most used codes first.')
  tinted = [[image, pictures.overlay(image, c, len(counts))] for image, c in zip(images[:16], codes[:16])]
  page.picture(pictures.strip(tinted), 'Codes over images: one colour a code.')
  page.text('What pretraining learned', 'h2')
  few = slice(0, 16)
  grid = pictures.masked_predictions(images[few], masked['masks'][few], codes[few], masked['predicted'][few], len(counts))
  page.picture(
    grid, 'From the top: the image; what the model sees; the codes behind the mask; the codes it predicts, crossed out where wrong.'
  )
  page.text('Curves', 'h2')
  curves = {k: metrics.read(out / k) for k in ('teacher', 'vqkd', 'pretrained')}
  page.curves({'loss': [(r['step'], r['loss']) for r in curves['teacher']]}, 'teacher: contrastive loss')
  page.curves({k: [(r['step'], r[k]) for r in curves['vqkd']] for k in ('rec_loss',)}, 'VQ-KD: 1 - cosine to the teacher')
  page.curves({k: [(r['step'], r[k]) for r in curves['vqkd']] for k in ('perplexity',)}, 'VQ-KD: codes in use (perplexity of a batch)')
  page.curves(
    {k: [(r['step'], r[k]) for r in curves['pretrained']] for k in ('mim_acc_1', 'mim_acc_2')}, 'pretraining: masked codes right, %'
  )
  page.save(out / 'report.html')

  widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
  print()
  for row in [header, *rows]:
    print('  '.join(str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths))))
  print('\n' + '\n'.join(facts) + f'\n\nPictures: {out}/report.html   Numbers: {out}/summary.json')


if __name__ == '__main__':
  try:
    app.run(main)
  except UserError as e:
    sys.exit(f'error: {e}')
