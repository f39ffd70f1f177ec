"""A training step as two programs: one that is quick to compile, for a run's first steps, and the fast one, which is compiled meanwhile.

The fast program takes a TPU's host minutes to compile. With the quick one a run shows its first losses, or what is wrong, in a quarter of that.
"""

from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from beitv2_jax import compiler
from beitv2_jax.errors import UserError


class TrainStep:
  """`step(number, *arguments)` does what `jitted` does. The number of a step alone decides which program makes it, so that a run that is
  repeated, or stopped and resumed, comes to the same figures however long compiling takes.
  """

  def __init__(self, jitted: Any, config: Any, steps: int, say: Callable[[str], None]):
    self.jitted, self.config, self.steps, self.say = jitted, config, steps, say
    self.first_steps = compiler.first_steps(config)
    self.quick: Any = None
    self.fast: futures.Future | None = None

  def __call__(self, number: int, *arguments: Any) -> Any:
    if number >= self.first_steps:
      if self.quick:
        self.quick = None
        self.jitted.clear_cache()  # or the quick program's code would stay in the memory of the devices
      return (self.fast.result() if self.fast else self.jitted)(*arguments)
    if self.quick is None:
      lowered = self.jitted.lower(*arguments)
      try:
        self.quick = lowered.compile(compiler_options=compiler.options(self.config, quick=True))
      except jax.errors.JaxRuntimeError as e:  # it may need more memory than the fast one
        if jax.process_count() > 1:  # all must run the same program
          raise UserError(f'the program of the first steps does not compile; --config.quick_steps=0 does without it. {e}') from e
        self.say(f'no program that is quick to compile, so the first step takes longer: {"".join(str(e).splitlines()[:1])[:200]}')
        self.first_steps = 0
        return self.jitted(*arguments)
      if self.steps > self.first_steps:  # and not earlier: beside another compilation the first step would come later
        self.fast = futures.ThreadPoolExecutor(1).submit(lowered.compile)
    elif self.fast and self.fast.done():
      self.fast.result()  # raises what went wrong
    return self.quick(*arguments)

  def must_wait(self, number: int) -> bool:
    """Is the program that makes this step still being compiled?"""
    return number >= self.first_steps and self.fast is not None and not self.fast.done()

  def wait(self, seconds: float) -> None:
    """Until that program is compiled, or so long."""
    if self.fast:
      futures.wait([self.fast], seconds)
