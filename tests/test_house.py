"""The order of floors: the package's imports run downward only, those inside of functions too."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'convnn_timm'
# From the ground up. A module imports from its own part of the package and from the floors below, not from another part
# of its floor. The package's own __init__ holds what is imported from everywhere (the version), and loads lazily.
FLOORS = [
    ('errors', 'autoload'), ('__init__',), ('ops', 'images'), ('macs',), ('layers',), ('conversion',), ('models',),
    ('train', 'inspect'), ('hub',), ('quickstart',), ('cli',), ('__main__',)]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
FILES = sorted(PACKAGE.rglob('*.py'))


def name_of(file):
    """The module's name below the package, in parts; ('layers', '__init__') for a package's own file."""
    return file.relative_to(PACKAGE).with_suffix('').parts


def imports(name, source):
    """Of each import of a module: its line, the part of this package or else the package, and whether it is this."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ['convnn_timm', *name][:-node.level] if node.level else []
            base = '.'.join([*base, *filter(None, [node.module])])
            modules = [f'{base}.{alias.name}' for alias in node.names] if base == 'convnn_timm' else [base]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition('.')
            part = rest.partition('.')[0]
            if package != 'convnn_timm':
                yield node.lineno, package, False
            else:
                yield node.lineno, part if part in FLOOR else '__init__', True


def upward(name, source):
    """What a module imports against the order of floors, each with its line."""
    part = name[0]
    for line, imported, is_own in imports(name, source):
        if is_own and imported != part and FLOOR[imported] >= FLOOR[part]:
            yield f'convnn_timm/{"/".join(name)}.py:{line}: {part} imports {imported}'
        if not is_own and imported == 'timm' and part in ('ops', 'macs', 'layers'):
            yield f'convnn_timm/{"/".join(name)}.py:{line}: {part} imports timm, which imports the models'


def test_every_module_has_a_floor():
    assert {name_of(file)[0] for file in FILES} == set(FLOOR)


def test_imports_run_downward_only():
    assert not [found for file in FILES for found in upward(name_of(file), file.read_text())]


@pytest.mark.parametrize('name, line, fault', [
    (('layers', 'convnn'), 'from convnn_timm.models import _weights', 'layers imports models'),
    (('layers', 'convnn'), 'def f():\n    from .. import conversion', 'layers imports conversion'),
    (('ops', 'triton', 'knn'), 'from ...layers.base import NeighborLayer', 'ops imports layers'),
    (('train', 'data'), 'import convnn_timm.inspect.neighbors', 'train imports inspect'),
    (('ops', 'knn'), 'from timm.layers import Mlp', 'ops imports timm, which imports the models'),
    (('models', 'convnn_vgg'), 'from ..conversion import convert', None),
    (('cli', 'commands'), 'from convnn_timm import __version__, models', None),
    (('ops', 'triton', 'knn'), 'from ..paths import interpreting\nfrom . import block', None)])
def test_an_import_upward_is_found(name, line, fault):
    found = list(upward(name, line))
    assert [text.partition(': ')[2] for text in found] == ([fault] if fault else [])


def test_no_two_files_of_tests_share_a_name():
    """pytest imports each by its bare name, and a second one of a name not at all."""
    names = [file.name for file in Path(__file__).parent.rglob('test_*.py')]
    assert sorted(names) == sorted(set(names))
