"""What a full reproduction costs in chip-hours, from the estimates in benchmarks/tpu_estimates.json: the table of docs/reproduce.md.

  python -m benchmarks.chip_hours

Images of a stage over the compiler's estimate of images/s a chip, once if the chips' traffic hides behind their work and once if it does not.
Nothing of it was measured on a TPU, and starting, evaluating and saving come on top.
"""

import json
from pathlib import Path

IMAGENET = 1_281_167
# (stage, epochs, the estimate for each chip).
STAGES = (
  ('VQ-KD, 100 epochs', 100, 'tokenizer {} 64'),
  ('pretraining base, 300 epochs', 300, 'base {} 64'),
  ('pretraining base, 1600 epochs', 1600, 'base {} 64'),
  ('pretraining large, 300 epochs', 300, 'large {} 64'),
  ('pretraining large, 1600 epochs', 1600, 'large {} 64'),
)
CHIPS = ('v4', 'v5e', 'v5p', 'v6e')


def main() -> None:
  estimates = json.loads((Path(__file__).parent / 'tpu_estimates.json').read_text())
  print('| stage | ' + ' | '.join(CHIPS) + ' |\n|---|' + '---|' * len(CHIPS))
  for stage, epochs, name in STAGES:
    cells = []
    for chip in CHIPS:
      estimate = estimates.get(name.format(chip))
      hours = (
        [epochs * IMAGENET / estimate[k] / 3600 for k in ('images_per_second_chip', 'images_per_second_chip_no_overlap')]
        if estimate
        else []
      )
      cells.append(' to '.join(f'{h:,.0f}' for h in hours) or '-')
    print(f'| {stage} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main()
