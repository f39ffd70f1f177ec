"""Checkpoints in and out: sizes read off the arrays, bit-equal round trips, and files that are refused."""

import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import beitv2_jax
from beitv2_jax import commands, config
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MIM
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tensor_files import files
from beitv2_jax.training import sharding
from beitv2_jax.weights import convert, official, stages, trees
from benchmarks.campaign import weights as weights_attack
from tests.conftest import smoke

MODULES = {
  'tokenizer': VQKD((2, 3), 8, 24, 4, 8, 128, 2, 2, 64, 1, 1),
  'pretrain': MIM(16, 4, 2, 8, (2, 3), 24, early_layer=1, shared_head=False),
  'classifier': Classifier(16, 2, 4, 8, (2, 3), 5),
  'segmenter': Segmenter(16, 3, 4, 8, (2, 3), 5, (0, 0, 1, 2), channels=8, aux_channels=4),
}


def random_state(kind, module=None):
  """Official keys with random values; the grid is 2 x 3."""
  module = module or MODULES[kind]
  h, w = (8 * g for g in module.grid)
  shapes = sharding.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, h, w, 3)))))
  rng = np.random.default_rng(0)
  state = official.from_ours(kind, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes))
  return {k: np.abs(v) + 0.5 if k.endswith('running_var') else v for k, v in state.items()}


@pytest.mark.parametrize('kind', MODULES)
def test_import_reads_the_sizes_and_export_gives_the_same_bits(tmp_path, kind):
  state = random_state(kind)
  save_file(state | {'blocks.0.attn.relative_position_index': np.zeros((7, 7), np.int64)}, tmp_path / 'in.safetensors')
  args = ['import', '--kind', kind, '--from', f'{tmp_path}/in.safetensors', '--to', f'{tmp_path}/dir', '--grid', '2x3']
  extra = dict(pretrain=['--early-layer', '1'], segmenter=['--out-indices', '0,0,1,2']).get(kind, [])
  assert commands.run('convert', args + extra) == 0
  c, variables, _ = stages.load_variables(tmp_path / 'dir')
  module = MODULES[kind]
  assert c.data.image_size == [16, 24]
  if kind == 'tokenizer':
    assert (c.model.encoder.heads, c.model.decoder.depth, c.model.codes, c.model.teacher_width) == (2, 1, 24, 8)
  else:
    assert (c.model.width, c.model.depth, c.model.heads) == (16, module.depth, module.heads)
  images = np.random.default_rng(1).uniform(size=(2, 16, 24, 3)).astype(np.float32)
  model = beitv2_jax.load(tmp_path / 'dir')
  assert model.features(images)['patches'].shape == (2, 6, module.encoder_width if kind == 'tokenizer' else 16)
  if kind == 'tokenizer':
    assert model.tokens(images).shape == (2, 2, 3)
  if kind == 'classifier':
    direct = module.apply(variables, (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225]))
    np.testing.assert_allclose(model.logits(images), direct, atol=1e-3)
  if kind == 'segmenter':
    assert model.logits(images).shape == (2, 8, 12, 5)
  assert (
    commands.run('convert', ['export', '--from', f'{tmp_path}/dir', '--to', f'{tmp_path}/out.safetensors', '--to-format', 'official']) == 0
  )
  out = load_file(tmp_path / 'out.safetensors')
  assert set(state) <= set(out) and all(
    k.split('.')[-1] in ('relative_position_index', 'embed_avg', 'initted', 'num_batches_tracked') for k in set(out) - set(state)
  )
  for k in state:
    np.testing.assert_array_equal(out[k], state[k], err_msg=k)


def test_heads_come_from_the_width_where_no_table_tells(tmp_path):
  state = {k: v for k, v in random_state('tokenizer').items()}
  c = convert.sizes.config_of('tokenizer', state, grid=(2, 3), heads=4)
  assert c.model.encoder.heads == 4 and c.model.decoder.heads == 1
  with pytest.raises(UserError, match='does not make a 2x2 grid; say which with --grid'):
    convert.sizes.config_of('tokenizer', state)


