"""The error a user can mend: main prints its one line, without a traceback, and exits with code 2."""


class UserError(ValueError):
  """Bad input. The message says what was wrong and what to do."""
