"""The kinds of attack. Each is made once in a folder of its own, and then called with a generator of random numbers: one attack a call."""

import atexit
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from beitv2_jax.configs import ade20k_b16, beitv2_b16, finetune_b16, pixels_b16, vqkd_b16
from PIL import Image

from beitv2_jax import storage
from beitv2_jax.commands import prepare
from beitv2_jax.data import decode, sources, transforms
from beitv2_jax.models import from_config
from beitv2_jax.training import loop, metrics
from beitv2_jax.weights import convert, official, stages, trees
from benchmarks.campaign import damages, outcomes, settings, weights
from benchmarks.campaign.zygote import Run, Zygote

ROOT = Path(__file__).parents[2]
OFFICIAL = ('tokenizer', 'pretrain', 'classifier', 'segmenter')  # tasks whose weights come from elsewhere too
RECIPES = dict(tokenizer=vqkd_b16, pretrain=beitv2_b16, classifier=finetune_b16, segmenter=ade20k_b16, pixels=pixels_b16)


def recipe(task: str, **changes: Any) -> Any:
  config = RECIPES[task].get_config('smoke').unlock()
  config.layers.scan, config.mesh.data = True, 1
  for key, value in changes.items():
    config[key] = value
  return config


def arrays(workdir: Any) -> dict[str, np.ndarray]:
  return trees.flatten(stages.load_variables(workdir)[1])


def differing(a: dict, b: dict) -> str:
  names = [k for k in a.keys() | b.keys() if k not in a or k not in b or not np.array_equal(a[k], b[k])]
  return f'{len(names)} arrays differ, such as {names[0]}' if names else ''


class Settings:
  """One to three settings of a smoke recipe at random, and two steps of training if they are accepted."""

  def __init__(self, folder: Path):
    self.folder = folder

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    config = recipe(list(RECIPES)[rng.integers(len(RECIPES))], steps=2)
    changed = settings.change(config, rng)
    if isinstance(config.steps, int) and not 0 <= config.steps <= 20:
      config.steps = min(config.steps, 3)
      if config.steps < 0 and isinstance(config.epochs, (int, float)) and config.epochs > 1:
        return outcomes.SAID, 'not tried: too long'
    shutil.rmtree(self.folder / 'run', ignore_errors=True)
    outcome, said = outcomes.of(lambda: loop.run(config.lock(), self.folder / 'run') and '')
    return outcome, f'{changed}: {said}'


class Damages:
  """A file of a finished run is damaged; then its weights are loaded, and the run gone on with to the same end."""

  def __init__(self, folder: Path):
    self.folder, self.config = folder, recipe('pretrain').lock()
    loop.run(self.config, folder / 'good')
    self.good = arrays(folder / 'good')

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    run = self.folder / 'run'
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(self.folder / 'good', run)
    what = damages.damage(run / 'checkpoints' / '6' if rng.random() < 0.8 else run, rng)
    outcome, said = outcomes.of(lambda: self._load_and_go_on(run))
    return outcome, f'{what}: {said}'

  def _load_and_go_on(self, run: Path) -> str:
    if (run / 'config.json').exists():
      try:
        _, variables, step = stages.load_variables(run)
        if step == 6 and (problem := differing(trees.flatten(variables), self.good)):
          return f'loaded: {problem}'
      except outcomes.UserError:
        pass  # said; and going on must mend it
    loop.run(self.config, run)
    rows = len(metrics.read(run)) + len(metrics.read(run, 'eval'))
    return differing(arrays(run), self.good) or ('' if rows <= 7 else f'{rows} lines of metrics')