def test_pretraining_checkpoint_without_heads(tmp_path):
  state = {k: v for k, v in random_state('pretrain').items() if not k.startswith(('lm_head', 'cls_pt'))}
  save_file(state, tmp_path / 'in.safetensors')
  convert.import_checkpoint('pretrain', tmp_path / 'in.safetensors', tmp_path / 'dir', grid=(2, 3))
  model = beitv2_jax.load(tmp_path / 'dir')
  assert model.features(np.zeros((1, 16, 24, 3), np.uint8))['cls'].shape == (1, 16)
  with pytest.raises(UserError, match='without its lm_head'):
    model.masked_logits(np.zeros((1, 16, 24, 3), np.uint8), np.zeros((1, 6), bool))


def test_list_names_every_key(tmp_path, capsys):
  save_file(random_state('classifier') | {'surprise': np.zeros(2, np.float32)}, tmp_path / 'x.safetensors')
  assert commands.run('convert', ['import', '--kind', 'classifier', '--from', f'{tmp_path}/x.safetensors', '--list']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert any(line.split() == ['surprise', '(2,)', 'NO', 'HOME'] for line in lines)
  assert any('blocks.1.attn.qkv.weight' in line and 'params/backbone/block_1/attn/qkv' in line for line in lines)


def pth(path, data: bytes):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', data)


class Evil:
  def __reduce__(self):
    return os.system, ('touch /tmp/beitv2_evil',)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
  pth(tmp_path / 'evil.pth', pickle.dumps({'model': Evil()}))
  with pytest.raises(UserError, match=r'refused: opening the file would run (posix|os)\.system'):
    files.read_state(tmp_path / 'evil.pth')
  assert not os.path.exists('/tmp/beitv2_evil')


def broken(tmp_path):
  save = random_state('classifier')
  save_file(save, tmp_path / 'good.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'good.safetensors').read_bytes()[:-100])
  pth(tmp_path / 'damaged.pth', pickle.dumps({'model': {}})[:-3])
  (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 nothing more')
  pth(tmp_path / 'empty.pth', pickle.dumps({'model': {}}))


@pytest.mark.parametrize(
  'name, kind, words',
  [
    ('cut.safetensors', 'classifier', 'not a whole safetensors file'),
    ('cut.pth', 'classifier', 'is cut off'),
    ('damaged.pth', 'classifier', 'cut off or damaged'),
    ('empty.pth', 'classifier', 'holds no tensors'),
    ('none.pth', 'classifier', 'no file'),
    ('good.safetensors', 'tokenizer', 'this is not a tokenizer checkpoint'),
    ('good.safetensors', 'pretrain', 'not a pretrain checkpoint'),
  ],
)
def test_bad_files_leave_nothing_behind(tmp_path, capsys, name, kind, words):
  broken(tmp_path)
  args = ['import', '--kind', kind, '--from', f'{tmp_path}/{name}', '--to', f'{tmp_path}/dir', '--grid', '2x3']
  assert commands.run('convert', args) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ') and words in message and message.count('\n') == 1
  assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_shape_that_does_not_fit_names_both_sides(tmp_path, capsys):
  state = random_state('classifier')
  state['blocks.1.norm1.weight'] = np.zeros(15, np.float32)
  save_file(state, tmp_path / 'x.safetensors')
  assert (
    commands.run(
      'convert', ['import', '--kind', 'classifier', '--from', f'{tmp_path}/x.safetensors', '--to', f'{tmp_path}/dir', '--grid', '2x3']
    )
    == 2
  )
  assert '(15,) against (16,)' in capsys.readouterr().err and not (tmp_path / 'dir').exists()


def test_hugging_face_directory(tmp_path):
  square = MIM(16, 3, 2, 8, (3, 3), 24, early_layer=1)
  save_file(random_state('pretrain', square), tmp_path / 'in.safetensors')
  convert.import_checkpoint('pretrain', tmp_path / 'in.safetensors', tmp_path / 'dir', early=1)
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'hf', 'hf')
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert config['layer_norm_eps'] == 1e-6 and config['use_shared_relative_position_bias'] and config['vocab_size'] == 24
  assert (tmp_path / 'hf' / 'preprocessor_config.json').exists()
  keys = load_file(tmp_path / 'hf' / 'model.safetensors').keys()
  assert 'beit.encoder.layer.2.attention.attention.key.weight' in keys and not any('key.bias' in k or 'cls_pt' in k for k in keys)
  with pytest.raises(UserError, match='timm has classifiers'):
    convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'x.safetensors', 'timm')
  with pytest.raises(UserError, match='exists; remove it'):
    convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'hf', 'hf')


