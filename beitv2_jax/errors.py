"""Errors a user can act on."""


class UserError(Exception):
  """Bad input. The message says what to do; command lines print it alone, without a traceback."""


class RunFailed(RuntimeError):
  """A run cannot go on for a reason outside of it. Its checkpoints are intact, and the same command goes on from them."""


class SaveError(RunFailed):
  """Something could not be written."""
