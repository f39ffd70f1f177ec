"""What a program compiled by XLA for TPUs says about itself: the compiler's cycles for every operation, and its collectives."""

import collections
import math
import re
from collections.abc import Callable
from typing import Any

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
  'f8e4m3fn': 1, 'f8e5m2': 1,
}  # fmt: skip
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'iota', 'while', 'call',
  'conditional', 'opt-barrier', 'add-dependency',
}  # fmt: skip


def _shape_bytes(text: str) -> int:
  """Bytes of a result type, an array or a tuple of arrays, without its layout."""
  return sum(
    _BYTES[t] * math.prod(int(d) for d in dims.split(',') if d) for t, dims in re.findall(r'(\w+)\[([\d,]*)\]', text) if t in _BYTES
  )


def _group(rest: str) -> int:
  """How many devices take part in a collective: of groups that are listed, counted, or named by axes of the mesh."""
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return len(listed[1].split(','))
  if counted := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(counted[1])
  if named := re.search(r'replica_groups=mesh\[([^]]*)\] \{([^}]*)\}', rest):
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in named[2].split(','))
  return 1


def _anonymous(shape: str, opcode: str, rest: str) -> str:
  """An operation without the names in it, and without what the compiler notes of it."""
  return f'{shape} {opcode}(' + re.sub(r'%[\w.\-]+', '%', rest.split(', metadata=')[0].split(', backend_config=')[0])


