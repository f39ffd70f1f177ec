"""A config's training step, compiled for TPUs with XLA's own TPU compiler on a machine that has none (the extra [aot]).

The report says what it costs: bytes per chip, operations, the compiler's estimate of its time, collectives, the dearest operations, and what
to change if it does not fit. All times are compiler estimates, not measurements.
"""

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax import compiler, tasks
from beitv2_jax import config as config_lib
from beitv2_jax.costs import hlo, operations, schedules
from beitv2_jax.errors import UserError
from beitv2_jax.models import flops
from beitv2_jax.models.images import vqkd_images
from beitv2_jax.models.layers import cut_pixels
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
  # docs.cloud.google.com/tpu/docs/tpu7x; a chip is two devices, each with half of everything. Its links (1,200 GB/s) are counted as v5p's,
  # which that page gives as 1,200 and older ones as 600.
  'tpu7x': Chip(2.2, 2307, 192, 7380, 600),
}


_SCHEDULES = tempfile.TemporaryDirectory(prefix='beitv2_jax_aot_')


def topology_devices(name: str) -> list:
  """The devices of a slice that is not there. Raises UserError if libtpu is not installed or does not know the slice."""
  kind, _, shape = name.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+x\d+(x\d+)?', shape):
    raise UserError(f'--topology={name}: use one of {", ".join(CHIPS)}, a colon and the slice, such as v5e:4x4 or v4:2x2x1.')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # several may compile at once: none holds a chip
  os.environ['LIBTPU_INIT_ARGS'] = with_schedules(os.environ.get('LIBTPU_INIT_ARGS', ''))
  try:
    from jax.experimental import topologies

    # v4 comes as two devices a chip unless told otherwise; v5p is one by itself.
    config = dict(chip_config_name='megacore') if kind == 'v4' else {}
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **config).devices)
  except Exception as e:  # whatever libtpu raises
    first = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
    raise UserError(f"the TPU compiler does not give {name} ({first}). It needs libtpu: pip install -e '.[aot]'.") from e


def with_schedules(flags: str) -> str:
  """The TPU compiler's `flags`, and those that have it write down its schedule of every operation: all that is to be had for our kernels."""
  dump = f'--xla_jf_dump_to={_SCHEDULES.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'
  return flags if dump in flags else f'{flags} {dump}'.strip()


def abstract_batch(config: Any, mesh: Any, part: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a training batch, split over the mesh's `data` axis."""
  like = lambda shape, dtype: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding.split_rows(mesh))
  batch = {'image': like(config_lib.image_shape(config), jnp.uint8)}
  if config.task == 'tokenizer' and config.teacher.kind == 'disk':
    batch['teacher'] = like((int(np.prod(config_lib.patch_grid(config))), config.model.teacher_width), jnp.uint16)
  if config.task == 'classifier':
    batch['label'] = like((), jnp.int32)
  if config.task == 'segmenter':
    batch['mask'] = like(config_lib.image_shape(config)[:2], jnp.uint8)
  if 'mask' in config:
    batch['mask_index'] = like((config.mask.count,), jnp.int32)
    if part == 'student':
      batch['codes'] = like((int(np.prod(config_lib.patch_grid(config))),), jnp.int32)
  return batch


def lower(config: Any, devices: list, part: str) -> tuple[Any, Any, Any]:
  """(lowered program, mesh, abstract state) of a config's step on these devices, or of the `part` of it."""
  traced, mesh, state = trace(config, devices, part)
  with jax.set_mesh(mesh):
    return traced.lower(), mesh, state


def trace(config: Any, devices: list, part: str) -> tuple[Any, Any, Any]:
  """The same, traced only."""
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices)
  data = mesh.shape['data']
  if config.batch_size % (data * config.accumulate):
    raise UserError(
      f'batch_size={config.batch_size} does not divide over {data} chips x accumulate={config.accumulate}; give --config.batch_size.'
    )
  if part in ('frozen', 'student') and config.task != 'pretrain':
    raise UserError(f'--part={part} is for pretraining configs.')
  task, frozen = tasks.make(config, abstract=True)
  everywhere = sharding.replicated(mesh)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
  frozen, key = jax.tree.map(place, frozen), place(jax.eval_shape(lambda: jax.random.key(0)))
  batch = abstract_batch(config, mesh, part)
  optimizer, schedule = optim.make(config.optim, 1000, 10)
  layout = state_layout(task, optimizer, mesh, config)
  state = layout.targets()
  with jax.set_mesh(mesh):
    if part == 'init':
      return layout.init.trace(key), mesh, state
    if part == 'frozen':
      tokenizer: Any = task.tokenizer  # ty: ignore[missing-attribute]
      size = config.model.patch_size
      codes = jax.jit(lambda frozen, image, index: tokenizer.apply(frozen, vqkd_images(cut_pixels(image, size)), index, method='tokens'))
      return codes.trace(frozen, batch['image'], batch['mask_index']), mesh, TrainState(state.step, frozen, {}, {})
    step = make_train_step(task, optimizer, schedule, config.accumulate, layout)
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, everywhere))
    return step.trace(state, {} if part == 'student' else frozen, batch, key), mesh, state


