"""What lies in checkpoints/STEP, and whether it is whole.

Orbax writes the items (`variables`, `optimizer`) under a temporary name and renames them at the end; in a bucket, where nothing can be
renamed, it puts a mark beside them at the end. It does not look at what it reads,
so a third item, `checksums`, keeps shape, type and checksum of every array. What does not agree with it is never used.
"""

import itertools
import json
import logging as std_logging
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from beitv2_jax import storage
from beitv2_jax.weights import checksums, trees

logging.set_verbosity(logging.WARNING)  # Orbax reports every phase of a save


def _without_tracebacks(record: Any) -> bool:
  """Orbax logs whatever fails in its threads with a traceback, and raises it as well; we say it once, in a line."""
  ours = not any(package in record.pathname for package in ('orbax', 'asyncio', 'etils', 'tensorstore'))
  return ours or not (record.exc_info or record.levelno >= std_logging.ERROR)


for _logger in (logging.get_absl_logger(), std_logging.getLogger('asyncio'), std_logging.getLogger()):
  _logger.addFilter(_without_tracebacks)
for _handler in (logging.get_absl_handler(), *std_logging.getLogger().handlers):
  _handler.addFilter(_without_tracebacks)
NAME, MARK = 'checksums', 'commit_success.txt'


class Damaged(Exception):
  """A checkpoint is not what was saved. The message says in which way."""


def steps(folder: Any) -> list[int]:
  """Numbers of the checkpoints under `folder` that were written to their end, newest first. They may be damaged all the same."""
  with storage.reaching(folder):
    if not folder.is_dir():
      return []
    marked = not storage.renames(folder)
    found = [p for p in folder.iterdir() if p.name.isdigit() and (p / MARK).exists() >= marked and p.is_dir()]
  return sorted((int(p.name) for p in found), reverse=True)


def manager(folder: Any, keep: int | None = None, keep_every: int = 0) -> ocp.CheckpointManager:
  """Orbax's view of a folder, which writes in the background."""
  how = ocp.options.AtomicityMode.ATOMIC_RENAME if storage.renames(folder) else ocp.options.AtomicityMode.COMMIT_FILE
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True, cleanup_tmp_directories=True,
    atomicity_options=ocp.options.AtomicityOptions(mode=how),
  )  # fmt: skip
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers())


def handlers() -> dict[str, Any]:
  items = {item: ocp.StandardCheckpointHandler() for item in ('variables', 'optimizer')}
  return items | {NAME: ocp.JsonCheckpointHandler(f'{NAME}.json')}


def to_save(**items: Any) -> Any:
  """Orbax's arguments to save these trees of arrays, with their checksums."""
  arrays = {item: _describe(tree) for item, tree in items.items()}
  saves = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
  return ocp.args.Composite(**saves, **{NAME: ocp.args.JsonSave(dict(arrays=arrays, crc32=_crc32(arrays)))})


def _describe(tree: Any) -> dict[str, list]:
  sums = checksums.of_tree(tree)
  return {name: [list(x.shape), str(x.dtype), sums[name]] for name, x in trees.flatten(tree).items()}


def _crc32(arrays: Any) -> int:
  return zlib.crc32(json.dumps(arrays, sort_keys=True).encode())


def contents(path: Any) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """{item: {name of an array: shape and type}} of the checkpoint in `path`. Raises Damaged."""
  return {
    item: {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype, _) in arrays.items()}
    for item, arrays in _recorded(path).items()
  }


def _recorded(path: Any) -> dict[str, dict[str, list]]:
  file = path / NAME / f'{NAME}.json'
  try:
    recorded = json.loads(file.read_bytes())
    arrays, crc32 = recorded['arrays'], recorded['crc32']
  except FileNotFoundError:
    raise Damaged('its checksums are missing') from None
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise Damaged(f'its checksums do not read: {type(e).__name__}') from e
  if crc32 != _crc32(arrays):
    raise Damaged('its checksums were changed')
  return arrays


def read(path: Any, item: str, target: Any = None) -> Any:
  """An item's arrays, held to their checksums: numpy arrays in nested dicts, or with the structure, types and shardings of `target`.

  With a target all processes must call it, and all of them raise Damaged if one finds damage.
  """
  recorded = _recorded(path)
  if item not in recorded:
    raise Damaged(f'it has no {item}')
  values, failure = None, ''
  try:
    values = _restore(path / item, recorded[item], target)
  except Exception as e:  # missing, cut or changed files: Orbax and tensorstore raise many types
    failure = f'{item} does not read: {(str(e).splitlines() or [type(e).__name__])[0][:200]}'
  if target is not None and jax.process_count() > 1 and not np.all(multihost_utils.process_allgather(np.array(not failure))):
    failure = failure or f'{item} does not read in another process'
  if failure:
    raise Damaged(failure)
  checksums_agree(path, item, values)
  return values if target is None else jax.tree.map(lambda x, like: x.astype(like.dtype), values, target)


