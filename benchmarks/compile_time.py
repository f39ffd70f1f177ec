"""What it costs to compile a recipe's initialisation and step (on TPUs also the program of the first steps), with nothing cached:

  python benchmarks/compile_time.py --config=configs/beitv2_b16.py                                             for the CPU
  python benchmarks/compile_time.py --topology=v5e:2x2 --config=configs/beitv2_b16.py --config.batch_size=128  for TPUs that are not there

Seconds of CPU of this process, and seconds on the clock. "Traced" is what Python and jax do before the compiler's turn: with a full cache that is what is
left, and to read the program. Nothing is run, and no weights are needed. TPUs need the extra [aot]; the compiler does not write down its
schedules here, as it does for `python -m beitv2_jax aot`, which takes half as long again.
"""

import argparse
import time
from unittest import mock

import jax

from beitv2_jax import compiler, recipes
from beitv2_jax.costs import estimate


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topology', help='TPUs that are not there, such as v5e:2x2')
  args, rest = parser.parse_known_args()
  config = recipes.from_arguments(rest)
  with mock.patch.object(estimate, 'with_schedules', lambda flags: flags):
    devices = estimate.topology_devices(args.topology) if args.topology else jax.devices()[:1]
  jax.config.update('jax_enable_compilation_cache', False)
  first_steps = {'first steps': 'step'} if args.topology else {}
  for name, part in (dict(init='init') | first_steps | dict(step='step')).items():
    begun = time.monotonic(), time.process_time()
    lowered = estimate.lower(config, devices, part)[0]
    traced = time.process_time() - begun[1]
    lowered.compile(compiler_options=compiler.options(config, runs_once=part == 'init', device=devices[0], quick=name == 'first steps'))
    clock, cpu = time.monotonic() - begun[0], time.process_time() - begun[1]
    print(f'{name}: {cpu:.1f} s of CPU, of these {traced:.1f} traced; {clock:.1f} s', flush=True)


if __name__ == '__main__':
  main()
