"""The tables of docs/estimates.md, which come from the TPU compiler: every program compiled for chips that are not there.

  python benchmarks/tpu_estimates.py            compiles what benchmarks/tpu_estimates.json lacks, or has with other arguments (minutes each),
                                                then prints; † marks rows of older code
  python benchmarks/tpu_estimates.py --print    only prints the tables
  python benchmarks/tpu_estimates.py --draw     draws docs/growth.png of them; needs matplotlib, which no extra has

Needs the extra [aot]. All figures are compiler estimates. Rows of older code stay, marked †, until deleted from the file.
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
CODE = 4  # raised when what the programs do changes: rows of a smaller number are marked in the tables


def runs() -> dict[str, list[str]]:
  """{name: arguments of python -m beitv2_jax aot}."""
  out = {}

  def add(name, config, topology, part, *more):
    out[name] = [f'--config={config}', f'--topology={topology}', f'--part={part}', *more]

  def batch(n, accumulate=1):
    return [f'--config.batch_size={n}', f'--config.accumulate={accumulate}']

  add('student base 256', B16, 'v5e:2x2', 'student', *batch(1024, 4))
  add('student large 128', L16, 'v5e:2x2', 'student', *batch(512, 4))
  for chip, topology, parts in (('v6e', 'v6e:2x2', 4), ('tpu7x', 'tpu7x:2x2x1', 2)):  # these need jax 0.11.2
    add(f'student base {chip} 128', B16, topology, 'student', *batch(512, parts))
    add(f'student large {chip} 128', L16, topology, 'student', *batch(512, parts))
  add('student base 32', B16, 'v5e:2x2', 'student', *batch(128))
  for dtype in ('float32', 'bfloat16'):
    add(f'frozen {dtype}', B16, 'v5e:2x2', 'frozen', *batch(128), f'--config.tokenizer_dtype={dtype}')
  for chips, slices in SLICES.items():
    for chip, shape in slices.items():
      for name, config in (('tokenizer', VQKD), ('base', B16), ('large', L16)):
        add(f'{name} {chip} {chips}', config, f'{chip}:{shape}', 'step')
  for n in (8, 16, 64):
    add(f'growth batch {n}', B16, 'v5e:2x2', 'student', *batch(4 * n))
  add('base v5e 16', B16, 'v5e:4x4', 'step', *batch(2048, 4))  # and on 64 and 256 chips, above
  add('growth size 384', B16, 'v5e:2x2', 'student', *batch(32), '--config.data.image_size=384', '--config.mask.count=220')
  add('fine-tuning base v5e 4', 'configs/finetune_b16.py', 'v5e:2x2', 'step', *batch(1024, 4))
  add('fine-tuning base v5e 4, 384 px', 'configs/finetune_b16.py', 'v5e:2x2', 'step', *batch(1024, 16), '--config.data.image_size=384')
  add('UperNet base v5e 4', 'configs/ade20k_b16.py', 'v5e:2x2', 'step')
  for remat in ('dots', 'full'):
    add(f'remat {remat}', B16, 'v5e:2x2', 'student', *batch(128), f'--config.layers.remat={remat}')
  add('first moment bf16', B16, 'v5e:2x2', 'student', *batch(128), '--config.optim.first_moment=bfloat16')
  return out


def compile_missing(only: str) -> None:
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name, args in runs().items():
    if results.get(name, {}).get('arguments') == args or only not in name:
      continue
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
      done = subprocess.run([sys.executable, '-m', 'beitv2_jax', 'aot', *args, f'--json={file.name}'], capture_output=True, text=True)
      text = Path(file.name).read_text()
      if not text:
        print(f'{name}: {done.stderr.strip().splitlines()[-1]}', flush=True)
        continue
      r = json.loads(text)
    kept = {k: v for k, v in r.items() if k not in ('operations', 'without_estimate')}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another of these may have written
    results[name] = kept | dict(code=CODE, arguments=args, collective_bytes=sum(m['bytes'] for m in r['collectives']))
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(
      f'{name}: {r["images_per_second_chip"]:,.0f} images/s a chip, {100 * r["share_of_peak"]:.1f} % ({time.monotonic() - start:.0f} s)',
      flush=True,
    )


def number(key: str, form: str = '{:,.0f}', unit: int = 1):
  """A column of figures, of which a row may lack one."""
  return lambda r: form.format(r[key] / unit) if key in r else '–'


COLUMNS = {
  'images a chip': lambda r: f'{r["images_per_chip"]:g}',
  'images/s a chip': number('images_per_second_chip'),
  'of peak': lambda r: f'{100 * r["share_of_peak"]:.1f} %',
  'as scheduled': number('images_per_second_chip_scheduled'),
  'if no collective hides': number('images_per_second_chip_no_overlap'),
  'GiB sent': number('collective_bytes', '{:.2f}', 2**30),
  'GiB a chip': lambda r: (
    f'{r["memory"]["total"] / 2**30:.1f} of {r["memory"]["chip"] / 2**30:.0f}' + ' (too much)' * (not r['memory']['fits'])
  ),
}


def show() -> None:
  """Three tables: whole steps on slices, parts of a step on one host, and what grows with what."""
  results = json.loads(RESULTS.read_text())
  slices = [name for name in runs() if runs()[name][2] == '--part=step']
  growth = [name for name in runs() if name.startswith('growth')]
  for title, names in (
    ('step', slices),
    ('growth', ['student base 32', *growth]),
    ('part', [n for n in runs() if n not in slices + growth]),
  ):
    print(f'\n| {title} | {" | ".join(COLUMNS)} |\n|{"---|" * (len(COLUMNS) + 1)}')
    for name in names:
      if name in results:
        older = ' †' * (results[name].get('code', 1) < CODE)
        print(f'| {name}{older} | {" | ".join(column(results[name]) for column in COLUMNS.values())} |')


# Panels of docs/growth.png: label of the axis, and the program at each point.
PANELS = {
  'images a chip': {8: 'growth batch 8', 16: 'growth batch 16', 32: 'student base 32', 64: 'growth batch 64'},
  'chips that share a batch of 2048': {n: f'base v5e {n}' for n in (16, 64, 256)},
  'image side, px': {224: 'growth batch 8', 384: 'growth size 384'},
}


def draw() -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  results = json.loads(RESULTS.read_text())
  figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 3.2))
  for axis, (label, programs) in zip(axes, PANELS.items()):
    points = {x: results[name] for x, name in programs.items() if name in results}
    for what, style, key in (
      ('compute', 'o-', 'seconds'),
      ('transfers', 's--', 'collective_seconds'),
      ('of these, with nothing computed beside', '^:', 'waited_seconds'),
    ):
      axis.plot(points.keys(), [1e3 * r.get(key, float('nan')) / r['images_per_chip'] for r in points.values()], style, label=what)
    axis.set(xlabel=label, ylim=0, xscale='log' if 'chips' in label else 'linear', xticks=list(points), xticklabels=list(points))
    axis.minorticks_off()
  axes[0].set_ylabel('ms an image on a chip')
  axes[0].legend(fontsize=7)
  figure.suptitle('Base on v5e, compiler estimate: the student, and (second) the whole step', fontsize=10)
  figure.tight_layout()
  figure.savefig('docs/growth.png', dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--print', action='store_true')
  parser.add_argument('--draw', action='store_true')
  parser.add_argument('--only', default='', help='programs whose name contains this')
  args = parser.parse_args()
  if not (args.print or args.draw):
    compile_missing(args.only)
  draw() if args.draw else show()


if __name__ == '__main__':
  main()