def bytes_per_chip(tree: Any) -> int:
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report(config: Any, topology: str, part: str = 'step', keep_hlo: str | Path | None = None) -> dict[str, Any]:
  """Compiles and reads the program. Times are compiler estimates, but for `compile_seconds`, which were measured here."""
  devices = topology_devices(topology)
  chip = CHIPS[topology.partition(':')[0]]
  chips = len({tuple(d.coords) for d in devices})
  devices_a_chip = max(len(devices) // chips, 1)
  began, spent = time.monotonic(), time.process_time()
  traced, mesh, state = trace(config, devices, part)
  found = operations.count(traced.jaxpr)
  with jax.set_mesh(mesh):
    compiled = traced.lower().compile(compiler_options=compiler.options(config, device=devices[0]))
  seconds, cpu_seconds = time.monotonic() - began, time.process_time() - spent
  program, text = read(compiled, topology, devices_a_chip)
  if keep_hlo:
    Path(keep_hlo).write_text(text)
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  needed, images = operations_per_image(config, part), config.batch_size / chips
  moved = program.collectives()
  compute = program.cycles() / chip.clock / 1e9
  linked, waited = (sum(m[what] for m in moved) * devices_a_chip / (chip.links * 1e9) for what in ('bytes', 'waited'))
  room = chip.memory * 2**30 / devices_a_chip
  rate = images / compute if compute else float('nan')
  return dict(
    topology=topology, chips=chips, devices_a_chip=devices_a_chip, mesh=dict(mesh.shape), task=config.task, part=part, batch_size=config.batch_size, images_per_chip=images,
    compile_seconds=round(seconds, 1), compile_cpu_seconds=round(cpu_seconds, 1),
    memory=dict(
      parameters=bytes_per_chip(state.params), optimizer=bytes_per_chip(state.opt_state), temporary=memory.temp_size_in_bytes,
      total=used, chip=int(room), fits=used < room,
    ),
    model_gflop_per_image=needed / 1e9,
    found_gflop_per_image=dict(products=found[0] / config.batch_size / 1e9, kernels=found[1] / config.batch_size / 1e9),
    cycles=program.cycles(), issued=program.instructions(), seconds=compute, collective_seconds=linked, waited_seconds=waited,
    images_per_second_chip=rate, share_of_peak=rate * needed / (chip.peak * 1e12),
    share_of_peak_done=rate * sum(found) / config.batch_size / (chip.peak * 1e12),
    images_per_second_chip_scheduled=images / (compute + waited) if compute else float('nan'),
    images_per_second_chip_no_overlap=images / (compute + linked) if compute else float('nan'),
    collectives=moved, operations=program.dearest(), without_estimate=program.without_estimate(), unknown_loops=program.unknown_loops,
  )  # fmt: skip


def read(compiled: Any, topology: str, devices_a_chip: int) -> tuple[hlo.Program, str]:
  """What was compiled last, and its text."""
  chip = CHIPS[topology.partition(':')[0]]
  text = _text(compiled, topology)
  bandwidth = chip.bandwidth / (1 if chip.two_cores else devices_a_chip)
  lengths, issued = schedules.take(Path(_SCHEDULES.name))
  return hlo.Program(text, kernel_cycles(chip, bandwidth, lengths, 2 if chip.two_cores and devices_a_chip == 1 else 1), issued), text


def _text(compiled: Any, topology: str) -> str:
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
      f'jax {jax.__version__} cannot read the program that libtpu made for {topology} ({str(e).splitlines()[0][:120]}). jax 0.11.2, which '
      'needs Python 3.12, can.'
    ) from e


