"""The tables of docs/performance.md that come from the TPU compiler: every program compiled for chips that are not there.

  python benchmarks/tpu_estimates.py            compiles what is not in benchmarks/tpu_estimates.json yet (minutes each), then prints
  python benchmarks/tpu_estimates.py --print    only prints the tables, and draws docs/growth.png

Needs the extra [aot]. All figures are compiler estimates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_suffix('.json')
B16, L16, VQKD = 'configs/beitv2_b16.py', 'configs/beitv2_l16.py', 'configs/vqkd_b16.py'
SLICES = {64: dict(v4='4x4x4', v5e='8x8', v5p='4x4x4', v6e='8x8'), 256: dict(v5e='16x16')}


def runs() -> dict[str, list[str]]:
  """{name: arguments of beitv2_jax.aot}."""
  out = {}

  def add(name, config, topology, part, *more):
    out[name] = [f'--config={config}', f'--topology={topology}', f'--part={part}', *more]

  def batch(n, accumulate=1):
    return [f'--config.batch_size={n}', f'--config.accumulate={accumulate}']

  for size, config in (('base', B16), ('large', L16)):
    add(f'student {size} 128', config, 'v5e:2x2', 'student', *batch(512, 4))
    add(f'student {size} 32', config, 'v5e:2x2', 'student', *batch(128))
  for dtype in ('float32', 'bfloat16'):
    add(f'frozen {dtype}', B16, 'v5e:2x2', 'frozen', *batch(128), f'--config.tokenizer_dtype={dtype}')
  for chips, slices in SLICES.items():
    for chip, shape in slices.items():
      for name, config in (('tokenizer', VQKD), ('base', B16), ('large', L16)):
        add(f'{name} {chip} {chips}', config, f'{chip}:{shape}', 'step')
  for n in (8, 16, 64):
    add(f'growth batch {n}', B16, 'v5e:2x2', 'student', *batch(4 * n))
  for slice_, chips in (('4x4', 16), ('8x8', 64), ('16x16', 256)):
    add(f'growth chips {chips}', B16, f'v5e:{slice_}', 'student', *batch(32 * chips))
  add('growth size 384', B16, 'v5e:2x2', 'student', *batch(32), '--config.data.image_size=384', '--config.mask.count=220')
  for depth in (6, 24):
    add(
      f'growth depth {depth}',
      B16,
      'v5e:2x2',
      'student',
      *batch(128),
      f'--config.model.depth={depth}',
      f'--config.model.early_layer={depth - 3}',
    )
  for remat in ('dots', 'full'):
    add(f'remat {remat}', B16, 'v5e:2x2', 'student', *batch(128), f'--config.layers.remat={remat}')
  add('scan', B16, 'v5e:2x2', 'student', *batch(128), '--config.layers.scan=True')
  add('first moment bf16', B16, 'v5e:2x2', 'student', *batch(128), '--config.optim.first_moment=bfloat16')
  return out


def compile_missing(only: str) -> None:
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name, args in runs().items():
    if name in results or only not in name:
      continue
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
      done = subprocess.run([sys.executable, '-m', 'beitv2_jax.aot', *args, f'--json={file.name}'], capture_output=True, text=True)
      if done.returncode > 1:
        print(f'{name}: {done.stderr.strip().splitlines()[-1]}', flush=True)
        continue
      r = json.loads(Path(file.name).read_text())
    kept = {k: v for k, v in r.items() if k not in ('operations', 'without_estimate')}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another of these may have written
    results[name] = kept | dict(arguments=args, collective_bytes=sum(m['bytes'] for m in r['collectives']))
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(
      f'{name}: {r["images_per_second_chip"]:,.0f} images/s a chip, {100 * r["share_of_peak"]:.1f} % ({time.monotonic() - start:.0f} s)',
      flush=True,
    )


GIB = 2**30


def line(r: dict) -> str:
  m, hidden = r['memory'], f'{r["images_per_second_chip"]:,.0f}'
  return (
    f'{r["images_per_chip"]:g} | {m["parameters"] / GIB:.2f} | {m["optimizer"] / GIB:.2f} | {m["temporary"] / GIB:.2f} | {m["total"] / GIB:.1f} of {m["chip"] / GIB:.0f}'
    f'{"" if m["fits"] else " (does not fit)"} | {hidden} | {100 * r["share_of_peak"]:.1f} % | {r["images_per_second_chip_no_overlap"]:,.0f} | {r["collective_bytes"] / GIB:.2f}'
  )


def show() -> None:
  results = json.loads(RESULTS.read_text())
  head = 'images a chip | parameters | optimizer | temporaries | GiB | images/s a chip | of peak | if no collective hides | GiB sent'
  print(f'| program | {head} |\n|{"---|" * 10}')
  for name in runs():
    if name in results:
      print(f'| {name} | {line(results[name])} |')
  if all(name in results for name in runs() if name.startswith('growth')):
    draw(results)


def draw(results: dict) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  panels = dict(
    batch='images a chip (224 px, 4 chips)', chips='chips (32 images each)', depth='blocks (32 images a chip)', size='image side, px'
  )
  figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.2))
  for axis, (what, label) in zip(axes, panels.items()):
    middle = {'batch': 32, 'chips': 4, 'depth': 12, 'size': 224}[what]
    points = {middle: results['student base 32']} | {int(k.split()[-1]): r for k, r in results.items() if k.startswith(f'growth {what}')}
    x = sorted(points)
    per_image = [1e3 * points[i]['seconds'] / points[i]['images_per_chip'] for i in x]
    sent = [1e3 * points[i]['collective_seconds'] / points[i]['images_per_chip'] for i in x]
    axis.plot(x, per_image, 'o-', label='compute')
    axis.plot(x, sent, 's--', label="collectives at the links' bandwidth")
    axis.set(xlabel=label, ylim=0, xscale='log' if what == 'chips' else 'linear')
  axes[0].set_ylabel('ms an image on a chip')
  axes[0].legend(fontsize=7)
  figure.suptitle('Base student on v5e, compiler estimate', fontsize=10)
  figure.tight_layout()
  figure.savefig('docs/growth.png', dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--print', action='store_true')
  parser.add_argument('--only', default='', help='programs whose name contains this')
  args = parser.parse_args()
  if not args.print:
    compile_missing(args.only)
  show()


if __name__ == '__main__':
  main()