def test_tree_diff_names_both_sides():
  with pytest.raises(UserError, match=r'only in B: y.*only in A: x.*z \(1,\) against \(2,\)'):
    trees.check_same({'x': np.zeros(1), 'z': np.zeros(1)}, {'y': np.zeros(1), 'z': np.zeros(2)}, 'A', 'B')


def test_a_stage_trained_here_goes_to_hugging_face(tmp_path):
  """Its config leaves out what the model has by default."""
  c = smoke('pretrain').unlock()
  c.model.vocab = 8
  variables = from_config.fresh_variables(c)
  config.save(c, tmp_path)
  stages.write_variables(tmp_path, 0, variables)
  assert commands.run('convert', ['export', '--from', f'{tmp_path}', '--to', f'{tmp_path}/hf', '--to-format', 'hf']) == 0
  theirs = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert theirs['use_shared_relative_position_bias'] and not theirs['use_absolute_position_embeddings']
  assert (tmp_path / 'hf' / 'model.safetensors').stat().st_mode & 0o044  # others may read it


def test_a_segmenter_comes_back_from_hugging_face(tmp_path):
  """Its export has a block of zeros more, which the import leaves out again."""
  save_file(random_state('segmenter', Segmenter(8, 12, 2, 8, (2, 2), 5, channels=8, aux_channels=4)), tmp_path / 'in.safetensors')
  convert.import_checkpoint('segmenter', tmp_path / 'in.safetensors', tmp_path / 'a', out_indices=(2, 5, 8, 11))
  convert.export_checkpoint(tmp_path / 'a', tmp_path / 'hf', 'hf')
  said = convert.import_checkpoint('segmenter', tmp_path / 'hf', tmp_path / 'b')  # the directory itself
  assert '12 blocks of width 8' in said and 'taps after blocks 2, 5, 8, 11' in said  # not the usual 3, 5, 7, 11
  a, b = (trees.flatten(stages.load_variables(tmp_path / x)[1]) for x in 'ab')
  assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
  'kind, extra, words',
  [
    ('pretrain', ['--early-layer', '4'], 'a block before the last of 4'),
    ('pretrain', ['--early-layer', '-1'], 'a block before the last of 4'),
    ('classifier', ['--num-heads', '-2'], 'at least 1'),
    ('classifier', [], 'head.bias has values that are not finite'),
  ],
)
def test_impossible_sizes_and_weights_are_refused(tmp_path, capsys, kind, extra, words):
  state = random_state(kind)
  if kind == 'classifier' and not extra:
    state['head.bias'][0] = np.nan
  save_file(state, tmp_path / 'in.safetensors')
  args = ['import', '--kind', kind, '--from', f'{tmp_path}/in.safetensors', '--to', f'{tmp_path}/dir', '--grid', '2x3', *extra]
  assert commands.run('convert', args) == 2 and words in capsys.readouterr().err
  assert not (tmp_path / 'dir').exists()


def test_a_target_inside_a_file_and_a_damaged_checkpoint_are_one_line(tmp_path, capsys):
  save_file(random_state('classifier'), tmp_path / 'in.safetensors')
  args = ['import', '--kind', 'classifier', '--from', f'{tmp_path}/in.safetensors', '--grid', '2x3', '--to']
  assert commands.run('convert', [*args, f'{tmp_path}/in.safetensors/sub']) == 2
  assert capsys.readouterr().err.startswith('error: ')
  assert commands.run('convert', [*args, f'{tmp_path}/dir']) == 0
  for path in (tmp_path / 'dir' / 'checkpoints').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:3])
  with pytest.raises(UserError, match='no checkpoint in .* is whole'):
    beitv2_jax.load(tmp_path / 'dir')


