"""Errors a user can act on."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
  """Bad input. The message says what to do; command lines print it alone, without a traceback."""


class SaveError(RuntimeError):
  """A checkpoint could not be written; older ones are intact."""


def one_line(main: Callable[..., int | None]) -> Callable[..., int]:
  """For the `main` of a command line: bad input, or a path that cannot be read or written, is one line on stderr and exit code 2, Ctrl-C is 130."""

  @functools.wraps(main)
  def wrapped(*args, **kwargs) -> int:
    try:
      return main(*args, **kwargs) or 0
    except (UserError, OSError) as e:
      print(f'error: {e}', file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print('stopped.', file=sys.stderr)
      return 130

  return wrapped
