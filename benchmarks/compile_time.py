"""What it costs to compile a recipe's initialisation and step for the CPU: python benchmarks/compile_time.py --config=configs/beitv2_b16.py

Seconds of CPU of this process, and seconds on the clock, with nothing cached. Nothing is run, and no weights are needed. For TPUs:
python -m beitv2_jax aot --config=... --part=init (or step), whose report has the same figures.
"""

import sys
import time

import jax

from beitv2_jax import recipes
from beitv2_jax.costs import estimate


def main() -> None:
  config = recipes.from_arguments(sys.argv[1:])
  jax.config.update('jax_enable_compilation_cache', False)
  for part in ('init', 'step'):
    clock, cpu = time.monotonic(), time.process_time()
    estimate.lower(config, jax.devices()[:1], part)[0].compile()
    print(f'{part}: {time.process_time() - cpu:.1f} s of CPU, {time.monotonic() - clock:.1f} s', flush=True)


if __name__ == '__main__':
  main()
