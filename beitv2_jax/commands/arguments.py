"""The words that all commands share, and how each of them starts and fails."""

import argparse
import difflib
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from beitv2_jax.errors import RunFailed, UserError

MODEL = 'a workdir (WORKDIR@STEP for a step that is not the newest), or a directory made by `convert import`'
SOURCE = 'folder:PATH, list:FILE, parquet:PATH, tfds:NAME ...: docs/data.md'


class Parser(argparse.ArgumentParser):
  """One whose errors say what a mistyped option may have meant."""

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    self._given = sys.argv[1:] if args is None else args
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    for word in (a.partition('=')[0] for a in self._given if a.startswith('--')):
      near = [] if word in self._option_string_actions else difflib.get_close_matches(word, self._option_string_actions, 1)
      message += f'. {word}: did you mean {near[0]}?' if near else ''
    super().error(message)


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
  """The parser of one command. `text`, its module's docstring, holds the explanation and an example."""
  return Parser(
    prog=f'python -m beitv2_jax {name}',
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_from(parser: Any, what: str = MODEL) -> None:
  parser.add_argument('--from', dest='source', metavar='DIR', required=True, help=what)


def add_data(parser: Any, what: str = f'images: {SOURCE}', **more: Any) -> None:
  parser.add_argument('--data', metavar='SOURCE', help=what, **more)
  parser.add_argument('--data-dir', default='', metavar='DIR', help='where tfds keeps prepared data sets')


def add_images(parser: Any) -> None:
  parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, or folders of them')


def add_out(parser: Any, what: str, default: Path | None = None) -> None:
  parser.add_argument('--out', type=Path, default=default, metavar='PATH', help=what + (f' ({default})' if default else ''))


def add_json(parser: Any) -> None:
  parser.add_argument('--json', type=Path, metavar='FILE', help='write the result there, as JSON')


def settings(pairs: list[str]) -> dict[str, str]:
  """{KEY: VALUE} of what --set was given. Raises UserError for what is no pair."""
  wrong = next((pair for pair in pairs if '=' not in pair), None)
  if wrong is not None:
    raise UserError(f'--set {wrong}: give KEY=VALUE.')
  return dict(pair.split('=', 1) for pair in pairs)


def add_batch(parser: Any, default: int) -> None:
  parser.add_argument('--batch', type=at_least(1), default=default, metavar='N', help=f'images at a time, over all devices ({default})')


def at_least(least: int) -> Callable[[str], int]:
  """An argparse type: a whole number that is not below `least`."""

  def number(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least:
      raise argparse.ArgumentTypeError(f'{text}: a whole number, at least {least}')
    return value

  return number


def write_json(path: Path | None, result: Any) -> None:
  """Where --json says, if it does."""
  if path:
    path.expanduser().parent.mkdir(parents=True, exist_ok=True)
    path.expanduser().write_text(json.dumps(result, indent=2) + '\n')


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
  """For the `main` of a command. Bad input, or a path that cannot be read or written, is one line on stderr and exit code 2; work that
  failed 1; Ctrl-C 130."""

  @functools.wraps(main)
  def wrapped(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[2:] if argv is None else argv)
    told = '--traceback' in argv  # any command takes it: after an error, also where in the code it came up
    argv = [a for a in argv if a != '--traceback']
    try:
      return main(argv) or 0
    except BrokenPipeError:  # as into `head`
      sys.stderr.close()
      return 0
    except (UserError, OSError) as e:
      return _failed(e, 2, told)
    except (FloatingPointError, RunFailed) as e:
      return _failed(e, 1, told)
    except KeyboardInterrupt:
      print('stopped.', file=sys.stderr)
      return 130
    except SystemExit as e:  # argparse has said why
      return e.code if isinstance(e.code, int) else 0 if e.code is None else 1

  return wrapped


def _failed(error: Exception, code: int, told: bool) -> int:
  if told:
    traceback.print_exception(error)
  print(f'error: {" ".join(str(error).splitlines())}', file=sys.stderr)
  return code
