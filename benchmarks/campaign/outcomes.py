"""What an attack can end in."""

import traceback
from collections.abc import Callable
from typing import Any

from beitv2_jax.errors import RunFailed, UserError

GOOD = 'right'  # nothing lost, or mended by itself
SAID = 'refused in a line'
TRACEBACK, WRONG, HANG, MEMORY = 'traceback', 'wrong', 'over 60 s', 'over 4 GiB'
OUTCOMES = (GOOD, SAID, TRACEBACK, WRONG, HANG, MEMORY)
BAD = OUTCOMES[2:]


def of(work: Callable[[], Any]) -> tuple[str, str]:
  """(outcome, what was said) of calling `work`, which returns '' if all is right, or what is wrong."""
  try:
    problem = work()
  except (UserError, RunFailed, FloatingPointError) as e:
    return (SAID, str(e)) if '\n' not in str(e) else (TRACEBACK, str(e))
  except Exception as e:  # what a user would see as a traceback
    ours = [f for f in traceback.extract_tb(e.__traceback__) if 'beitv2_jax' in f.filename]
    where = f'{ours[-1].filename}:{ours[-1].lineno}' if ours else ''
    return TRACEBACK, f'{type(e).__name__}: {str(e)[:200]} {where}'
  return (WRONG, problem) if problem else (GOOD, '')


def of_process(code: int | None, text: str, problem: Callable[[], str]) -> tuple[str, str]:
  """The same for a command that ended with `code` (None: it had to be killed) and printed `text`."""
  if code is None:
    return HANG, text[-300:]
  if 'Traceback (most recent call last)' in text or code < 0 or code == 134:
    return TRACEBACK, text[max(text.find('Traceback') - 200, 0) :][:1500]
  if code in (1, 2):
    return SAID, text.strip().splitlines()[-1][:300] if text.strip() else 'nothing'
  wrong = problem() if code == 0 else ''
  return (WRONG, wrong) if wrong else (GOOD, '')