class Weights:
  """Files of official weights, changed, into `convert import`."""

  def __init__(self, folder: Path):
    self.folder, self.states = folder, {}
    for task in OFFICIAL:
      config = recipe(task)
      if task == 'tokenizer':
        config.model.teacher_width = 24
      if task in ('classifier', 'segmenter'):
        config.model.classes = 5
      if task == 'pretrain':
        config.model.vocab = 32
      shapes = from_config.abstract_variables(config.lock())
      rng = np.random.default_rng(0)
      self.states[task] = official.from_ours(task, jax.tree.map(lambda x, r=rng: np.abs(r.normal(size=x.shape)).astype(np.float32), shapes))

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    kind = OFFICIAL[rng.integers(len(OFFICIAL))]
    path, what = weights.write(self.folder, self.states[kind], rng)
    out = self.folder / 'out'
    shutil.rmtree(out, ignore_errors=True)
    outcome, said = outcomes.of(lambda: self._import(kind, path, out))
    path.unlink()
    if os.path.exists('/tmp/beitv2_jax_ran_code'):
      return outcomes.WRONG, f'{what}: code ran'
    return outcome, f'{kind}, {what}: {said}'

  def _import(self, kind: str, path: Path, out: Path) -> str:
    convert.import_checkpoint(kind, path, out)
    bad = [k for k, v in arrays(out).items() if not np.isfinite(v).all()]
    return f'{bad[0]} is not finite' if bad else ''


class Images:
  """JPEGs, PNGs and others with damaged bytes or odd shapes and types, through decoding and both crops."""

  MODES = ('RGB', 'L', 'P', 'RGBA', 'CMYK', '1', 'LA', 'I;16', 'F')
  FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'PPM', 'AVIF')

  def __init__(self, folder: Path):
    self.path = folder / 'image'

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    size = (int(rng.choice([1, 2, 7, 64, 300])), int(rng.choice([1, 3, 50, 200, 5000])))
    mode, form = str(rng.choice(self.MODES)), str(rng.choice(self.FORMATS))
    self.path.write_bytes(self._encoded(rng, size, mode, form))
    what = [f'{form} {mode} {size}']
    if rng.random() < 0.8:
      for _ in range(rng.integers(1, 4)):
        what.append(damages.WAYS[rng.integers(3)](self.path, rng))
    outcome, said = outcomes.of(lambda: self._read(rng))
    return outcome, f'{", ".join(what)}: {said}'

  @staticmethod
  def _encoded(rng: np.random.Generator, size: tuple[int, int], mode: str, form: str) -> bytes:
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    if mode == 'I;16':
      image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == 'F':
      image = Image.fromarray(pixels[..., 0].astype(np.float32))
    else:
      image = Image.fromarray(pixels).convert(mode)
    out = io.BytesIO()
    try:
      image.save(out, form)
    except (OSError, ValueError, KeyError):  # this format does not hold this mode
      out = io.BytesIO()
      Image.fromarray(pixels).save(out, 'PNG')
    return out.getvalue()

  def _read(self, rng: np.random.Generator) -> str:
    try:
      image = decode.image(self.path.read_bytes(), *([(0, 65535)] if rng.random() < 0.5 else []))
    except decode.UNDECODABLE as e:
      raise outcomes.UserError(' '.join(str(e).split())) from e
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
      return f'{image.dtype} {image.shape}'
    for crop in (transforms.CenterCrop(224), transforms.RandomResizedCrop(224)):
      out = crop(dict(image=image), rng)['image']
      if out.shape != (224, 224, 3):
        return f'{type(crop).__name__} gives {out.shape}'
    return ''


