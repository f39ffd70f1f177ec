"""Official checkpoints in, and official, timm and Hugging Face files out.

An imported directory is what every stage takes as tokenizer_from, and beitv2_jax.load opens: a workdir without optimizer state.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models import from_config
from beitv2_jax.models.layers import relative_position_index
from beitv2_jax.tensor_files import files
from beitv2_jax.weights import descriptions, huggingface, official, sizes, stages, trees

KINDS = tuple(official.TABLES)


def _read(kind: str, source: str | Path) -> dict[str, np.ndarray]:
  """The arrays of a file under official names, whether it has those or Hugging Face's."""
  state = files.read_state(source)
  return official.with_zero_biases(huggingface.to_official(kind, state) if huggingface.is_theirs(state) else state)


def import_checkpoint(kind: str, source: str | Path, target: str | Path, **sizes_given: Any) -> str:
  """Reads an official .pth or .safetensors file, or a Hugging Face model.safetensors, and writes a directory that `beitv2_jax.load` opens.

  Returns what was read off the arrays, in words. Raises UserError if the file is broken, of another kind, not finite or does not fit;
  then nothing is written.
  """
  state = _read(kind, source)
  source_path = Path(source).expanduser()
  if kind != 'tokenizer':  # of which nobody writes a config.json
    width = next((x.shape[0] for name, x in state.items() if name.endswith('patch_embed.proj.weight')), 0)
    described = descriptions.sizes(source_path, width)
    sizes_given |= {name: found for name, found in described.items() if found and sizes_given.get(name) is None}
  c = sizes.config_of(kind, state, **sizes_given)
  descriptions.apply(c, source_path)
  heads = dict(encoder=c.model.encoder.heads, decoder=c.model.decoder.heads) if kind == 'tokenizer' else dict(encoder=c.model.heads)
  variables = official.to_ours(kind, state, heads)
  if kind == 'tokenizer':  # files that only carry weights
    book = variables['codebook']['quantizer']
    for name in ('usage', 'cluster_size'):
      book.setdefault(name, np.zeros(c.model.codes, np.float32))
  want = from_config.abstract_variables(c)
  if kind == 'pretrain' and not c.model.vocab:
    want['params'] = {k: v for k, v in want['params'].items() if not k.endswith('lm_head')}
  trees.check_same(variables, want, str(source), f'a {kind} model of its sizes')

  def write(folder: Path) -> None:
    config_lib.save(c, folder)
    stages.write_variables(folder, 0, variables)

  _write_beside(Path(target), write)
  m = c.model
  say = [f'a {kind} on a {"x".join(map(str, config_lib.patch_grid(c)))} grid of {m.patch_size} px patches']
  for side in (m.encoder, m.decoder) if kind == 'tokenizer' else (m,):
    say.append(f'{side.depth} blocks of width {side.width} in {side.heads} heads')
  if kind == 'pretrain' and m.head_layers:
    say.append(f'aggregation of {m.head_layers} blocks on the patches of block {m.early_layer}')
  if kind == 'segmenter':
    say.append(f'taps after blocks {", ".join(map(str, m.out_indices))} (from 0)')
  return ', '.join(say)


