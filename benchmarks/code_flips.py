"""How many codes another precision of the frozen tokenizer moves: python benchmarks/code_flips.py --from DIR IMAGES...

fp32 throughout is the yardstick. 'rounded products' is what XLA makes of fp32 on a TPU by default: inputs of matrix products rounded to
bf16, sums in fp32 (done here by hand, so that a CPU can tell). bfloat16 rounds the activations too. Heads, distances and codebook are
fp32 at the highest precision in all of them.
"""

import argparse
import contextlib

import jax.numpy as jnp
import numpy as np

from beitv2_jax.downstream import trained
from beitv2_jax.downstream.codes import tokenize
from beitv2_jax.downstream.image_files import find_images
from beitv2_jax.weights import stages


@contextlib.contextmanager
def rounded():
  """Products of no stated precision take their inputs as bf16, as on a TPU; those that ask for the highest do not."""
  real = {n: getattr(jnp, n) for n in ('dot', 'einsum')}
  low = lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if getattr(x, 'dtype', None) == jnp.float32 else x
  try:
    for n, f in real.items():
      setattr(jnp, n, lambda *a, f=f, precision=None, **k: f(*(a if precision else map(low, a)), precision=precision, **k))
    yield
  finally:
    for n, f in real.items():
      setattr(jnp, n, f)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--from', dest='tokenizer', required=True)
  parser.add_argument('paths', nargs='+')
  args = parser.parse_args()
  paths, codes = find_images(args.paths), {}
  config, variables, _ = stages.load_variables(args.tokenizer)
  ways = dict(fp32=('float32', contextlib.nullcontext()), rounded=('float32', rounded()), bfloat16=('bfloat16', rounded()))
  for name, (dtype, how) in ways.items():
    config.dtype = dtype
    with how:
      codes[name] = tokenize(trained.Model(config, variables), paths)[1]
  for name in ('rounded', 'bfloat16'):
    print(f'{name}: {100 * np.mean(codes[name] != codes["fp32"]):.2f} % of {codes[name].size:,} codes differ from fp32')


if __name__ == '__main__':
  main()