class Program:
  """The text of a compiled module, read once.

  A loop counts as often as it turns. Inside a fusion nothing counts: the fusion itself carries the estimate.
  Kernels of our own (custom calls) carry none: they count as `kernel_cycles(names, turns, bytes in and out)`, if given. The names
  are those of all calls of the same kernel, of which the compiler keeps one. `issued` are instructions by name (costs/schedules.py).
  """

  def __init__(
    self, text: str, kernel_cycles: Callable[[list[str], int, int], int | None] | None = None, issued: dict[str, int] | None = None
  ):
    text = re.sub(r'\{\n("turns":"\d+")\n\}', r'{\1}', text)  # a kernel's metadata is spread over lines
    self.computations: dict[str, list[dict]] = {}
    self.entry, current = '', None
    self.issued = issued or {}
    for line in text.splitlines():
      head = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$', line)
      if head:
        current = self.computations.setdefault(head[2], [])
        self.entry = head[2] if head[1] else self.entry
      elif current is not None and (found := re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$', line)):
        current.append(self._instruction(*found.groups()))
    kernels = [i for c in self.computations.values() for i in c if i['kernel']]
    for i in kernels:
      if kernel_cycles is None:
        break
      same = [j['name'] for j in kernels if j['kernel']['body'] == i['kernel']['body']]
      i['cycles'] = kernel_cycles(same, i['kernel']['turns'], i['kernel']['moved'])
    self.times: collections.Counter = collections.Counter()
    self.started: collections.Counter = collections.Counter()  # what starts a collective that goes on beside computing
    self.scattered: collections.Counter = collections.Counter()  # fusions that sum over chips and keep a part: a reduce-scatter
    self.unknown_loops = 0  # counted as one turn
    if self.entry:
      self._visit(self.entry, 1)

  def _instruction(self, name: str, shape: str, opcode: str, rest: str) -> dict[str, Any]:
    found = re.search(r'"estimated_cycles":"?(\d+)', rest)
    cycles = int(found[1]) if found else None
    turns = re.search(r'kernel_metadata=\{"turns":"(\d+)"\}', rest)
    kernel = None
    if turns and opcode == 'custom-call':
      operands, body = re.search(r'operand_layout_constraints=\{(.*?\})\}', rest), re.search(r'"body":"([^"]*)"', rest)
      moved = _shape_bytes(shape) + _shape_bytes(operands[1] if operands else '')
      kernel = dict(turns=int(turns[1]), moved=moved, body=body[1] if body else name)
    constant = re.match(r'(\d+)\)', rest) if opcode == 'constant' else None
    source = re.search(r'op_name="([^"]*)"', rest)
    called = dict(re.findall(r'(body|condition|to_apply|calls|called_computations)=\{?%?([\w.\-]+)', rest))
    branches = re.search(r'branch_computations=\{([^}]*)\}', rest)
    return dict(
      name=name, shape=shape, form=_anonymous(shape, opcode, rest), opcode=opcode, kernel=kernel, bytes=_shape_bytes(shape), cycles=cycles, constant=int(constant[1]) if constant else None,
      source=source[1] if source else '', called=called, starts='custom_call_target="AsyncCollectiveStart"' in rest,
      group=_group(rest),
      branches=[b.strip().lstrip('%') for b in branches[1].split(',')] if branches else [],
    )  # fmt: skip

  def _turns(self, condition: str) -> int | None:
    """How often a loop turns: jax's scans count from 0 to a constant in their condition."""
    return max((i['constant'] for i in self.computations.get(condition, ()) if i['constant'] is not None), default=None)

  def _visit(self, name: str, times: int) -> None:
    """Notes how often every computation runs."""
    self.times[name] += times
    for i in self.computations.get(name, ()):
      if i['opcode'] == 'while':
        turns = self._turns(i['called']['condition'])
        self.unknown_loops += turns is None
        self._visit(i['called']['body'], times * (turns or 1))
        self._visit(i['called']['condition'], times * (turns or 1))
      elif i['opcode'] == 'call':
        self._visit(i['called']['to_apply'], times)
      elif i['opcode'] == 'conditional':
        for branch in i['branches']:
          self._visit(branch, times)
      elif i['opcode'] == 'async-start' and 'calls' in i['called']:
        self._visit(i['called']['calls'], times)
      elif i['opcode'] == 'custom-call-start' and 'called_computations' in i['called']:  # what the chip's SparseCores do
        self.started[i['called']['called_computations']] += times
      elif i['opcode'] == 'fusion' and any(j['starts'] for j in self.computations.get(i['called'].get('calls'), ())):
        self.started[i['called']['calls']] += times
      elif i['opcode'] == 'fusion' and i['called'].get('calls', '').startswith('all-reduce-scatter'):
        self.scattered[i['called']['calls']] += times

  def _all(self, times_by: dict[str, int] | None = None):
    for name, times in (self.times if times_by is None else times_by).items():
      for i in self.computations.get(name, ()):
        yield i, times

  def cycles(self) -> int:
    return sum(i['cycles'] * times for i, times in self._all() if i['cycles'])

  def instructions(self) -> int:
    """As `cycles`, by the instructions that are issued."""
    return sum(issued * times for _, times, issued in self._issued())

  def _issued(self):
    """(operation, times, instructions) of those that have cycles. Of operations that are the same the compiler keeps one: the others take
    its number. An operation of which none is known, and a kernel, takes its cycles."""
    known = {self._same(i): self.issued[i['name']] for i, _ in self._all() if i['name'] in self.issued}
    for i, times in self._all():
      if i['cycles']:
        yield i, times, i['cycles'] if i['kernel'] else known.get(self._same(i), i['cycles'])

  def _same(self, i: dict[str, Any]) -> Any:
    """What operations that are made the same way have in common."""
    return i['shape'], i['opcode'], i['cycles'], tuple(j['form'] for j in self.computations.get(i['called'].get('calls'), ()))

  def dearest(self) -> list[dict[str, Any]]:
    """Operations by what they come from in the model, block numbers left out, the most expensive first."""
    cycles, instructions, counts = collections.Counter(), collections.Counter(), collections.Counter()
    for i, times, issued in self._issued():
      name = re.sub(r'jit\(\w+\)/|jvp\(\)/|_\d+(?=/|\)|$)', '', i['source']) or i['opcode']
      cycles[name] += i['cycles'] * times
      instructions[name] += issued * times
      counts[name] += times
    return [dict(name=n, cycles=c, issued=instructions[n], count=counts[n]) for n, c in cycles.most_common(60)]

  def collectives(self) -> list[dict[str, Any]]:
    """Per kind: how often a step, the bytes a chip sends (ring algorithms: twice the result for an all-reduce), and those of them that
    nothing is computed beside, as the compiler has it."""
    counts, moved, waited = collections.Counter(), collections.Counter(), collections.Counter()
    for computations, alone in ((self.times, True), (self.started, False), (self.scattered, True)):
      for i, times in self._all(computations):
        kind = i['opcode'].removesuffix('-start')
        if kind in _COLLECTIVES:
          sent = times * i['bytes'] * (2 if kind == 'all-reduce' else i['group'] if kind == 'reduce-scatter' else 1)
          if computations is self.scattered:
            kind, sent = 'reduce-scatter', sent // 2
          counts[kind] += times
          moved[kind] += sent
          waited[kind] += sent if alone and not i['opcode'].endswith('-start') else 0
    kinds = sorted(counts, key=lambda k: moved[k], reverse=True)
    return [dict(kind=k, count=counts[k], bytes=moved[k], waited=waited[k]) for k in kinds]

  def without_estimate(self) -> dict[str, int]:
    """Kinds of operations that take time but carry none: custom calls, collectives, copies between memories."""
    kinds = collections.Counter()
    for i, times in self._all():
      if i['cycles'] is None and i['opcode'] not in _FREE and not i['opcode'].endswith(('-done', '-update')):
        kinds[i['opcode']] += times
    return dict(kinds.most_common())
