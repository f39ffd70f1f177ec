"""What the TPU compiler writes down of every operation it made: the instructions, in the order in which the chip issues them.

A chip issues one of these (wide) instructions a cycle, unless it waits for memory or for a unit. So their number shows where the compiler's cost
model is far off, and no more than that: how long the matrix units are busy with a product is not in it.
"""

import re
from pathlib import Path

# A line of an operation's program: an address, LB where a loop begins, and the instruction. Where the loop ends it is compared with its
# number of turns, and then branched back.
_LINE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?P<mark>[A-Z]{2})?\s*:[\s>]*\{(?P<instruction>.*)$')
_TURNS = re.compile(r'scmp\.\w+\.s32\.totalorder %\w+, (?:(\d+)|%\w+) /\* loop exit test')
_BACK = re.compile(r'sbr\.rel \(!')


def take(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
  """({operation: instructions of its program}, {operation: those that are issued, loops counted as often as they turn}) of the dumps in a
  folder, which are removed."""
  lengths, issued_by = {}, {}
  for file in folder.iterdir():
    name = re.fullmatch(r'\d+-(.+)-\d+-(schedule-analysis_)?final_bundles.txt', file.name)
    if name:
      text = file.read_text(errors='replace')
      if name[2]:
        length = re.search(r'total scheduled bundles:\s+(\d+)', text)
        lengths |= {name[1]: int(length[1])} if length else {}
      else:
        issued_by[name[1]] = issued(text)
    file.unlink()
  return lengths, issued_by


def issued(text: str) -> int:
  """Instructions that a program issues. Every branch counts as taken; a loop whose number of turns is not in the text turns once."""
  loops: list[list[int]] = [[0, 1]]  # instructions so far and turns, of the loops that we are in, outermost first
  for line in text.splitlines():
    if not (found := _LINE.match(line)):
      continue
    if found['mark'] == 'LB':
      loops.append([0, 0])
    loops[-1][0] += 1
    if turns := _TURNS.search(found['instruction']):
      loops[-1][1] = int(turns[1] or 1)
    if len(loops) > 1 and loops[-1][1] and _BACK.search(found['instruction']):
      _close(loops)
  while len(loops) > 1:
    _close(loops)
  return loops[0][0]


def _close(loops: list[list[int]]) -> None:
  length, turns = loops.pop()
  loops[-1][0] += length * max(turns, 1)