def kernel_cycles(chip: Chip, bandwidth: float, lengths: dict[str, int], cores: int) -> Callable:
  """How hlo.Program counts a kernel of ours: as long as its schedule, one instruction a cycle, or as its bytes take at `bandwidth` GB/s.

  Memory stalls are not in the schedule.
  """

  def cycles(names: list[str], turns: int, moved: int) -> int | None:
    length = max((lengths[n] for n in names if n in lengths), default=None)
    return None if length is None else max(length * turns // cores, int(moved / bandwidth * chip.clock))

  return cycles


def operations_per_image(config: Any, part: str) -> float:
  """Operations that `part` of a step needs for one image, by formula; none for the initialisation."""
  if part == 'init':
    return 0.0
  needed = flops.per_image(config)
  return {'step': sum(needed.values()), 'student': needed['student'], 'frozen': sum(v for k, v in needed.items() if k != 'student')}[part]


def advice(config: Any, result: dict) -> str:
  if result['memory']['fits']:
    return ''
  steps = []
  if config.layers.remat == 'none':
    steps.append('--config.layers.remat=dots (or full)')
  steps.append(f'--config.accumulate={2 * config.accumulate}')
  steps.append(
    "sharding the parameters also while they are used (FSDP): --config.mesh.rules=\"(('heads','model'),('mlp','model'),('vocab','model'),('embed','data'))\""
  )
  return 'It does not fit. Try ' + ', '.join(steps) + ', or a larger slice.'


def show(result: dict, top: int) -> str:
  gib = lambda n: f'{n / 2**30:.2f} GiB'
  found = result['found_gflop_per_image']
  memory, each = result['memory'], 'chip  ' if result['devices_a_chip'] == 1 else 'device'
  lines = [
    f'{result["task"]} ({result["part"]}) on {result["topology"]}: {result["chips"]} chips, mesh {result["mesh"]}, {result["images_per_chip"]:g} images a chip; compiled in {result["compile_seconds"]} s ({result["compile_cpu_seconds"]} s of CPU)',
    '',
    f'memory a {each}     {gib(memory["total"])} of {gib(memory["chip"])}{"" if memory["fits"] else "   DOES NOT FIT"}',
    f'  parameters        {gib(memory["parameters"])}',
    f'  optimizer         {gib(memory["optimizer"])}',
    f'  temporaries       {gib(memory["temporary"])} (activations, gradients)',
    f'model operations    {result["model_gflop_per_image"]:.1f} GFLOP an image',
    f'in the program      {sum(found.values()):.1f} GFLOP an image in products: {found["products"]:.1f} that the compiler counts, {found["kernels"]:.1f} inside our kernels',
    f'compiler estimate   {result["cycles"] / 1e6:.1f} M cycles, {1e3 * result["seconds"]:.1f} ms a step',
    f'                    {result["images_per_second_chip"]:,.0f} images/s a chip, {100 * result["share_of_peak"]:.1f} % of peak ({100 * result["share_of_peak_done"]:.1f} % by the operations in the program), if collectives hide behind compute',
    f'                    {result["images_per_second_chip_scheduled"]:,.0f} images/s a chip if those do that the compiler has computing go on beside ({1e3 * result["waited_seconds"]:.1f} ms of others)',
    f"                    {result['images_per_second_chip_no_overlap']:,.0f} images/s a chip if none of them does ({1e3 * result['collective_seconds']:.1f} ms at the links' bandwidth)",
    f'instructions        {result["issued"] / 1e6:.1f} M, which would be {100 * result["share_of_peak"] * result["cycles"] / max(result["issued"], 1):.1f} % of peak if nothing waited for memory or a matrix unit',
    '',
  ]
  if result['collectives']:
    lines += ['collectives             times a step       bytes a chip     nothing beside them']
    lines += [f'  {x["kind"]:22s}{x["count"]:10d}{gib(x["bytes"]):>20s}{gib(x["waited"]):>20s}' for x in result['collectives']] + ['']
  lines += ['dearest operations                                              of cycles  of instructions   times']
  shares = lambda x: (100 * x['cycles'] / max(result['cycles'], 1), 100 * x['issued'] / max(result['issued'], 1))
  lines += ['  {:60s}{:9.1f} %{:15.1f} %{:8d}'.format(x['name'][:60], *shares(x), x['count']) for x in result['operations'][:top]]
  if result['without_estimate']:
    kinds = ', '.join(f'{k} ({n})' for k, n in result['without_estimate'].items())
    lines += ['', f'without an estimate, so not in the time: {kinds}']
  if result['unknown_loops']:
    lines.append(f'{result["unknown_loops"]} loops whose number of turns is not in the program count as one turn.')
  return '\n'.join(lines)