@pytest.mark.parametrize('seed', range(40))
def test_changed_files_are_imported_or_refused_in_a_line(tmp_path, seed):
  """A short round of benchmarks/campaign."""
  kind = sorted(MODULES)[seed % 4]
  path, what = weights_attack.write(tmp_path, random_state(kind), np.random.default_rng(seed))
  try:
    convert.import_checkpoint(kind, path, tmp_path / 'out', grid=(2, 3))
  except UserError as e:
    assert '\n' not in str(e), what
    assert not (tmp_path / 'out').exists()
  else:
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(stages.load_variables(tmp_path / 'out')[1])), what


@pytest.mark.parametrize('trap', ['strides', 'offset', 'negative', 'keys', 'shared', 'code', 'bomb'])
def test_traps_in_a_pickle_are_refused(tmp_path, trap):
  (tmp_path / 'file.pth').write_bytes(weights_attack.as_pth(random_state('classifier'), trap))
  with pytest.raises(UserError):
    convert.import_checkpoint('classifier', tmp_path / 'file.pth', tmp_path / 'out', grid=(2, 3))
  assert not os.path.exists('/tmp/beitv2_jax_ran_code')


@pytest.mark.parametrize('trap', ['', 'settings', 'memo', 'attributes'])
def test_settings_and_odd_memos_do_not_stand_in_the_way(tmp_path, trap):
  state = random_state('classifier')
  (tmp_path / 'file.pth').write_bytes(weights_attack.as_pth(state, trap))
  read = files.read_state(tmp_path / 'file.pth')
  assert read.keys() == state.keys() and all(np.array_equal(read[k], state[k]) for k in state)


def test_pytorchs_format_before_1_6(tmp_path):
  """Pickles one after the other, then the storages: made by hand, as torch.save(_use_new_zipfile_serialization=False) does."""
  storages = dict(a=np.arange(6, dtype=np.float32), b=np.arange(4, dtype=np.int64))
  storage = lambda key, kind, count: weights_attack._tuple(
    weights_attack._text('storage'), weights_attack._global('torch', kind), weights_attack._text(key), weights_attack._text('cpu'),
    weights_attack._int(count), b'N',
  ) + b'Q'  # fmt: skip
  tensor = lambda stored, *size: weights_attack._global('torch._utils', '_rebuild_tensor_v2') + weights_attack._tuple(
    stored, weights_attack._int(0), weights_attack._tuple(*map(weights_attack._int, size)),
    weights_attack._tuple(*map(weights_attack._int, (3, 1) if len(size) == 2 else (1,))), b'\x89', b'}',
  ) + b'R'  # fmt: skip
  entries = (
    weights_attack._text('x')
    + tensor(storage('a', 'FloatStorage', 6), 2, 3)
    + weights_attack._text('y')
    + tensor(storage('b', 'LongStorage', 4), 4)
  )
  parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})]
  parts += [b'\x80\x02}(' + entries + b'u.', pickle.dumps(['a', 'b'], 2)]
  parts += [len(x).to_bytes(8, 'little') + x.tobytes() for x in storages.values()]
  (tmp_path / 'old.pth').write_bytes(b''.join(parts))
  read = files.read_state(tmp_path / 'old.pth')
  np.testing.assert_array_equal(read['x'], storages['a'].reshape(2, 3))
  np.testing.assert_array_equal(read['y'], storages['b'])


