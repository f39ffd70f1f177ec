"""What estimate.py reads out of a compiled program, on a hand-made one; the compiler itself is in the extra [aot]."""

import types

import jax
import pytest
from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, vqkd_b16

from beitv2_jax import compiler
from beitv2_jax.costs import estimate, hlo, operations, schedules
from beitv2_jax.errors import UserError
from beitv2_jax.models import flops
from beitv2_jax.training import sharding

PROGRAM = """HloModule jit_step

%cond (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(9)
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} add(%a, %a), backend_config={"estimated_cycles":"1000000"}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %f = bf16[8,128]{1,0} fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/jvp(M)/block_3/fc1"}, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], f32[4]{0}) tuple(%p, %f)
}

%start (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %y = f32[8]{0} all-gather(%a), dimensions={0}
  ROOT %z = (f32[4]{0}, f32[8]{0}) custom-call(%y), custom_call_target="AsyncCollectiveStart"
}

%go_on (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %y = f32[8]{0} all-gather(%a), dimensions={0}
}

%all-reduce-scatter.1 (a: f32[4]) -> f32[1] {
  %a = f32[4]{0} parameter(0)
  %y = f32[4]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%inner
  ROOT %z = f32[1]{0} dynamic-slice(%y), dynamic_slice_sizes={1}
}

%on_sparse_cores (a: f32[4]) -> f32[2] {
  %a = f32[4]{0} parameter(0)
  ROOT %y = f32[2]{0} reduce-scatter(%a), replica_groups=mesh['data'=2,'model'=4] {'data','model'}, to_apply=%inner
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %f1 = f32[8]{0} fusion(%a), kind=kCustom, calls=%start
  %f2 = f32[8]{0} fusion(%f1), kind=kCustom, calls=%go_on
  %w = (s32[], f32[4]{0}) while(%a), condition=%cond, body=%body
  %g = bf16[8,128]{1,0} fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="jit(step)/jvp(M)/block_12/fc1"}, backend_config={"estimated_cycles":"7"}
  %r = (f32[64,2]{1,0}, bf16[4]{0}) all-reduce(%g), to_apply=%inner
  %f3 = f32[1]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %f4 = f32[2]{0} reduce-scatter(%a), replica_groups=[16,4]<=[64], to_apply=%inner
  %f5 = ((), f32[2]{0}) custom-call-start(%a), custom_call_target="TODO", called_computations={%on_sparse_cores}
  %f6 = f32[2]{0} reduce-scatter(%a), replica_groups={{0,1,2}}, to_apply=%inner
  %s = f32[16]{0} all-gather-start(%g), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %c = f32[4]{0} custom-call(%a), custom_call_target="mystery"
}
"""


def test_loops_count_their_turns_and_fusions_once():
  program = hlo.Program(PROGRAM)
  assert program.cycles() == 9 * 10 + 7 and program.unknown_loops == 0
  assert program.dearest() == [dict(name='jvp(M)/block/fc1', cycles=97, issued=97, count=10)]
  moved = {m['kind']: (m['count'], m['bytes'], m['waited']) for m in program.collectives()}
  assert moved == {
    'all-reduce': (1, 2 * (64 * 2 * 4 + 4 * 2), 2 * (64 * 2 * 4 + 4 * 2)),
    'all-gather': (2, 64 + 32, 0),  # what a fusion starts, but not what goes on with it
    # One inside a fusion, which sums 16 bytes, two by themselves, of four and three times their results; SparseCores carry out one of eight.
    'reduce-scatter': (4, 16 + 32 + 24 + 64, 16 + 32 + 24),
  }
  missing = program.without_estimate()
  assert missing['custom-call'] == 1 and missing['all-reduce'] == 1 and 'while' not in missing and 'all-gather-done' not in missing
  assert hlo.Program(PROGRAM.replace('constant(9)', 'parameter(1)')).unknown_loops == 1


