"""A trace of some steps, for TensorBoard, Perfetto or benchmarks/trace.py."""

from pathlib import Path
from typing import Any

import jax

WARM_UP = 10  # steps before the trace


class Profile:
  """Traces `steps` steps, after WARM_UP of them, into `directory`; 0 traces none."""

  def __init__(self, directory: Path, steps: int):
    self.directory, self.steps, self.done, self.on = directory, steps, 0, False

  def step(self, metrics: Any) -> None:
    """To be called after a step was dispatched, with its metrics."""
    self.done += 1
    if self.steps and self.done == WARM_UP:
      jax.block_until_ready(metrics)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # tracing every Python call slows all threads down
      jax.profiler.start_trace(str(self.directory), profiler_options=options)
      self.on = True
    elif self.on and self.done == WARM_UP + self.steps:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    if self.on:
      jax.profiler.stop_trace()
    self.on = False
