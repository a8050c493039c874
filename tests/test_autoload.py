"""How the models reach timm's registry. Imports happen once in a Python, so every test starts its own."""
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import convnn_timm

MODEL = 'resnet18_convnn_branching'

# Stands for timm's scripts: it imports torch and timm and knows of no other package.
SCRIPT = f'''
import sys
import timm
import torch
import beside_the_script

class Models(torch.utils.data.Dataset):
    """One item: whether the process that loads it finds the model."""
    def __len__(self): return 1
    def __getitem__(self, index): return timm.is_model('{MODEL}')

if __name__ == '__main__':
    model = timm.create_model('{MODEL}', num_classes=7, device='meta')
    print(f'{{sys.argv[1:]}} {{model.num_classes}} classes\\n', end='')
    for start in sys.argv[1:]:
        found, = torch.utils.data.DataLoader(Models(), num_workers=1, multiprocessing_context=start)
        print(f'{{start}} {{found.item()}}\\n', end='')
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'scripts' / 'script.py'
    path.parent.mkdir()
    path.write_text(SCRIPT)
    path.with_name('beside_the_script.py').touch()
    return path


def python(*args, autoload: bool, status: int = 0, path: str = '') -> str:
    """Runs Python and returns what it printed.

    Args:
        args: Its command line; a single argument is code to run.
        autoload: Whether PyTorch may call this package.
        status: The exit status that is expected.
        path: Folder that comes first in the search for modules.
    """
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': str(int(autoload)), 'OMP_NUM_THREADS': '1'}
    if path:
        env['PYTHONPATH'] = f'{path}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    args = ('-c', *args) if len(args) == 1 else args
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def small_timm(tmp_path):
    """Folder with a timm that has a version and nothing else, of which imports take no time."""
    def create(version):
        (tmp_path / 'timm' / 'models').mkdir(parents=True)
        (tmp_path / 'timm' / '__init__.py').write_text('from . import version, models')
        (tmp_path / 'timm' / 'models' / '__init__.py').touch()
        (tmp_path / 'timm' / 'version.py').write_text(f'__version__ = "{version}"')
        return tmp_path
    return create


def test_the_package_is_light_and_its_names_are_lazy():
    python('''
import sys
before = set(sys.modules)
import convnn_timm
from convnn_timm import autoload
autoload.install()  # a second time, as PyTorch does
assert sys.meta_path.count(autoload._finder) == 1
heavy = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert heavy == {'convnn_timm'}, heavy
assert {'layers', 'models', 'ops', 'ConvNN2d', '__version__'} <= set(dir(convnn_timm))
assert not {'torch', 'timm', 'convnn_timm.layers'} & set(sys.modules)
''', autoload=False)
    with pytest.raises(AttributeError, match="module 'convnn_timm' has no attribute 'ConvNN3d'"):
        convnn_timm.ConvNN3d
    assert all(getattr(convnn_timm, name) is not None for name in convnn_timm.__all__)
    assert convnn_timm.__version__ == version('convnn-timm')


def test_scripts_and_their_workers_find_the_models_with_nothing_added(script):
    printed = python(script, 'fork', 'spawn', autoload=True)
    assert "['fork', 'spawn'] 7 classes\nfork True\nspawn True\n" in printed


def test_torchrun_runs_a_script_with_the_models(script):
    printed = python(
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
        '-m', 'convnn_timm', 'run', script, 'fork', autoload=False)
    assert printed.count("['fork'] 7 classes\n") == printed.count('fork True\n') == 2, printed


def test_without_autoload_an_import_after_timm_brings_the_models():
    python(f'''
import importlib, sys, timm
assert not timm.is_model('{MODEL}') and 'convnn_timm' not in sys.modules
importlib.import_module('convnn_timm')  # train.py --device-modules convnn_timm
assert timm.is_model('{MODEL}')
''', autoload=False)


@pytest.mark.parametrize('first', ['import convnn_timm', 'from convnn_timm.layers import ConvNN2d'])
def test_without_autoload_the_package_may_come_before_timm(first):
    python('-W', 'error::RuntimeWarning', '-c', f'''
{first}
import sys, timm
assert timm.is_model('{MODEL}')
assert sys.modules['convnn_timm.autoload']._finder not in sys.meta_path
assert 'exec_module' not in vars(timm.models.__loader__)
''', autoload=False)


def test_a_failure_breaks_neither_torch_nor_timm():
    printed = python(f'''
import sys
sys.modules['convnn_timm.models'] = None  # its import raises
import torch, timm
print(torch.ones(2).sum().item(), timm.is_model('resnet18'), timm.is_model('{MODEL}'))
''', autoload=True)
    assert '2.0 True False\n' in printed
    assert printed.count('RuntimeWarning') == 1
    assert 'convnn_timm could not register its models with timm (ModuleNotFoundError' in printed
    assert '`import convnn_timm.models` shows the full error' in printed


def test_who_asks_for_the_models_sees_the_error(small_timm, script):
    timm = small_timm('1.0.31')
    broken = 'import sys; sys.modules["convnn_timm.models"] = None\n'
    run = f'from convnn_timm.autoload import run_script; run_script({str(script)!r}, [])'
    for code in 'import timm, convnn_timm', run:
        printed = python(broken + code, autoload=False, path=timm, status=1)
        assert 'ModuleNotFoundError: import of convnn_timm.models halted' in printed
        assert 'RuntimeWarning' not in printed


def test_an_old_timm_is_named(small_timm):
    timm = small_timm('1.0.9')
    message = f"needs timm 1.0.31 or newer, found 1.0.9 in {timm / 'timm'}: pip install --upgrade 'timm>=1.0.31'"
    printed = python('import timm, convnn_timm', autoload=False, path=timm, status=1)
    assert f'ImportError: convnn_timm {message}' in printed
    printed = python('import convnn_timm, timm; print(timm.version.__version__)', autoload=False, path=timm)
    assert '1.0.9\n' in printed and 'RuntimeWarning' in printed and message in printed


def test_run_names_a_missing_script():
    printed = python('-m', 'convnn_timm', 'run', 'missing/train.py', '--epochs', '1', autoload=False, status=2)
    assert printed == 'convnn-timm: error: no such script: missing/train.py\n'
