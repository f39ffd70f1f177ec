"""A long run of a tiny model, with a save and an evaluation every few hundred steps: are memory, threads and open files flat?

  python -m benchmarks.soak --steps 20000 --every 400

Prints what the process holds at each tenth of the run, and how the second half differs from its start.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from beitv2_jax.training import metrics


def held(pid: int) -> tuple[float, int, int]:
  """(MiB, threads, open files) of a process."""
  status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines() if ':' in line)
  return int(status['VmRSS'].split()[0]) / 1024, int(status['Threads']), len(os.listdir(f'/proc/{pid}/fd'))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=20_000)
  parser.add_argument('--every', type=int, default=400)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable, '-m', 'beitv2_jax.main', '--config=configs/beitv2_b16.py:smoke', f'--workdir={workdir}', f'--config.steps={args.steps}',
      f'--config.checkpoint.every={args.every}', f'--config.eval_every={args.every}', f'--config.log_every={args.every}',
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, tenth = [], args.steps // 10
    while process.poll() is None:
      time.sleep(0.2)
      steps = metrics.read(workdir, 'eval')
      if steps and steps[-1]['step'] >= tenth * (len(rows) + 1):
        rows.append((steps[-1]['step'], *held(process.pid)))
        print('step {:>7,}: {:7.1f} MiB, {:3d} threads, {:3d} open files'.format(*rows[-1]), flush=True)
    assert process.returncode == 0, process.returncode
  middle, last = rows[len(rows) // 2 - 1], rows[-1]
  print(
    f'from the middle to the end: {100 * (last[1] / middle[1] - 1):+.1f} % memory, {last[2] - middle[2]:+d} threads, {last[3] - middle[3]:+d} open files'
  )


if __name__ == '__main__':
  main()
