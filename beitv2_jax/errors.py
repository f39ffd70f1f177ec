"""Errors a user can act on."""


class UserError(Exception):
  """Bad input. The message says what to do; command lines print it alone, without a traceback."""


class SaveError(RuntimeError):
  """A checkpoint could not be written; older ones are intact."""