class Lists:
  """Lists, parquet files and class folders, damaged; then opened and read to the end."""

  def __init__(self, folder: Path):
    self.folder = folder / 'data'
    self.folder.mkdir()
    for name in ('train', 'val'):
      for label in ('cat', 'dog'):
        (self.folder / name / label).mkdir(parents=True)
        for i in range(4):
          Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)).save(self.folder / name / label / f'{i}.png')
    files = [(f'{n}/{c}/{i}.png', c) for n in ('train', 'val') for c in ('cat', 'dog') for i in range(4)]
    (self.folder / 'list.txt').write_text(''.join(f'{path} {label}\n' for path, label in files))
    (self.folder / 'list.csv').write_text('path,label\n' + ''.join(f'{path},{label}\n' for path, label in files))
    import pyarrow
    from pyarrow import parquet

    rows = [dict(bytes=(self.folder / path).read_bytes(), path=path) for path, _ in files]
    table = pyarrow.table({'image': rows, 'label': [int(label == 'dog') for _, label in files]})
    parquet.write_table(table, self.folder / 'all.parquet', row_group_size=3)
    assert prepare.main([f'folder:{self.folder}', '--out', str(self.folder / 'shards'), '--workers', '1']) == 0

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    copy = self.folder.parent / 'copy'
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(self.folder, copy)
    kind = str(rng.choice(['list.txt', 'list.csv', 'all.parquet', 'folder', 'shards']))
    if kind in ('folder', 'shards'):
      what = damages.damage(copy / {'folder': 'train'}.get(kind, kind), rng)
    else:
      what = damages.WAYS[rng.integers(len(damages.WAYS))](copy / kind, rng)
    spec = {'folder': f'folder:{copy}', 'shards': f'tfds:{copy}/shards/images', 'all.parquet': f'parquet:{copy}/all.parquet'}.get(
      kind, f'list:{copy}/{kind}'
    )
    outcome, said = outcomes.of(lambda: self._read(spec))
    return outcome, f'{kind}, {what}: {said}'

  @staticmethod
  def _read(spec: str) -> str:
    for split in ('train', 'eval'):
      decoded = decode.Decoded(sources.make(spec, split, holdout=0.5))
      for i in range(len(decoded)):
        record = decoded[i]
        label, classes = record.get('label', 0), decoded.source.classes or ['']
        if record['image'].shape != (9, 9, 3) or not 0 <= label < len(classes):
          return f'{record["image"].shape} with label {label}'
    return ''


class Processes:
  """Base of what is done to a training process from outside. Its state must end as that of an undisturbed run."""

  ARGUMENTS = (
    '--config.layers.scan=True',
    '--config.steps=40',
    '--config.checkpoint.every=5',
    '--config.eval_every=10',
    '--config.log_every=1',
  )

  def __init__(self, folder: Path, **environment: str):
    self.folder, self.zygote = folder, Zygote(**environment)
    code, text = self.run(folder / 'good')
    assert code == 0, text
    self.good = arrays(folder / 'good')

  def start(self, workdir: Any, *more: str) -> Run:
    return self.zygote.start(['--config=configs/beitv2_b16.py:smoke', f'--workdir={workdir}', *self.ARGUMENTS, *more])

  def run(self, workdir: Any, *more: str, timeout: float = 60) -> tuple[int | None, str]:
    """(exit code, or None if it did not end in time, what it printed)."""
    return self.finish(self.start(workdir, *more), timeout)

  @staticmethod
  def finish(process: Run, timeout: float = 60) -> tuple[int | None, str]:
    try:
      text, _ = process.communicate(timeout=timeout)
      return process.returncode, text
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      return None, process.communicate()[0]

  def problem(self, workdir: Any) -> str:
    steps = [row['step'] for row in metrics.read(workdir)]
    if steps != list(range(1, 41)):
      return f'steps in the metrics: {steps}'
    if (evaluations := [row['step'] for row in metrics.read(workdir, 'eval')]) != [10, 20, 30, 40]:
      return f'evaluations in the metrics: {evaluations}'
    return differing(arrays(workdir), self.good)

  def fresh(self) -> Path:
    shutil.rmtree(self.folder / 'run', ignore_errors=True)
    return self.folder / 'run'


