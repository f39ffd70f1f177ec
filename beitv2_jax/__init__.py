"""BEiT v2 in JAX: VQ-KD tokenizer, masked image modelling on its codes, and what comes after."""

from pathlib import Path

__version__ = '0.1.0'

if (
  Path(__file__).parents[1] / 'configs' / 'vqkd_b16.py'
).is_file():  # a checkout, perhaps not installed: its configs/ is beitv2_jax.configs
  __path__.append(str(Path(__file__).parents[1]))


# The Python door. jax is imported only when it is needed.
def load(directory, ema=False):
  """A trained model, ready to be asked: a beitv2_jax.downstream.trained.Model.

  Args:
    directory: a workdir (its newest whole checkpoint), WORKDIR@STEP, or what `python -m beitv2_jax convert import` made.
    ema: the running average of the weights instead, where training kept one (ema_decay).
  Raises UserError if there is none.
  """
  from beitv2_jax.downstream import trained

  return trained.load(directory, ema)


def recipe(file, changes=None):
  """The config of a recipe, as the command line reads it: recipe('configs/vqkd_b16.py:small_data', {'data.source': 'folder:PATH'}).

  Args:
    file: a file of yours or one that is shipped, with its arguments after a colon.
    changes: {field: value}, with dots, as --config.FIELD=VALUE.
  Raises UserError for a file, an argument or a field that there is not.
  """
  from beitv2_jax import recipes

  return recipes.from_arguments([f'--config={file}', *(f'--config.{field}={value}' for field, value in (changes or {}).items())])


def train(config, workdir):
  """Trains the stage of a config in `workdir`, or goes on there, as `python -m beitv2_jax.main` does. Returns the last evaluation, a dict.

  Raises UserError for bad input; Interrupted after a signal, FloatingPointError where the loss is not finite: the state is saved.
  """
  from beitv2_jax import storage
  from beitv2_jax.training import loop, process

  process.quiet_threads()
  process.use_compilation_cache(storage.place(workdir))
  return loop.run(config, workdir)
