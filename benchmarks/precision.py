"""Do the fast path and float32 end at the same place? A tokenizer and a student on its codes, each trained both ways with several seeds.

  python benchmarks/precision.py --steps 2000 --seeds 3

The demo's recipe on scikit-learn's digits, with a dictionary of settings that differ: dtype=bfloat16 and tokenizer_dtype=bfloat16 against
float32. For each the last training loss (mean of the last tenth of the steps) and what the evaluation says; and how many codes of held-out
images move when a tokenizer that was trained in float32 works in bfloat16. Within the spread over seeds means: no difference that these runs could show.
"""

import argparse
import copy
from pathlib import Path

import numpy as np

import beitv2_jax
from beitv2_jax.downstream import features, trained
from beitv2_jax.training import metrics

WAYS = dict(float32={'dtype': 'float32'}, bfloat16={'dtype': 'bfloat16'})


def train(stage: str, workdir: Path, changes: dict) -> dict[str, float]:
  config = beitv2_jax.recipe(f'configs/demo.py:stage={stage}', {'samples': 0, 'log_every': 10} | changes)
  scores = beitv2_jax.train(config, workdir) or metrics.read(workdir, 'eval')[-1]
  losses = [row['loss'] for row in metrics.read(workdir)]
  return {'last loss': float(np.mean(losses[-max(len(losses) // 10, 1) :]))} | {
    k: v for k, v in scores.items() if k not in ('step', 'kind')
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--out', type=Path, default=Path('runs/precision'))
  args = parser.parse_args()
  runs = args.out / f'{args.steps}_steps'
  train('teacher', args.out / 'teacher', {})
  found: dict[tuple[str, str], list[dict[str, float]]] = {}
  differing = []
  for seed in range(args.seeds):
    for way, dtypes in WAYS.items():
      own = dtypes | {'seed': seed, 'steps': args.steps}
      tokenizer, student = runs / f'tokenizer_{way}_{seed}', runs / f'student_{way}_{seed}'
      found.setdefault(('tokenizer', way), []).append(train('vqkd', tokenizer, own | {'teacher.name': args.out / 'teacher' / 'hf'}))
      codes_dtype = {'tokenizer_dtype': dtypes['dtype'], 'tokenizer_from': runs / f'tokenizer_float32_{seed}'}
      found.setdefault(('student', way), []).append(train('pretrain', student, own | codes_dtype))
    exact = beitv2_jax.load(runs / f'tokenizer_float32_{seed}')
    config = copy.deepcopy(exact.config).unlock()
    config.dtype = 'bfloat16'
    images = features.images_of(config, 'eval')[0]
    rounded = trained.Model(config, exact.variables)
    differing.append(100 * float(np.mean(np.asarray(exact.tokens(images)) != np.asarray(rounded.tokens(images)))))
  for stage in ('tokenizer', 'student'):
    print(f'\n| {stage} | ' + ' | '.join(WAYS) + ' |\n|---|---|---|')
    for key in found[stage, 'float32'][0]:
      cells = [[row[key] for row in found[stage, way]] for way in WAYS]
      print(f'| {key} | ' + ' | '.join(f'{np.mean(v):.4f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.4f}' for v in cells) + ' |')
  print(f'\n{np.mean(differing):.2f} % of the codes of held-out images differ where a tokenizer trained in float32 works in bfloat16')


if __name__ == '__main__':
  main()
