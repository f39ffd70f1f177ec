"""A config's training step, compiled for TPUs with XLA's own TPU compiler on a machine that has none (the extra [aot]).

The report says what it costs: bytes per chip, operations, the compiler's estimate of its time, collectives, the dearest operations, and what
to change if it does not fit. All times are compiler estimates, not measurements.
"""

import dataclasses
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax import tasks
from beitv2_jax.costs import flops, hlo
from beitv2_jax.errors import UserError
from beitv2_jax.models.images import vqkd_images
from beitv2_jax.training import optim, sharding
from beitv2_jax.training.train_state import TrainState, state_layout
from beitv2_jax.training.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Chip:
  """Makers' figures: clock in GHz, bf16 TFLOP/s, memory in GiB and its bandwidth and that of all links together in GB/s."""

  clock: float
  peak: float
  memory: float
  bandwidth: float
  links: float
  two_cores: bool = False  # that work as one device


# Clocks that make the compiler's cycles agree with the public peaks; links as published (total per chip, both directions).
CHIPS = {
  'v4': Chip(1.05, 275, 32, 1228, 300, True),
  'v5e': Chip(1.5, 197, 16, 819, 200),
  'v5p': Chip(1.75, 459, 95, 2765, 600, True),
  'v6e': Chip(1.75, 918, 32, 1640, 448),
}


_SCHEDULES = tempfile.TemporaryDirectory(prefix='beitv2_jax_aot_')


def schedule_lengths() -> dict[str, int]:
  """{operation: instructions it was scheduled into} of what was compiled since the last call."""
  lengths = {}
  for file in Path(_SCHEDULES.name).iterdir():
    name = re.fullmatch(r'\d+-(.+)-\d+-schedule-analysis_final_bundles.txt', file.name)
    length = name and re.search(r'total scheduled bundles:\s+(\d+)', file.read_text(errors='replace'))
    if length:
      lengths[name[1]] = int(length[1])
    file.unlink()
  return lengths


def topology_devices(name: str) -> list:
  """The devices of a slice that is not there. Raises UserError if libtpu is not installed or does not know the slice."""
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+x\d+(x\d+)?', shape):
    raise UserError(f'--topology={name}: use one of {", ".join(CHIPS)}, a colon and the slice, such as v5e:4x4 or v4:2x2x1.')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
  # The compiler writes down its schedule of every operation, which is all that is to be had for our own kernels.
  dump = f'--xla_jf_dump_to={_SCHEDULES.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'
  os.environ.setdefault('LIBTPU_INIT_ARGS', dump)
  try:
    from jax.experimental import topologies

    # v4 comes as two devices a chip unless told otherwise; v5p is one by itself.
    config = dict(chip_config_name='megacore') if kind == 'v4' else {}
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **config).devices)
  except Exception as e:  # whatever libtpu raises
    first = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
    raise UserError(f"the TPU compiler does not give {name} ({first}). It needs libtpu: pip install -e '.[aot]'.") from e


def abstract_batch(c: Any, mesh: Any, part: str) -> dict[str, jax.ShapeDtypeStruct]:
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  like = lambda shape, dtype: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype, sharding=split)
  batch = {'image': like(config_lib.image_shape(c), jnp.uint8)}
  if c.task == 'classifier':
    batch['label'] = like((), jnp.int32)
  if c.task == 'segmenter':
    batch['mask'] = like(config_lib.image_shape(c)[:2], jnp.uint8)
  if 'mask' in c:
    batch['mask_index'] = like((c.mask.count,), jnp.int32)
    if part == 'student':
      batch['codes'] = like((int(np.prod(config_lib.patch_grid(c))),), jnp.int32)
  return batch


def lower(c: Any, devices: list, part: str) -> tuple[Any, Any, Any]:
  """(lowered program, mesh, abstract state) of a config's step on these devices."""
  mesh = sharding.make_mesh(c.mesh.data, c.mesh.model, devices)
  data = mesh.shape['data']
  if c.batch_size % (data * c.accumulate):
    raise UserError(f'batch_size={c.batch_size} does not divide over {data} chips x accumulate={c.accumulate}; give --config.batch_size.')
  task, frozen = tasks.make(c, abstract=True)
  everywhere = sharding.replicated(mesh)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
  frozen, key = jax.tree.map(place, frozen), place(jax.eval_shape(lambda: jax.random.key(0)))
  batch = abstract_batch(c, mesh, part)
  tx, schedule = optim.make(c.optim, 1000, 10)
  layout = state_layout(task, tx, mesh, c)
  state = layout.targets()
  if part == 'init':
    with jax.set_mesh(mesh):
      return layout.init.lower(key), mesh, state
  if part == 'frozen':
    if c.task != 'pretrain':
      raise UserError('--part=frozen looks at the frozen tokenizer of a pretraining config.')

    tokenizer: Any = task.tokenizer  # ty: ignore[missing-attribute]
    run = jax.jit(lambda frozen, image: tokenizer.apply(frozen, vqkd_images(image), method='tokens'))
    state = TrainState(state.step, frozen, {}, {})
    with jax.set_mesh(mesh):
      return run.lower(frozen, batch['image']), mesh, state
  if part == 'student' and c.task != 'pretrain':
    raise UserError('--part=student is for pretraining configs.')
  step = make_train_step(task, tx, schedule, c.accumulate, layout)
  step = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, everywhere))
  with jax.set_mesh(mesh):
    return step.lower(state, {} if part == 'student' else frozen, batch, key), mesh, state


