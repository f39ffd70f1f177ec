"""What a trained row is worth, found in a process of its own, which has the accelerator only as long as that takes (a TPU takes no two):

python -m beitv2_jax.studies.score FILE      reads what `ask` wrote, and writes the figures to FILE.json
"""

import json
import pickle
import sys
from pathlib import Path

from beitv2_jax.data import sources
from beitv2_jax.downstream import features, probes, segmentation, trained
from beitv2_jax.errors import RunFailed, UserError
from beitv2_jax.studies import summary
from beitv2_jax.studies.plan import Study
from beitv2_jax.studies.tables import ENCODER, Row
from beitv2_jax.training import child, metrics, process

# What a study may ask for, and the figures of each.
SCORES = dict(probe={'probe', 'probe5', 'knn'}, finetune={'finetune'}, segment={'miou'})


def ask(study: Study, row: Row, seed: int, workdirs: dict[str, Path], folder: Path) -> dict[str, float]:
  """`score` in a process of its own. Raises RunFailed."""
  folder.mkdir(parents=True, exist_ok=True)
  file, log = folder / 'score.pickle', folder / 'score.log'
  file.write_bytes(pickle.dumps((study, row, seed, workdirs)))
  with log.open('w') as out:
    code = child.run([sys.executable, '-m', 'beitv2_jax.studies.score', str(file)], stdout=out, stderr=out)
  if code:
    raise RunFailed(f'scoring {folder} ended with code {code}: {" ".join(log.read_text().splitlines()[-1:])} (log: {log})')
  found = json.loads(file.with_suffix('.json').read_text())
  for path in (file, file.with_suffix('.json'), log):
    path.unlink()
  return found


def score(study: Study, row: Row, seed: int, workdirs: dict[str, Path]) -> dict[str, float]:
  """The figures of a row whose stages are trained, at `workdirs`: those that the study asks for, and those of the tokenizer."""
  found = dict(metrics.read(workdirs['vqkd'], 'eval')[-1]) if 'vqkd' in workdirs else {}
  if 'finetune' in study.scores:
    found['finetune'] = metrics.read(workdirs['finetune'], 'eval')[-1]['acc1']
  if 'segment' in study.scores:
    model = trained.load(workdirs['segment'])
    source = sources.make(model.config.data.source, 'eval', model.config.data.dir, model.config.data.holdout)
    found['miou'] = segmentation.evaluate(model, source, segmentation.labels_of(model.config))['miou']
  if 'probe' in study.scores:
    model = _fresh(study, seed) if row.student is None else trained.load(workdirs['vqkd' if row.student == ENCODER else 'pretrain'])
    means, labels = {}, {}
    for split in ('train', 'eval'):
      config = study.config('pretrain').unlock()
      config.data.image_size = model.config.data.image_size
      pixels, labels[split] = features.images_of(config, split)
      means[split] = features.last_block_means(model, pixels)
    found |= probes.scores(means['train'], labels['train'], means['eval'], labels['eval'])
  return {key: float(found[key]) for key, _, _ in summary.FIGURES if key in found}


def _fresh(study: Study, seed: int) -> trained.Model:
  """The recipe's model as it is before any training, run as `trained.load` has the others run."""
  config = study.config('pretrain').unlock()
  config.model.vocab, config.seed = 1, seed
  config.dtype, config.layers.attention = 'float32', 'auto'
  return trained.Model(config, seed=seed)


def main(file: Path) -> None:
  process.use_compilation_cache()
  try:
    found = score(*pickle.loads(file.read_bytes()))
  except (UserError, OSError) as e:
    sys.exit(f'error: {e}')
  file.with_suffix('.json').write_text(json.dumps(found))


if __name__ == '__main__':
  main(Path(sys.argv[1]))
