"""What training changes: parameters, codebook, optimizer state. And where each array of it lies on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beitv2_jax import compiler
from beitv2_jax.training import sharding


class TrainState(NamedTuple):
  step: jax.Array
  params: Any
  model_state: Any  # collections that are not trained by gradient, such as the codebook
  opt_state: Any

  def split(self) -> tuple[dict, dict]:
    """(what the next stage needs, what only this run needs), as they are saved."""
    return {'params': self.params, **self.model_state}, {'step': self.step, 'opt_state': self.opt_state}

  @classmethod
  def join(cls, variables: Any, optimizer: Any) -> 'TrainState':
    model_state = {k: v for k, v in variables.items() if k != 'params'}
    return cls(optimizer['step'], variables['params'], model_state, optimizer['opt_state'])


class StateLayout(NamedTuple):
  """Shapes and places of a state, known before any of its arrays exists."""

  abstract: TrainState  # shapes and types
  shardings: TrainState  # where the arrays lie between steps
  gathered: dict  # where the variables lie while a step uses them
  init: Any  # jitted: key → a state that is sharded from the start

  def targets(self) -> TrainState:
    """`abstract` with the shardings in it, as Orbax and the compiler take it."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings)


def state_layout(task: Any, optimizer: Any, mesh: Any, config: Any) -> StateLayout:
  """Plans the state of `task` on `mesh`, as the config's `mesh` section says. Raises UserError if an axis does not divide."""
  mesh_config = config.mesh
  make_variables = jax.jit(task.init)  # traced once, for shapes and for the program
  variables, gathered = sharding.variable_shardings(mesh, mesh_config.rules, make_variables, jax.random.key(0))
  placed = gathered
  if mesh_config.shard_state:  # the parameters, and an average of them
    like = jax.tree.structure(variables['params'])
    split = lambda v, s: sharding.split_over_data(mesh, v, s) if jax.tree.structure(v) == like else s
    placed = {name: split(collection, gathered[name]) for name, collection in variables.items()}
  moments, moments_placed = sharding.optimizer_shardings(mesh, optimizer, variables['params'], placed['params'])
  abstract = TrainState.join(variables, dict(step=jax.ShapeDtypeStruct((), jnp.int32), opt_state=moments))
  shardings = TrainState.join(placed, dict(step=sharding.replicated(mesh), opt_state=moments_placed))

  def init(key):
    variables = sharding.unbox(make_variables(key))
    return TrainState.join(variables, dict(step=jnp.zeros((), jnp.int32), opt_state=optimizer.init(variables['params'])))

  return StateLayout(
    abstract,
    shardings,
    gathered,
    jax.jit(init, out_shardings=shardings, compiler_options=compiler.options(config, runs_once=True)),
  )
