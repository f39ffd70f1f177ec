"""What a trace says: how much of the time the device was busy, and with what.

  python benchmarks/trace.py WORKDIR/profile     after a run with --config.profile_steps=20

Busy is the union of everything that ran on the first device (on a CPU: in XLA's own threads), from the first operation to the last.
On a CPU operations contain each other, so their times do not add up.
"""

import argparse
import collections
from pathlib import Path

import jax


def device_lines(data) -> list:
  planes = [p for p in data.planes if p.name.startswith('/device:') and 'CUSTOM' not in p.name]
  if planes:
    return [line for p in planes[:1] for line in p.lines if line.name.startswith('Stream') or line.name == 'XLA Ops']
  return [line for p in data.planes for line in p.lines if line.name.startswith(('tf_XLAPjRtCpuClient', 'tf_XLAEigen'))]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('directory')
  parser.add_argument('--top', type=int, default=15)
  args = parser.parse_args()
  files = sorted(Path(args.directory).rglob('*.xplane.pb'))
  if not files:
    parser.error(f'no *.xplane.pb under {args.directory}')
  spans, total = [], collections.Counter()
  for line in device_lines(jax.profiler.ProfileData.from_file(str(files[-1]))):
    for e in line.events:
      spans.append((e.start_ns, e.start_ns + e.duration_ns))
      total[e.name] += e.duration_ns
  spans.sort()
  if not spans:
    parser.error(f'{files[-1]} holds no operation of a device.')
  first, end, busy, longest = spans[0][0], spans[0][0], 0.0, 0.0
  for a, b in spans:
    longest = max(longest, a - end)
    busy += max(b - max(a, end), 0)
    end = max(end, b)
  print(
    f'busy {busy / 1e6:.1f} of {(end - first) / 1e6:.1f} ms: {100 * busy / (end - first):.1f} %; longest idle time {longest / 1e6:.2f} ms'
  )
  for name, ns in total.most_common(args.top):
    print(f'{ns / 1e6:10.2f} ms  {name[:90]}')


if __name__ == '__main__':
  main()
