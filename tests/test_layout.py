"""The house: no room imports one above it, and nothing imports in a circle."""

import ast
import graphlib

from tests.conftest import ROOT

# From the ground up. What stands in one line may not import each other.
FLOORS = [
  ('errors',),
  ('settings',),
  ('storage',),
  ('compiler', 'config', 'progress', 'tensor_files'),
  ('data', 'kernels', 'recipes', 'configs', 'reports'),
  ('models',),
  ('weights',),
  ('tasks',),
  ('training',),
  ('downstream', 'costs'),
  ('pictures', 'studies'),
  ('main', 'commands'),
  ('__main__', '__init__'),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# main and recipes are files of the root that a command and an entry point pass on to.
ALLOWED = {('commands', 'main'), ('recipes', 'configs')}


def modules():
  """{module name without 'beitv2_jax.': its file}, the recipes too."""
  package = ROOT / 'beitv2_jax'
  found = {'.'.join(p.relative_to(package).with_suffix('').parts): p for p in package.rglob('*.py')}
  return found | {f'configs.{p.stem}': p for p in (ROOT / 'configs').glob('*.py')}


def imported(path, known):
  """Modules of ours that a file imports, wherever in it."""
  out = set()
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'beitv2_jax':
      names = [f'{node.module}.{alias.name}' for alias in node.names]
      if any(name.removeprefix('beitv2_jax.') not in known for name in names):  # something that the module itself defines
        names.append(node.module)
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names if alias.name.startswith('beitv2_jax.')]
    for name in names:
      inner = name.removeprefix('beitv2_jax').lstrip('.')
      out |= {inner} & known or {f'{inner}.__init__'} & known
  return out


def graph():
  files = modules()
  return {name: imported(path, set(files)) - {name} for name, path in files.items()}


def room(module):
  return module.split('.')[0]


def test_no_room_imports_one_above_it():
  edges = [(a, b) for a, imports in graph().items() for b in imports]
  assert len(edges) > 150  # the reading works
  wrong = [
    f'{a} imports {b}' for a, b in edges if room(a) != room(b) and FLOOR[room(b)] >= FLOOR[room(a)] and (room(a), room(b)) not in ALLOWED
  ]
  assert not wrong, wrong


def test_nothing_imports_in_a_circle():
  order = list(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError, which names the circle
  assert set(order) == set(modules())


def test_only_some_rooms_know_flax_and_data_knows_no_jax_on_the_host():
  for name, path in modules().items():
    text = path.read_text()
    if 'flax.linen' in text:
      assert room(name) in ('models', 'kernels', 'tasks') or name == 'training.sharding', name
    if room(name) == 'data' and name != 'data.augment':  # augment is what happens on the device
      assert 'import jax' not in text, name
    if 'import transformers' in text:
      assert name == 'models.teacher'