@pytest.mark.parametrize('part', ['step', 'student', 'frozen'])
def test_the_real_step_lowers_without_weights(part):
  """The shipped recipe on eight devices, tracing only: nothing is downloaded, allocated or compiled."""
  c = beitv2_b16.get_config().unlock()
  c.batch_size, c.model.depth, c.model.early_layer = 64, 3, 2
  lowered, mesh, state = estimate.lower(c, jax.devices(), part)
  assert mesh.size == 8 and 'stablehlo' in lowered.as_text()[:20_000]
  share = lambda x: 8 if part != 'frozen' and x.size >= 2**16 and any(n % 8 == 0 for n in x.shape) else 1
  assert estimate.bytes_per_chip(state.params) == 4 * sum(x.size // share(x) for x in jax.tree.leaves(state.params))


def test_the_tokenizer_step_lowers_too_and_fsdp_shards_it():
  c = vqkd_b16.get_config().unlock()
  c.batch_size, c.model.encoder.depth = 64, 1
  c.mesh.shard_state = False
  _, _, state = estimate.lower(c, jax.devices(), 'step')
  assert estimate.bytes_per_chip(state.params) == 4 * sum(x.size for x in jax.tree.leaves(state.params))
  c.mesh.rules = (('heads', None), ('mlp', None), ('vocab', None), ('embed', 'data'))
  _, _, state = estimate.lower(c, jax.devices(), 'step')
  assert estimate.bytes_per_chip(state.params) < 0.2 * 4 * sum(x.size for x in jax.tree.leaves(state.params))
  with pytest.raises(UserError, match='is for pretraining configs'):
    estimate.lower(c, jax.devices(), 'student')


def test_a_device_is_a_chip(monkeypatch):
  pytest.importorskip('libtpu', reason='the TPU compiler is in the extra [aot]')
  for name, value in dict(
    TPU_WORKER_HOSTNAMES='localhost', TPU_SKIP_MDS_QUERY='1', LIBTPU_INIT_ARGS='', ALLOW_MULTIPLE_LIBTPU_LOAD='1'
  ).items():
    monkeypatch.setenv(name, value)  # what estimate.py sets, too, and what lets several processes load the compiler; undone afterwards
  for slice_ in ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
    devices = estimate.topology_devices(slice_)
    assert len(devices) == 4 and sharding.make_mesh(-1, 1, devices).size == 4, slice_
  assert len(estimate.topology_devices('tpu7x:2x2x1')) == 8  # two devices a chip


@pytest.mark.parametrize(
  'recipe, part, changes, low, high',
  [
    # What the last blocks leave out (tests/test_flops.py), and picking tokens, which the formula does not count.
    (beitv2_b16, 'student', {}, 0.940, 0.942),
    (beitv2_b16, 'student', {'accumulate': 2}, 0.940, 0.942),
    (beitv2_b16, 'student', {'scan': True}, 0.940, 0.942),
    (beitv2_b16, 'student', {'remat': 'full'}, 1.13, 1.23),  # the blocks' forward once more
    (beitv2_b16, 'student', {'attention': 'tpu'}, 0.942, 1.04),  # the kernel works on whole registers
    (vqkd_b16, 'step', {}, 0.999, 1.003),
    (
      finetune_b16,
      'step',
      {},
      0.9985,
      0.9995,
    ),  # the formula has a gradient of the images, 0.2 %, which nobody takes; biases of positions it has not
  ],
)
def test_operations_in_the_program_against_the_formula(recipe, part, changes, low, high):
  c = recipe.get_config().unlock()
  c.batch_size = 16
  c.accumulate = changes.pop('accumulate', 1)
  c.layers.update(changes)
  traced, _, _ = estimate.trace(c, jax.devices(), part)
  products, kernels = operations.count(traced.jaxpr)
  assert low < (products + kernels) / (16 * estimate.operations_per_image(c, part)) < high
  assert (kernels > 0.02 * products) == (changes.get('attention') == 'tpu')


def test_what_the_tpu_compiler_is_asked_for():
  c = beitv2_b16.get_config().unlock()
  chip = lambda kind: types.SimpleNamespace(platform='tpu', device_kind=kind)
  v4, v5e = (compiler.options(c, device=chip(kind)) for kind in ('TPU v4', 'TPU v5 lite'))
  assert len(v4) == 2 and v4.items() < v5e.items() and 'xla_enable_async_all_reduce' in v5e
  c.quick_compile = True
  more = dict(compiler.options(c, device=chip('TPU v4')).items() - v4.items())
  assert more and jax.jit(lambda x: x + 1, compiler_options=more)(1) == 2  # every jax that we support must take it


def test_training_goes_on_without_what_the_compiler_does_not_take(monkeypatch, capsys):
  known, unknown = {'xla_cpu_enable_fast_math': False}, {'xla_cpu_enable_fast_math': False, 'xla_dropped': True}
  monkeypatch.setattr(compiler, 'asked_of_tpus', lambda kind: [unknown, known])  # by the CPU's compiler
  assert compiler.taken('a TPU of a test') == known
  assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('slice_', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_the_tpu_compiler_takes_what_it_is_asked_for(slice_):
  pytest.importorskip('libtpu', reason='the TPU compiler is in the extra [aot]')
  mesh = sharding.make_mesh(-1, 1, estimate.topology_devices(slice_))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  x = jax.ShapeDtypeStruct((64, 1024, 1024), 'bfloat16', sharding=split)
  options = compiler.options(beitv2_b16.get_config(), device=mesh.devices.flat[0])
  assert jax.jit(lambda x: x.sum(0)).lower(x).compile(compiler_options=options)  # a sum over the chips


def test_flags_of_the_user_do_not_take_the_schedules_away():
  flags = estimate.with_schedules('--xla_tpu_scoped_vmem_limit_kib=20480')
  assert flags.startswith('--xla_tpu_scoped_vmem_limit_kib=20480 --xla_jf_dump_to=') and estimate.with_schedules(flags) == flags
  assert flags.endswith(estimate.with_schedules(''))


def test_errors():
  with pytest.raises(UserError, match='use one of v4, v5e, v5p, v6e, tpu7x'):
    estimate.report(beitv2_b16.get_config(), 'v7:2x2')
  c = beitv2_b16.get_config().unlock()
  c.batch_size = 12
  with pytest.raises(UserError, match='does not divide over 8 chips'):
    estimate.lower(c, jax.devices(), 'step')
  assert sharding.make_mesh(2, 1, jax.devices()).size == 2


@pytest.mark.parametrize('recipe, batch', [(finetune_b16, 64), (ade20k_b16, 16)])
def test_downstream_steps_lower_too(recipe, batch):
  c = recipe.get_config().unlock()
  c.batch_size, c.model.depth = batch, 2
  if 'out_indices' in c.model:
    c.model.out_indices = (0, 0, 1, 1)
  lowered, _, _ = estimate.lower(c, jax.devices(), 'step')
  assert 'stablehlo' in lowered.as_text()[:20_000]
  assert flops.per_image(c)['student'] > 1e9


BUNDLES = """LB: loop body
     0   :  { %s1 = sld [smem:[#allocation]] }
   0x1   :  { %s2 = smov.u32 0 }
   0x2 LB: > { %s3 = sadd.s32 1, %s3 }
   0x3   : > { %v1 = vld [vmem:[%s3]] }
   0x4 LB: >> { %s4 = sadd.s32 1, %s4 }
   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s4_s1, 5 /* loop exit test */  ;;  %s9 = smov.u32 0 }
   0x6   : >> { %1 = sbr.rel (!%p1) target = $region1 }
   0x7 PF: > { %2 = sbr.rel (%p3) target = $region9 }
   0x8   :  { %p2 = scmp.ge.s32.totalorder %s3_s1, 7 /* loop exit test */ }
   0x9   : > { %3 = sbr.rel (!%p2) target = $region2 }
   0xa   :  { %4 = vst [vmem:[0]] }
"""


def test_instructions_of_loops_count_as_often_as_they_turn(tmp_path):
  assert schedules.issued(BUNDLES) == 2 + 7 * (2 + 5 * 3 + 3) + 1
  assert schedules.issued(BUNDLES.replace('%s4_s1, 5 ', '%s4_s1, %s7 ')) == 2 + 7 * (2 + 3 + 3) + 1  # not known: once
  (tmp_path / '123-fusion.7-01-final_bundles.txt').write_text(BUNDLES)
  (tmp_path / '123-fusion.7-00-schedule-analysis_final_bundles.txt').write_text('Schedule analysis:\n\ttotal scheduled bundles:    11\n')
  assert schedules.take(tmp_path) == ({'fusion.7': 11}, {'fusion.7': 143}) and not list(tmp_path.iterdir())


def test_instructions_of_a_program():
  """The compiler keeps one of equal operations, whatever their names; what it keeps nothing of counts by its cycles."""
  text = PROGRAM.replace('"estimated_cycles":"7"', '"estimated_cycles":"10"')  # f and g are then the same
  assert hlo.Program(text, issued={'f': 4}).instructions() == 9 * 4 + 4
  assert hlo.Program(PROGRAM, issued={'f': 4}).instructions() == 9 * 4 + 7
  assert hlo.Program(PROGRAM).instructions() == hlo.Program(PROGRAM).cycles()


def test_every_call_of_a_kernel_counts():
  """The compiler keeps one of equal kernels; a loop's turns and the images of each call multiply its schedule."""
  call = (
    '%attention.{n} = bf16[4,8]{{1,0}} custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={{bf16[4,8]{{1,0}}}}, '
    'frontend_attributes={{kernel_metadata={{\n"turns":"4"\n}}}}, metadata={{op_name="x"}}, backend_config={{"custom_call_config":{{"body":"{body}"}}}}\n'
  )
  lines = [f'  {call.format(n=n, body=body)}' for n, body in ((1, 'AA'), (2, 'AA'), (3, 'BB'))]
  text = 'ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {\n  %a = bf16[4,8]{1,0} parameter(0)\n' + ''.join(lines) + '}\n'
  asked = []

  def cycles(names, turns, moved):
    asked.append((names, turns, moved))
    return 100 * turns if 'attention.2' in names else None

  program = hlo.Program(text, cycles)
  assert asked == [(['attention.1', 'attention.2'], 4, 128)] * 2 + [(['attention.3'], 4, 128)]
  assert program.cycles() == 800 and program.without_estimate() == {'custom-call': 1}