def export_checkpoint(source: str | Path, target: str | Path, form: str, ema: bool = False) -> None:
  """Writes what `source` (a workdir or an imported directory) holds as `form`: 'official', 'timm' or 'hf'.

  official and timm are one .safetensors file, or .pth where torch is installed; hf is a directory for from_pretrained, and timm may be
  one for timm.create_model('local-dir:DIR', pretrained=True). Directories say how images are prepared, and what the classes are called.
  With `ema` it is the running average of the weights.
  """
  c, variables, _ = stages.load_variables(source, 'a workdir or an imported directory')
  kind, target = c.task, Path(target)
  if kind not in KINDS:
    raise UserError(f'a {kind} stage has no official form; one of {", ".join(KINDS)} has.')
  average = variables.pop('ema', None)
  if ema and average is None:
    raise UserError(f'{source} was trained without ema_decay: there is no average of its weights.')
  state, grid = official.from_ours(kind, variables | (dict(params=average) if ema else {})), config_lib.patch_grid(c)
  # A buffer that torch insists on when it loads batch norms.
  state |= {k.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64) for k in state if k.endswith('running_mean')}
  if form == 'hf':
    state, config, preprocessor = huggingface.convert(kind, c, state, grid)

    def write(folder: Path) -> None:
      _write_tensors(folder / 'model.safetensors', state)
      (folder / 'config.json').write_text(json.dumps(config, indent=2))
      (folder / 'preprocessor_config.json').write_text(json.dumps(preprocessor, indent=2))

    return _write_beside(target, write)
  if form == 'timm' and kind != 'classifier':
    raise UserError(f'timm has classifiers of this family; this is a {kind}.')
  if form == 'timm' and not target.suffix:

    def write_timm(folder: Path) -> None:
      _write_tensors(folder / 'model.safetensors', state)
      (folder / 'config.json').write_text(json.dumps(descriptions.for_timm(c, grid), indent=2))

    return _write_beside(target, write_timm)
  if form == 'official':
    index = relative_position_index(grid).astype(np.int64)
    tables = [k for k in state if k.endswith('relative_position_bias_table')]
    state |= {k.replace('bias_table', 'index'): index for k in tables}
    if kind == 'tokenizer':  # fields that the official loader insists on
      state |= {'quantize.embedding.embed_avg': state['quantize.embedding.weight'], 'quantize.embedding.initted': np.ones(1, np.float32)}
  if target.suffix not in ('.pth', '.safetensors'):
    raise UserError(
      f'{target}: give a name that ends in .safetensors (or .pth, where torch is installed){", or a directory" * (form == "timm")}.'
    )
  _write_beside(target, lambda path: _write_tensors(path, state), folder=False)


def _write_tensors(path: Path, state: dict[str, np.ndarray]) -> None:
  if path.suffix == '.pth':
    try:
      import torch
    except ImportError as e:
      raise UserError('writing .pth needs torch; use a name that ends in .safetensors, or install torch.') from e
    torch.save({'model': {k: torch.from_numpy(np.array(v)) for k, v in state.items()}}, path)
  else:
    from safetensors.numpy import save_file

    save_file({k: np.array(v, order='C') for k, v in state.items()}, path, metadata={'format': 'pt'})


def _write_beside(target: Path, write: Callable[[Path], None], folder: bool = True) -> None:
  """Calls `write` on a temporary neighbour and renames it, so a failure leaves nothing half-written."""
  if re.match(r'\w+:/', str(target)):  # pathlib has made one slash of two
    raise UserError(f'{target}: converted weights are written to a disk; give a path there, and copy them to the bucket.')
  target = target.expanduser().absolute()
  if target.exists():
    raise UserError(f'{target} exists; remove it or choose another name.')
  target.parent.mkdir(parents=True, exist_ok=True)
  beside = Path(tempfile.mkdtemp(prefix=f'.{target.stem}-', dir=target.parent))
  path = beside if folder else beside / target.name
  try:
    write(path)
    path.chmod(0o755 if folder else 0o644)
    for file in path.glob('*.safetensors') if folder else ():
      file.chmod(0o644)  # the library writes them for the owner alone
    path.rename(target)
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def list_keys(kind: str, source: str | Path) -> str:
  """Every key, its shape and where it goes."""
  state = _read(kind, source)
  places = {None: 'NO HOME', '': 'dropped, as the official loader does'}
  lines = [(k, str(tuple(v.shape)), places.get(h := official.home(kind, k), h)) for k, v in sorted(state.items())]
  widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
  return '\n'.join(f'{k:{widths[0]}}  {s:{widths[1]}}  {place}' for k, s, place in lines)
