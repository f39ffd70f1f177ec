"""Attacks at random, by seed, for as long as you like: python -m benchmarks.campaign --hours 1

Two at a time, each kind for its share of the time. Prints the table of docs/reliability.md and what went wrong, with the seeds that do it
again: python -m benchmarks.campaign --kinds damages --seed 17 --hours 0.001. Kinds are described in benchmarks/campaign/kinds.py; `disks`
mounts small file systems, for which it must be root.
"""

import argparse
import collections
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

LIMIT = 60.0  # seconds for one thing that is done to the code; attacks on processes do several
MEMORY_LIMIT = 4 * 2**30
# Share of the time, and how often LIMIT an attack may take.
SHARES = dict(
  settings=(2.5, 1),
  damages=(2.0, 1),
  weights=(0.6, 1),
  images=(0.7, 1),
  lists=(0.3, 1),
  kills=(3.5, 4),
  signals=(3.0, 4),
  disks=(0.8, 4),
  topologies=(0.3, 6),
  workers=(0.5, 3),
  peers=(0.7, 6),
  buckets=(0.7, 6),
  gone=(0.7, 4),
  slow=(0.7, 5),
)
ROUND = 120.0  # seconds of one worker


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--hours', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--kinds', nargs='+', choices=SHARES, default=list(SHARES))
  parser.add_argument('--log', type=Path, help='a line of JSON for every attack')
  args = parser.parse_args()
  end = time.monotonic() + 3600 * args.hours
  seeds = {kind: args.seed for kind in args.kinds}
  spent = dict.fromkeys(args.kinds, 0.0)
  counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in args.kinds}
  lock, log = threading.Lock(), args.log.open('a') if args.log else None

  def work() -> None:
    while time.monotonic() < end:
      with lock:
        kind = min(args.kinds, key=lambda k: spent[k] / SHARES[k][0])
        spent[kind] += ROUND
        first, seeds[kind] = seeds[kind], seeds[kind] + 10_000
      for row in attacks(kind, first, min(ROUND, max(end - time.monotonic(), 1))):
        with lock:
          counts[kind][row['outcome']] += 1
          if log:
            log.write(json.dumps(dict(kind=kind) | row) + '\n')
            log.flush()
          if row['outcome'] not in ('right', 'refused in a line'):
            print(f'{kind} {row["seed"]}: {row["outcome"]}: {row["said"][:600]}', flush=True)

  threads = [threading.Thread(target=work) for _ in range(min(2, len(args.kinds)))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  print(table(counts, args))


def attacks(kind: str, seed: int, seconds: float):
  """Results of one worker, as dicts; a worker that hangs or grows is ended, and its last attack counted so."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  command = [sys.executable, '-m', 'benchmarks.campaign.worker', kind, str(seed), str(seconds)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
  lines: queue.Queue = queue.Queue()
  said: collections.deque = collections.deque(maxlen=40)
  threading.Thread(target=lambda: [lines.put(x) for x in process.stdout] and None or lines.put(None), daemon=True).start()
  threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()
  current, since = None, time.monotonic() + 120  # the first waits for what the worker prepares
  while True:
    try:
      line = lines.get(timeout=0.2)
    except queue.Empty:
      if memory(process.pid) > MEMORY_LIMIT:
        ended = 'over 4 GiB'
      elif current is not None and time.monotonic() - since > LIMIT * SHARES[kind][1]:
        ended = 'over 60 s'
      else:
        continue
      os.killpg(process.pid, 9)
      process.wait()
      yield dict(seed=current, outcome=ended, said='')
      return
    if line is None:
      if process.wait() and current is not None:
        yield dict(seed=current, outcome='traceback', said=f'the worker died with {process.returncode}: {"".join(said)[-500:]}')
      elif process.returncode:
        print(f'{kind}: the worker did not start: {"".join(said)[-800:]}', flush=True)
      return
    row = json.loads(line)
    if 'outcome' in row:
      yield row
      current = None
    else:
      current, since = row['seed'], time.monotonic()


def memory(pid: int) -> int:
  """Bytes that a process holds."""
  try:
    return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * resource.getpagesize()
  except OSError:
    return 0


def table(counts: dict, args: argparse.Namespace) -> str:
  columns = ('right', 'refused in a line', 'traceback', 'wrong', 'over 60 s', 'over 4 GiB')
  lines = [
    f'{args.hours:g} hours, seed {args.seed}, {time.strftime("%Y-%m-%d")}',
    '',
    '| attack | ' + ' | '.join(('tried', *columns)) + ' |',
    '|---' * (len(columns) + 2) + '|',
  ]
  lines += [
    f'| {kind} | {sum(found.values()):,} | ' + ' | '.join(f'{found[c]:,}' for c in columns) + ' |' for kind, found in counts.items()
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