class Kills(Processes):
  """SIGKILL at twelve random moments, then to the end."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    workdir, moments = self.fresh(), rng.uniform(0, 3, 12).round(2)
    for moment in moments:
      process = self.start(workdir)
      time.sleep(moment)
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()
    outcome, said = outcomes.of_process(*self.run(workdir), lambda: self.problem(workdir))
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'after {moments} s: {said}'


class Signals(Processes):
  """SIGTERM or SIGINT at six random moments, once or twice, then to the end."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    workdir, done = self.fresh(), []
    for moment in rng.uniform(0, 3, 6).round(2):
      number, twice = int(rng.choice([signal.SIGTERM, signal.SIGINT])), rng.random() < 0.3
      done.append(f'signal {number} after {moment} s{", twice" * twice}')
      process = self.start(workdir)
      time.sleep(moment)
      process.send_signal(number)
      if twice:
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
      code, text = self.finish(process, 30)
      if code is None:
        return outcomes.HANG, '; '.join(done)
      if 'Traceback (most recent call last)' in text:
        return outcomes.TRACEBACK, f'{"; ".join(done)}: {text[-400:]}'
    outcome, said = outcomes.of_process(*self.run(workdir), lambda: self.problem(workdir))
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'{"; ".join(done)}: {said}'


class Disks(Processes):
  """A file system of a few hundred kilobytes that fills up while the run goes on, or is read-only; then more room, and to the end."""

  def __init__(self, folder: Path):
    super().__init__(folder)
    self.disk = folder / 'disk'
    self.disk.mkdir()

  def _mount(self, options: str) -> None:
    subprocess.run(['mount', *options.split(), 'tmpfs', str(self.disk)], check=True)

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    size = int(rng.integers(16, 1600))
    self._mount(f'-t tmpfs -o size={size}k')
    try:
      if rng.random() < 0.2:
        self._mount(f'-o remount,ro,size={size}k')
      code, text = self.run(self.disk / 'run')
      outcome, said = outcomes.of_process(code, text, lambda: self.problem(self.disk / 'run'))
      if outcome == outcomes.SAID:
        self._mount('-o remount,rw,size=50m')
        outcome, then = outcomes.of_process(*self.run(self.disk / 'run'), lambda: self.problem(self.disk / 'run'))
        said = f'{said} THEN {then}'
        outcome = outcome if outcome != outcomes.SAID else outcomes.WRONG
      return outcome, f'{size} kB: {said}'
    finally:
      subprocess.run(['umount', '-l', str(self.disk)])


class Slow(Processes):
  """A disk on which every write, rename, new folder and sync takes up to a while; SIGTERM or SIGKILL in between, then to the end.

  benchmarks/campaign/slow_disk.c stands before the C library and waits.
  """

  def __init__(self, folder: Path):
    library = folder / 'slow_disk.so'
    subprocess.run(['cc', '-shared', '-fPIC', '-O1', '-o', library, ROOT / 'benchmarks' / 'campaign' / 'slow_disk.c', '-ldl'], check=True)
    super().__init__(folder, LD_PRELOAD=str(library), SLOW_DISK=str(folder / 'slow'))

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    milliseconds = int(10 ** rng.uniform(0, 2))
    (self.folder / 'slow').write_text(str(milliseconds))
    workdir, kill, moment = self.fresh(), rng.random() < 0.5, round(float(rng.uniform(0, 8)), 2)
    process = self.start(workdir)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    code, text = self.finish(process)
    what = f'up to {milliseconds} ms, {"SIGKILL" if kill else "SIGTERM"} after {moment} s'
    if code is None:
      return outcomes.HANG, what
    if 'Traceback (most recent call last)' in text:
      return outcomes.TRACEBACK, f'{what}: {text[-400:]}'
    outcome, said = outcomes.of_process(*self.run(workdir, timeout=200), lambda: self.problem(workdir))
    (self.folder / 'slow').unlink()
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'{what}: {said}'


