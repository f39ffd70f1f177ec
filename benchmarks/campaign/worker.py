"""One kind of attack, one after the other: python -m benchmarks.campaign.worker KIND FIRST_SEED SECONDS. A line of JSON before and after each."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what the attacked code prints is no answer
  kind, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
  import numpy as np

  from benchmarks.campaign.kinds import KINDS

  with tempfile.TemporaryDirectory() as folder:
    attack = KINDS[kind](Path(folder))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      print(json.dumps(dict(seed=seed)), file=answers, flush=True)
      outcome, said = attack(np.random.default_rng(seed))
      print(json.dumps(dict(seed=seed, outcome=outcome, said=' '.join(str(said).split())[:1000])), file=answers, flush=True)
      seed += 1


if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  main()
