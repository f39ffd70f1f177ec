"""What a run says in the terminal: figures with their units, in the same columns each time."""

from collections.abc import Mapping, Sequence

UNITS = {
  'images_per_second': 'images/s',
  'steps_per_second': 'steps/s',
  'input_wait': 's',
  'device_waited': '%',
  'dead_codes': '%',
  'codes_used': '%',
  'pixel_acc': '%',
  'psnr': 'dB',
}


def unit(name: str) -> str:
  """'%' and the like; '' for what has none."""
  return UNITS.get(name) or ('%' if name.startswith(('mim_acc', 'acc', 'ema_acc')) else '')


LABELS = {'images_per_second': '', 'steps_per_second': '', 'input_wait': 'waited', 'device_waited': 'idle', 'bad_images': 'bad images'}


def figure(name: str, value: float, width: int = 0) -> str:
  """'mim_acc_1 15.63 %', the number padded to `width`."""
  label = LABELS.get(name, name)
  return f'{label}{" " if label else ""}{number(value):>{width}}{" " + unit(name) if unit(name) else ""}'


def number(value: float) -> str:
  return f'{value:.0f}' if 1e4 <= abs(value) < 1e9 else f'{value:.4g}'


def line(kind: str, step: int, steps: int, values: Mapping[str, float], first: Sequence[str] = (), left: float | None = None) -> str:
  """A full line: the kind, the step, the time left in seconds, the figures named in `first`, and the others."""
  order = [name for name in first if name in values]
  order += [name for name in values if name not in order]
  width = len(str(steps))
  when = [f'{duration(left):>10} left'] if left is not None else []
  return '  '.join([f'{kind:5} {step:{width}d}/{steps}', *when, *(figure(name, values[name], 9) for name in order)])


def duration(seconds: float) -> str:
  """'2 d 03 h', '3 h 07 min', '12 min 05 s' or '9 s'."""
  s = round(seconds)
  if s >= 86_400:
    return f'{s // 86_400} d {s % 86_400 // 3600:02d} h'
  if s >= 3600:
    return f'{s // 3600} h {s % 3600 // 60:02d} min'
  return f'{s // 60} min {s % 60:02d} s' if s >= 60 else f'{s} s'


def size(count: float) -> str:
  """Bytes as '12.3 GiB', '45 MiB'."""
  return f'{count / 2**30:.1f} GiB' if count >= 2**30 else f'{count / 2**20:.0f} MiB' if count >= 2**20 else f'{count / 2**10:.0f} KiB'