class Gone(Processes):
  """The workdir's folder vanishes while the run goes on, as a network disk does, and comes back: what was written meanwhile is lost."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    mount, away = self.folder / 'mount', self.folder / 'away'
    shutil.rmtree(mount, ignore_errors=True)
    mount.mkdir()
    process = self.start(mount / 'run')
    moment, length = rng.uniform(0, 3), rng.uniform(0.05, 3)
    deadline = time.monotonic() + 20
    while not (mount / 'run' / 'run.lock').exists() and time.monotonic() < deadline:  # before that an empty folder is all there was
      time.sleep(0.02)
    time.sleep(moment)
    mount.rename(away)
    time.sleep(length)
    for _ in range(20):
      shutil.rmtree(mount, ignore_errors=True)
      with contextlib.suppress(OSError):  # the run has made it again
        away.rename(mount)
        break
    outcome, said = outcomes.of_process(*self.finish(process), lambda: self.problem(mount / 'run'))
    if outcome == outcomes.SAID:
      outcome, then = outcomes.of_process(*self.run(mount / 'run'), lambda: self.problem(mount / 'run'))
      said = f'{said} THEN {then}'
      outcome = outcome if outcome != outcomes.SAID else outcomes.WRONG
    return outcome, f'after {moment:.2f} s for {length:.2f} s: {said}'


class Topologies(Processes):
  """Stopped at a random step and gone on with on other devices, with other layouts; the numbers agree to rounding.

  Without drop path, which draws anew for every part of a batch.
  """

  ARGUMENTS = (*Processes.ARGUMENTS, '--config.model.drop_path=0')
  CHANGES = (
    '--config.mesh.data=1', '--config.mesh.data=2', '--config.mesh.data=4', '--config.mesh.model=2', '--config.accumulate=2', '--config.layers.remat=full',
    '--config.mesh.shard_state=False', '--config.layers.scan=False',
  )  # fmt: skip

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    workdir, done = self.fresh(), []
    for steps in sorted(rng.choice(np.arange(1, 40), 2, replace=False)):
      chosen = [str(c) for c in rng.choice(self.CHANGES, 2, replace=False)]
      if sum('mesh.data' in c or 'mesh.model' in c for c in chosen) > 1:
        chosen = chosen[:1]
      done.append(f'{" ".join(c.removeprefix("--config.") for c in chosen)} to {steps}')
      process = self.start(workdir, *chosen)
      deadline = time.monotonic() + 50
      while process.poll() is None and time.monotonic() < deadline and len(metrics.read(workdir)) < steps:
        time.sleep(0.05)
      process.send_signal(signal.SIGTERM)
      code, text = self.finish(process)
      if code not in (0, 143, -signal.SIGTERM):  # the last: before Python had set itself up
        return outcomes.of_process(code, text, lambda: '')[0], f'{done}: {text[-300:]}'
    outcome, said = outcomes.of_process(*self.run(workdir), lambda: self.close(workdir))
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'{"; ".join(done)}: {said}'

  def close(self, workdir: Path) -> str:
    losses = [[row['loss'] for row in metrics.read(where)] for where in (workdir, self.folder / 'good')]
    if len(losses[0]) != len(losses[1]):
      return f'{len(losses[0])} steps instead of {len(losses[1])}'
    worst = float(np.abs(np.subtract(*losses) / losses[1]).max())
    return f'losses are off by {worst:.1e}' if worst > 1e-5 else ''


class Workers(Processes):
  """SIGKILL of a decoding process, or of the main one, whose decoding processes must end with it; then to the end."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    workdir, moment, main_one = self.fresh(), round(float(rng.uniform(0, 3)), 2), rng.random() < 0.5
    process = self.start(workdir, '--config.data.workers=2')
    until = time.monotonic() + 30
    while not (found := _children(process.pid)) and process.poll() is None and time.monotonic() < until:
      time.sleep(0.02)
    time.sleep(moment)
    for pid in [process.pid] if main_one else found[:1]:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code, text = self.finish(process)
    what = f'{"the main process" if main_one else "a decoding process"} after {moment} s'
    if not main_one and (code is None or 'Traceback' in text):
      return outcomes.of_process(code, text, lambda: '')[0], f'{what}: {text[-400:]}'
    until = time.monotonic() + 10
    while any(_alive(pid) for pid in found):
      if time.monotonic() > until:
        return outcomes.WRONG, f'{what}: decoding processes are left'
      time.sleep(0.1)
    outcome, said = outcomes.of_process(*self.run(workdir), lambda: self.problem(workdir))
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'{what}: {said}'