def test_a_model_without_query_and_value_biases(tmp_path):
  """Trained with qkv_bias=False: zeros are what it means."""
  state = random_state('classifier')
  zeroed = {k: np.zeros_like(v) if k.endswith(('q_bias', 'v_bias')) else v for k, v in state.items()}
  save_file({k: v for k, v in state.items() if not k.endswith(('q_bias', 'v_bias'))}, tmp_path / 'without.safetensors')
  save_file(zeroed, tmp_path / 'zeros.safetensors')
  for name in ('without', 'zeros'):
    convert.import_checkpoint('classifier', tmp_path / f'{name}.safetensors', tmp_path / name, grid=(2, 3))
  a, b = (trees.flatten(stages.load_variables(tmp_path / name)[1]) for name in ('without', 'zeros'))
  assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_directory_in_several_files_or_as_a_bin(tmp_path):
  state = random_state('classifier')
  for name in ('shards', 'bin'):
    (tmp_path / name).mkdir()
  first = sorted(state)[: len(state) // 2]
  save_file({k: state[k] for k in first}, tmp_path / 'shards' / 'model-00001-of-00002.safetensors')
  save_file({k: v for k, v in state.items() if k not in first}, tmp_path / 'shards' / 'model-00002-of-00002.safetensors')
  index = {k: f'model-0000{1 if k in first else 2}-of-00002.safetensors' for k in state}
  (tmp_path / 'shards' / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  (tmp_path / 'bin' / 'pytorch_model.bin').write_bytes(weights_attack.as_pth(state))
  for name in ('shards', 'bin'):
    read = files.read_state(tmp_path / name)
    assert read.keys() == state.keys() and all(np.array_equal(read[k], state[k]) for k in state)


def test_an_average_of_the_weights_goes_out_instead_of_them_if_asked(tmp_path, capsys):
  c = smoke('classifier', model__classes=5)
  variables = from_config.fresh_variables(c)
  for name, more in (('with', dict(ema=jax.tree.map(lambda x: x + 1, variables['params']))), ('without', {})):
    (tmp_path / name).mkdir()
    config.save(c, tmp_path / name)
    stages.write_variables(tmp_path / name, 0, variables | more)
  export = lambda name, *args: commands.run(
    'convert',
    ['export', '--from', f'{tmp_path}/{name}', '--to-format', 'official', *args, '--out', f'{tmp_path}/{name}{len(args)}.safetensors'],
  )
  assert export('with') == export('with', '--ema') == export('without') == 0
  plain, average, same = (load_file(tmp_path / f'{name}.safetensors') for name in ('with0', 'with1', 'without0'))
  key = 'blocks.0.mlp.fc1.weight'
  np.testing.assert_array_equal(average[key], plain[key] + 1)
  assert plain.keys() == same.keys() and all(np.array_equal(plain[k], same[k]) for k in plain)
  assert export('without', '--ema') == 2 and 'trained without ema_decay' in capsys.readouterr().err


def test_converted_weights_go_to_a_disk(tmp_path):
  stages_of = smoke('classifier', model__classes=5)
  config.save(stages_of, tmp_path)
  stages.write_variables(tmp_path, 0, from_config.fresh_variables(stages_of))
  with pytest.raises(UserError, match='converted weights are written to a disk'):
    convert.export_checkpoint(tmp_path, 'gs://bucket/model.safetensors', 'official')


@pytest.mark.parametrize('form', ['hf', 'timm'])
def test_heads_that_no_table_tells_come_from_what_stands_beside_the_weights(tmp_path, form):
  """And timm is told that there are no bias tables and no layer scale, which its model of this name has."""
  c = smoke('classifier', model__classes=5, model__rel_pos='none', model__abs_pos=True, model__layer_scale=0.0, model__heads=4)
  config.save(c, tmp_path)
  stages.write_variables(tmp_path, 0, from_config.fresh_variables(c))
  convert.export_checkpoint(tmp_path, tmp_path / 'out', form)
  assert f'in {c.model.heads} heads' in convert.import_checkpoint('classifier', tmp_path / 'out', tmp_path / 'back')
  if form == 'timm':
    told = json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']
    assert told['use_abs_pos_emb'] and not told['use_rel_pos_bias'] and told['init_values'] is None and told['global_pool'] == 'avg'