def checksums_agree(path: Any, item: str, values: Any) -> None:
  """Raises Damaged unless the arrays of an item are those that were saved."""
  recorded, sums = _recorded(path)[item], checksums.of_tree(values)
  wrong = [name for name, (_, _, expected) in recorded.items() if sums.get(name) != expected]
  if wrong:
    raise Damaged(f'{len(wrong)} of {len(recorded)} arrays of {item} do not agree with their checksums, such as {wrong[0]}')


def _restore(folder: Any, recorded: dict[str, list] | None, target: Any) -> Any:
  """By Orbax's handlers, which wait for no other process, so that one that fails leaves none waiting."""
  # With a target Orbax would do without these metadata: then what one reader took, another would not.
  saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
  if target is None or recorded is None:
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    return ocp.PyTreeCheckpointHandler().restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore_args))
  dtype = lambda path: np.dtype(recorded[trees.path_name(path)][1])
  target = jax.tree_util.tree_map_with_path(lambda path, x: jax.ShapeDtypeStruct(x.shape, dtype(path), sharding=x.sharding), target)
  return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))


def free_name(folder: Any, name: str) -> str:
  """`name`, with a number behind it if there is such a file already."""
  taken = {p.name for p in folder.iterdir()}
  return next(n for n in itertools.chain([name], (f'{name}-{i}' for i in itertools.count(2))) if n not in taken)


def survey(folder: Any, verify: bool = False) -> list[dict[str, Any]]:
  """What there is under `folder`, newest first: name, step (None for what Orbax does not use), bytes, when it was saved, state.

  Without `verify` only the checksums' own file is read.
  """
  whole = steps(folder)
  others = sorted(p.name for p in folder.iterdir() if p.is_dir() and not (p.name.isdigit() and int(p.name) in whole))
  rows: list[tuple[str, int | None, str]] = [(str(step), step, _state(folder / str(step), verify)) for step in whole]
  rows += [(name, None, 'set aside' if name.startswith('damaged-') else 'unfinished') for name in others]
  return [
    dict(name=name, step=step, bytes=storage.size(folder / name), saved=_saved(folder / name), state=state) for name, step, state in rows
  ]


def _state(path: Any, verify: bool) -> str:
  try:
    for item in contents(path):
      if not (path / item).is_dir():
        raise Damaged(f'it has no {item}')
      if verify:
        checksums_agree(path, item, _restore(path / item, None, None))
  except Damaged as e:
    return f'damaged: {e}'
  except Exception as e:  # as in `read`
    return f'damaged: {(str(e).splitlines() or [type(e).__name__])[0][:200]}'
  return 'whole' if verify else 'complete'


def prune(folder: Any, found: list[dict[str, Any]], keep: int) -> list[str]:
  """Removes all but the newest `keep` whole checkpoints of a verified survey; nothing if none is whole. Returns the removed names."""
  good = [row['name'] for row in found if row['state'] == 'whole'][:keep]
  gone = [row['name'] for row in found if row['name'] not in good] if good else []
  for name in gone:
    storage.remove_tree(folder / name)
  return gone


def trust(folder: Any) -> list[int]:
  """Writes checksums, of what is there now, for checkpoints made before there were any. Returns their steps."""
  done = []
  for step in steps(folder):
    path = folder / str(step)
    if (path / NAME).exists():
      continue
    items = [item for item in ('variables', 'optimizer') if (path / item).is_dir()]
    arrays = {item: _describe(_restore(path / item, None, None)) for item in items}
    (path / NAME).mkdir()
    storage.write(path / NAME / f'{NAME}.json', json.dumps(dict(arrays=arrays, crc32=_crc32(arrays))))
    done.append(step)
  return done


def _saved(path: Any) -> float | None:
  """When, in seconds since 1970; folders of a bucket have no time, so their mark's is taken."""
  if not storage.in_bucket(path):
    return path.stat().st_mtime
  return (path / MARK).stat().mtime if (path / MARK).exists() else None