def _children(pid: int) -> list[int]:
  """The decoding processes of a run; not Python's own tracker of shared memory."""
  with contextlib.suppress(OSError):
    children = [int(p) for task in Path(f'/proc/{pid}/task').iterdir() for p in (task / 'children').read_text().split()]
    return [p for p in children if b'spawn_main' in Path(f'/proc/{p}/cmdline').read_bytes()]
  return []


def _alive(pid: int) -> bool:
  with contextlib.suppress(OSError):
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  return False


class Peers(Processes):
  """Two processes, one of which is killed or gets a SIGTERM; both must end, and then go on to the end."""

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    workdir, victim, kill, moment = self.fresh(), int(rng.integers(2)), rng.random() < 0.5, round(float(rng.uniform(0, 6)), 2)
    runs = self.both(workdir)
    time.sleep(moment)
    runs[victim].send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    ends = [self.finish(run, 110) for run in runs]
    what = f'{"SIGKILL" if kill else "SIGTERM"} to process {victim} after {moment} s'
    for index, (code, text) in enumerate(ends):
      if code is None:
        return outcomes.HANG, f'{what}: process {index}: {text[-300:]}'
      if 'Traceback (most recent call last)' in text:
        return outcomes.TRACEBACK, f'{what}: process {index}: {text[-600:]}'
    ends = [self.finish(run, 110) for run in self.both(workdir)]
    for code, text in ends:
      if code != 0:
        return outcomes.WRONG if code is not None else outcomes.HANG, f'{what}: then {code}: {text[-300:]}'
    steps = [row['step'] for row in metrics.read(workdir)]
    return (outcomes.GOOD if steps == list(range(1, 41)) else outcomes.WRONG), f'{what}: {"" if len(steps) == 40 else steps}'

  def both(self, workdir: Path) -> list[Run]:
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    return [self.start(workdir, f'--coordinator=localhost:{port}', '--processes=2', f'--process={i}') for i in (0, 1)]


class Buckets(Processes):
  """A bucket server of this machine that refuses three in a hundred requests; SIGKILL at two random moments, then to the end."""

  def __init__(self, folder: Path):
    command = [sys.executable, str(ROOT / 'tests' / 'bucket_server.py'), '--trouble', '0.03']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(server.kill)
    assert server.stdout
    address = f'http://127.0.0.1:{server.stdout.readline().strip()}'
    os.environ.update(
      TENSORSTORE_GCS_HTTP_URL=address, GOOGLE_AUTH_TOKEN_FOR_TESTING='x', STORAGE_EMULATOR_HOST=address, FSSPEC_GCS_TOKEN='anon',
      GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false',
    )  # fmt: skip
    super().__init__(folder)
    self.count = 0

  def __call__(self, rng: np.random.Generator) -> tuple[str, str]:
    self.count += 1
    workdir, moments = f'gs://runs/{self.folder.name}{self.count}', rng.uniform(0, 12, 2).round(2)
    for moment in moments:
      process = self.start(workdir, *self.FEWER)
      time.sleep(moment)
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()
    outcome, said = outcomes.of_process(*self.run(workdir, *self.FEWER, timeout=200), lambda: self.problem(storage.place(workdir)))
    storage.remove_tree(storage.place(workdir))
    return (outcome if outcome != outcomes.SAID else outcomes.WRONG), f'after {moments} s: {said}'

  FEWER = ('--config.checkpoint.every=20',)  # a save takes seconds where requests are refused


KINDS = dict(
  settings=Settings, damages=Damages, weights=Weights, images=Images, lists=Lists, kills=Kills, signals=Signals, disks=Disks, topologies=Topologies,
  workers=Workers, peers=Peers, buckets=Buckets, gone=Gone, slow=Slow,
)  # fmt: skip