def bytes_per_chip(tree: Any) -> int:
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report(c: Any, topology: str, part: str = 'step', keep_hlo: str | None = None) -> dict[str, Any]:
  """Compiles and reads the program. Times are compiler estimates."""
  devices = topology_devices(topology)
  chip = CHIPS[topology.partition(':')[0]]
  per_chip = len({tuple(d.coords) for d in devices})
  start = time.monotonic()
  lowered, mesh, state = lower(c, devices, part)
  compiled = lowered.compile()
  seconds = time.monotonic() - start
  lengths = schedule_lengths()
  cores = 2 if chip.two_cores and per_chip == len(devices) else 1

  def kernel_cycles(names, turns, moved):
    """As long as its schedule, one instruction a cycle, or as its bytes take: memory stalls are not in the schedule."""
    length = max((lengths[n] for n in names if n in lengths), default=None)
    return None if length is None else max(length * turns // cores, int(moved / chip.bandwidth * chip.clock))

  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
      f'jax {jax.__version__} cannot read the program that libtpu made for {topology} ({str(e).splitlines()[0][:120]}). jax 0.11.2, which '
      'needs Python 3.12, can.'
    ) from e
  if keep_hlo:
    Path(keep_hlo).write_text(text)
  program = hlo.Program(text, kernel_cycles)
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  needed = flops.per_image(c)
  per_image = {'step': sum(needed.values()), 'student': needed['student'], 'frozen': sum(v for k, v in needed.items() if k != 'student')}[
    part
  ]
  images = c.batch_size / per_chip
  moved = program.collectives()
  compute = program.cycles() / chip.clock / 1e9
  linked = sum(m['bytes'] for m in moved) / (chip.links * 1e9)
  rate = images / compute if compute else float('nan')
  return dict(
    topology=topology, chips=per_chip, mesh=dict(mesh.shape), task=c.task, part=part, batch_size=c.batch_size, images_per_chip=images,
    compile_seconds=round(seconds, 1),
    memory=dict(
      parameters=bytes_per_chip(state.params), optimizer=bytes_per_chip(state.opt_state), temporary=memory.temp_size_in_bytes,
      total=used, chip=int(chip.memory * 2**30), fits=used < chip.memory * 2**30,
    ),
    model_gflop_per_image=per_image / 1e9,
    cycles=program.cycles(), seconds=compute, collective_seconds=linked,
    images_per_second_chip=rate, share_of_peak=rate * per_image / (chip.peak * 1e12),
    images_per_second_chip_no_overlap=images / (compute + linked) if compute else float('nan'),
    collectives=moved, operations=program.dearest(), without_estimate=program.without_estimate(), unknown_loops=program.unknown_loops,
  )  # fmt: skip


def advice(c: Any, r: dict) -> str:
  if r['memory']['fits']:
    return ''
  steps = []
  if c.layers.remat == 'none':
    steps.append('--config.layers.remat=dots (or full)')
  steps.append(f'--config.accumulate={2 * c.accumulate}')
  steps.append(
    "sharding the parameters also while they are used (FSDP): --config.mesh.rules=\"(('heads','model'),('mlp','model'),('vocab','model'),('embed','data'))\""
  )
  return 'It does not fit. Try ' + ', '.join(steps) + ', or a larger slice.'


def show(r: dict, top: int) -> str:
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  m = r['memory']
  lines = [
    f'{r["task"]} ({r["part"]}) on {r["topology"]}: {r["chips"]} chips, mesh {r["mesh"]}, {r["images_per_chip"]:g} images a chip; compiled in {r["compile_seconds"]} s',
    '',
    f'memory a chip       {gib(m["total"])} of {gib(m["chip"])}{"" if m["fits"] else "   DOES NOT FIT"}',
    f'  parameters        {gib(m["parameters"])}',
    f'  optimizer         {gib(m["optimizer"])}',
    f'  temporaries       {gib(m["temporary"])} (activations, gradients)',
    f'model operations    {r["model_gflop_per_image"]:.1f} GFLOP an image',
    f'compiler estimate   {r["cycles"] / 1e6:.1f} M cycles, {1e3 * r["seconds"]:.1f} ms a step',
    f'                    {r["images_per_second_chip"]:,.0f} images/s a chip, {100 * r["share_of_peak"]:.1f} % of peak, if collectives hide behind compute',
    f"                    {r['images_per_second_chip_no_overlap']:,.0f} images/s a chip if none of them does ({1e3 * r['collective_seconds']:.1f} ms at the links' bandwidth)",
    '',
  ]
  if r['collectives']:
    lines += ['collectives             times a step       bytes a chip']
    lines += [f'  {x["kind"]:22s}{x["count"]:10d}{gib(x["bytes"]):>20s}' for x in r['collectives']] + ['']
  lines += ['dearest operations (compiler estimate)      share   times']
  total = max(r['cycles'], 1)
  lines += [f'  {x["name"][:60]:60s}{100 * x["cycles"] / total:6.1f} %{x["count"]:6d}' for x in r['operations'][:top]]
  if r['without_estimate']:
    kinds = ', '.join(f'{k} ({n})' for k, n in r['without_estimate'].items())
    lines += ['', f'without an estimate, so not in the time: {kinds}']
  if r['unknown_loops']:
    lines.append(f'{r["unknown_loops"]} loops whose number of turns is not in the program count as one turn.')
  return '\n'.join(lines)
