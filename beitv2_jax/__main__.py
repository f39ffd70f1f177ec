"""python -m beitv2_jax: the commands, and what each is for."""

import sys

from beitv2_jax import commands


def main(argv: list[str] | None = None) -> int:
  """Runs the command that `argv` names (sys.argv if None); without one, lists them."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help'):
    print(commands.overview())
    return 0
  if argv[0] == '--version':
    from beitv2_jax import __version__

    print(__version__)
    return 0
  return commands.run(argv[0], argv[1:])


if __name__ == '__main__':
  code = main()
  if sys.argv[1:2] == ['train']:
    from beitv2_jax.main import end

    end(code)
  sys.exit(code)
