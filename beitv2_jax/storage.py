"""Where runs lie: a directory, or a folder of a bucket, gs://BUCKET/RUN, that all hosts of a run can reach.

A bucket keeps whole objects: nothing is renamed at once, and nothing is added to. So small files are written in one go, files that grow
(metrics, TensorBoard) are kept on this machine and sent again as they change (`Mirror`), and a checkpoint counts once Orbax has put its
mark into it.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

from beitv2_jax.errors import UserError

SEND_EVERY = 60.0  # seconds between two looks at what has grown


def place(where: str | os.PathLike) -> Any:
  """The path of a workdir: pathlib's for a directory, made absolute, and etils' for a bucket. Raises UserError for other addresses."""
  text = os.fspath(where)
  if '://' not in text:
    return Path(text).expanduser().absolute()
  if not text.startswith('gs://') or not text[5:].strip('/'):
    raise UserError(f'{text}: give a directory, or a folder of a Google Cloud Storage bucket, gs://BUCKET/RUN.')
  _file_system()
  from etils import epath

  return epath.Path(text.rstrip('/'))


def in_bucket(path: Any) -> bool:
  return os.fspath(path).startswith('gs://')


def renames(path: Any) -> bool:
  """Can a folder there be renamed in one step? Not in buckets, and not in those that gcsfuse mounts."""
  return not in_bucket(path) and _mount_type(Path(path)) != 'fuse.gcsfuse'


def _mount_type(path: Path, mounts: str = '/proc/self/mounts') -> str:
  """The type of the file system that holds `path`; '' where Linux does not say."""
  best, kind = '', ''
  with contextlib.suppress(OSError):
    for line in Path(mounts).read_text().splitlines():
      where, of_type = line.split(' ')[1:3]
      where = where.replace('\\040', ' ')
      if len(where) >= len(best) and path.is_relative_to(where):
        best, kind = where, of_type
  return kind


def _file_system() -> Any:
  """gcsfs, told to ask the bucket each time: other hosts and tensorstore write there as well."""
  try:
    import fsspec.config
    import gcsfs  # noqa: F401
  except ImportError as e:
    raise UserError("gs:// needs gcsfs: pip install 'beitv2_jax[gcs]'.") from e
  for name in ('gcs', 'gs'):
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return fsspec.filesystem('gcs', finalize_on_close=True)


@contextlib.contextmanager
def reaching(path: Any) -> Generator[None]:
  """What goes wrong in a bucket as OSError, with one line: gcsfs, aiohttp and Google's libraries raise many types."""
  try:
    yield
  except FileNotFoundError as e:
    if not in_bucket(path):
      raise
    raise OSError(f'{path}: {e} was not found; does the bucket exist?') from e
  except Exception as e:
    if not in_bucket(path) or isinstance(e, (FileExistsError, UserError)):
      raise
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise OSError(f'{path}: {reason[:300]}') from e


def write(path: Any, text: str) -> None:
  """Writes a small file at once: whoever reads it finds all of it, or what was there before. Raises OSError."""
  if in_bucket(path):
    with reaching(path):
      _file_system().pipe_file(os.fspath(path), text.encode())
    return
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(text)
  temporary.replace(path)


def create(path: Any, text: str) -> None:
  """Writes a file that must not be there yet. Raises FileExistsError if it is; other OSErrors."""
  if in_bucket(path):
    with reaching(path):
      if path.exists():  # the request below is refused as well, and stands for all who ask at the same moment
        raise FileExistsError(f'{path} exists')
      _file_system().pipe_file(os.fspath(path), text.encode(), mode='create')
    return
  with path.open('x') as file:  # atomic, on shared file systems too
    file.write(text)


def check_writable(folder: Any, name: str) -> None:
  """Makes the folder. For a bucket, writes a file `name` and removes it: the first to fail there would otherwise be a checkpoint,
  hours later. Raises UserError."""
  try:
    with reaching(folder):
      if in_bucket(folder):
        write(folder / name, '')
        (folder / name).unlink()
      else:
        folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f'cannot write to the workdir {folder}: {e.strerror or e}.') from e


def remove_tree(folder: Any) -> None:
  if in_bucket(folder):
    folder.rmtree()
  else:
    shutil.rmtree(folder)


def size(folder: Any) -> int:
  """Bytes of all files below a folder."""
  if in_bucket(folder):
    return _file_system().du(os.fspath(folder))
  return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())


class Mirror:
  """A folder of this machine whose files are kept in `workdir`: that folder itself or, for a bucket, a temporary one.

  `bring` fetches a file that a former run left; `send` uploads what has changed, as does a thread every minute. Files only.
  """

  def __init__(self, workdir: Any, every: float = SEND_EVERY):
    self.workdir, self.folder = workdir, workdir
    self.sent: dict[Path, tuple[int, int]] = {}  # version (bytes, time of the last change) of what the bucket has
    self.lock, self.stop, self.thread = threading.Lock(), threading.Event(), None
    if in_bucket(workdir):
      self.folder = Path(tempfile.mkdtemp(prefix='beitv2_jax-'))
      self.thread = threading.Thread(target=self._send_now_and_then, args=(every,), daemon=True)
      self.thread.start()

  def bring(self, name: str) -> None:
    if self.thread:
      with reaching(self.workdir / name):
        if (self.workdir / name).exists():
          data = (self.workdir / name).read_bytes()
          with self.lock:
            (self.folder / name).write_bytes(data)
            # Or every process of a run would upload it again, whose copy may be old by then.
            self.sent[self.folder / name] = _version(self.folder / name)

  def send(self) -> None:
    """Raises OSError if the bucket does not take it."""
    if not self.thread:
      return
    with self.lock:
      for path in sorted(p for p in self.folder.rglob('*') if p.is_file() and not p.name.startswith('.')):
        state = _version(path)
        if self.sent.get(path) != state:
          target = self.workdir / path.relative_to(self.folder).as_posix()
          with reaching(target):
            _file_system().pipe_file(os.fspath(target), path.read_bytes())
          self.sent[path] = state

  def _send_now_and_then(self, every: float) -> None:
    while not self.stop.wait(every):
      with contextlib.suppress(OSError):  # the next `send` of the run itself says it
        self.send()

  def close(self) -> None:
    if self.thread:
      self.stop.set()
      self.thread.join()
      self.send()
      shutil.rmtree(self.folder, ignore_errors=True)


def _version(path: Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns
