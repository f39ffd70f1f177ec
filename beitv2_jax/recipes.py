"""Recipes by name: a file of the user's own, or one of those that are shipped (configs/, installed as beitv2_jax.configs)."""

import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from beitv2_jax.errors import UserError

HELP = """Trains the stage that a recipe describes, or goes on with it.

  python -m beitv2_jax.main --config=configs/vqkd_b16.py:smoke --workdir=runs/smoke --config.optim.lr=1e-3

  --config=FILE[:ARGUMENTS]   a recipe of yours, or a shipped one; what it takes stands at its top
  --config.KEY=VALUE          any of its fields: those of beitv2_jax/config.py and of the recipe
  --workdir=DIR               where checkpoints, metrics and config.json go, and what a stopped run goes on from
  --traceback                 after an error, also where in the code it came up
  --distributed               on a TPU slice; SLURM is found by itself; elsewhere --coordinator=HOST:PORT --processes=N --process=I"""


def shipped() -> Path:
  """The folder of the recipes that come with the package."""
  from beitv2_jax import configs

  return Path(next(iter(configs.__path__)))


def resolve(argument: str) -> str:
  """'configs/vqkd_b16.py:smoke' with the path of a file: beside the user if there is one of that name, or else the shipped one."""
  path, colon, recipe_arguments = argument.partition(':')
  given = Path(path)
  if given.is_file():
    return argument
  ours = shipped() / given.name
  if given.suffix == '.py' and given.parent.name in ('', 'configs') and not given.is_absolute() and ours.is_file():
    return f'{ours}{colon}{recipe_arguments}'
  names = ', '.join(sorted(f'configs/{p.name}' for p in shipped().glob('*.py') if p.stem != '__init__'))
  raise UserError(f'no config file {path}, here or among the shipped recipes: {names}.')


def short(argument: str) -> str:
  """What `resolve` gave, as one would type it: 'configs/vqkd_b16.py:smoke' for a shipped recipe."""
  path, colon, recipe_arguments = argument.partition(':')
  return (f'configs/{Path(path).name}' if Path(path).parent == shipped() else path) + colon + recipe_arguments


def parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """absl's parser with one-line errors: config files and recipe arguments fail in many ways. Returns what is left of `argv`."""
  prefix = re.compile(r'--?config=')
  argv = list(argv)
  for i, argument in enumerate(argv):
    if found := prefix.match(argument):
      argv[i] = f'--config={resolve(argument[found.end() :])}'
    elif argument in ('--config', '-config') and i + 1 < len(argv):
      argv[i + 1] = resolve(argv[i + 1])
  given, sys.argv = sys.argv, argv  # ml_collections looks there for the fields that are set
  try:
    if any(a in ('--help', '-h', '-help', '--helpshort', '--helpfull') for a in argv):
      print(HELP)
      sys.exit(0)
    return flag_values(argv)
  except Exception as e:  # absl, ml_collections, and whatever the recipe itself raises
    raise _in_one_line(e, argv) from e
  finally:
    sys.argv = given


def _in_one_line(error: Exception, argv: list[str]) -> UserError:
  named = re.search(r'UserError: (.*)', str(error))  # raised in a recipe, wrapped by absl
  if isinstance(error, UserError) or named:
    return UserError(named[1] if named else str(error))
  found = re.search(r'\w+', str(error).replace('"', '').replace("'", ' ')) if isinstance(error, (AttributeError, KeyError)) else None
  guilty = next((a for a in argv if found and re.search(rf'\.{found[0]}\b', a.partition('=')[0])), None)
  if guilty:
    meant = re.search(r'Did you mean "(\w+)"', str(error))
    close = f' Did you mean {meant[1]}?' if meant else ''
    return UserError(f'unknown config key in {guilty}.{close} The keys are in beitv2_jax/config.py and the recipe.')
  if "no attribute 'get_config'" in str(error):
    file = next((a for a in argv if a.startswith('--config=')), '--config')
    return UserError(f'{file} is no recipe: it has no function get_config(arg).')
  kind = '' if isinstance(error, (flags.Error, ValueError, TypeError)) else f'{type(error).__name__}: '
  return UserError(kind + (str(error).splitlines() or ['the config could not be read'])[0])


def from_arguments(arguments: list[str]) -> Any:
  """The config of `--config=FILE[:ARGUMENTS] --config.KEY=VALUE ...`, as `python -m beitv2_jax.main` reads it."""
  flag_values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file('config', None, lock_config=True, flag_values=flag_values)
  left = parse(['', *arguments], flag_values)[1:]
  if left:
    raise UserError(f'unknown argument {left[0]}; --help lists those there are.')
  return given(holder.value)


def given(config: Any) -> Any:
  """`config`, or UserError if there is none."""
  if config is None:
    raise UserError('give --config=FILE, such as --config=configs/vqkd_b16.py; the shipped recipes are found from anywhere.')
  return config
