"""Which path an op takes, the reasons why not, and what a user sees who asks for one that cannot run."""
import importlib.util
import subprocess
import sys

import pytest
import torch

from convnn_timm.ops import paths
from convnn_timm.ops.paths import available_paths, can_run_triton_knn, can_run_triton_neighbor_conv, choose, use_path


@pytest.fixture(autouse=True)
def default_choice(monkeypatch):
    monkeypatch.setattr(paths, '_wanted', None)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)


@pytest.fixture
def cpu_machine(monkeypatch):
    monkeypatch.setattr(paths, '_triton_installed', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.fixture
def runs_triton(monkeypatch):
    monkeypatch.setattr(paths, '_triton_installed', lambda: True)
    monkeypatch.setenv('TRITON_INTERPRET', '1')


def test_the_default_is_torch_even_where_triton_runs(runs_triton):
    assert choose('knn', torch.ones(1, 4, 2), 2) == 'torch'


def test_use_path_lasts_or_ends_with_its_block(runs_triton):
    args = 'knn', torch.ones(1, 4, 2), 2
    use_path('triton')
    assert choose(*args) == 'triton'
    with pytest.raises(KeyError):
        with use_path('torch'):
            assert choose(*args) == 'torch'
            with use_path(None):
                assert choose(*args) == 'torch'
            raise KeyError
    assert choose(*args) == 'triton'


def test_use_path_refuses_what_does_not_exist_or_cannot_run(cpu_machine):
    with pytest.raises(ValueError, match="unknown path 'cuda'.*valid are torch, triton"):
        use_path('cuda')
    with pytest.raises(RuntimeError, match="'triton' cannot run here: no CUDA device"):
        use_path('triton')
    assert choose('knn', torch.ones(1, 4, 2), 2) == 'torch'


def test_a_forced_path_that_cannot_run_says_why_and_what_to_do(runs_triton):
    with use_path('triton'), pytest.raises(RuntimeError, match=r'knn: .*K = 80 > 64.*use_path\(None\)'):
        choose('knn', torch.ones(1, 99, 2), 80)


def test_a_forced_path_leaves_float64_ranking_to_torch(runs_triton):
    with use_path('triton'):
        assert choose('knn', torch.ones(1, 9, 2).double(), 2) == 'torch'


@pytest.mark.parametrize('dtype, k, reason', [
    (torch.float32, 64, None),
    (torch.float32, 65, 'K = 65 > 64'),
    (torch.float64, 9, 'tokens are float64'),
    (torch.bfloat16, 9, 'tokens are bfloat16'),
])
def test_reasons_of_knn(runs_triton, dtype, k, reason):
    found = can_run_triton_knn(torch.ones(1, 99, 2, dtype=dtype), k)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize('dtype, weight, groups, reason', [
    (torch.float32, torch.ones(6, 4, 3), 1, None),
    (torch.bfloat16, torch.ones(4, 1, 3, dtype=torch.bfloat16), 4, None),
    (torch.float64, torch.ones(6, 4, 3), 1, 'tokens are float64'),
    (torch.float16, torch.ones(6, 4, 3), 1, 'tokens are float16 but the weight is float32'),
    (torch.float32, torch.ones(4, 2, 3), 2, 'groups = 2'),
    (torch.float32, torch.ones(8, 1, 3), 4, 'groups = 4'),  # two outputs per channel
])
def test_reasons_of_neighbor_conv(runs_triton, dtype, weight, groups, reason):
    found = can_run_triton_neighbor_conv(torch.ones(1, 9, 4, dtype=dtype), weight, groups)
    assert found is None if reason is None else reason in found


def test_reasons_of_the_machine(monkeypatch, cpu_machine):
    def reason():
        return can_run_triton_knn(torch.ones(1, 3, 2), 2)

    assert reason() == 'no CUDA device'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert reason() == 'the tensors are on cpu, not on a CUDA device'
    assert 'on meta, not' in can_run_triton_knn(torch.ones(1, 3, 2, device='meta'), 2)
    monkeypatch.setattr(torch.version, 'hip', None)
    for capability, too_old in ((7, 5), True), ((8, 0), False):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        assert ('older than compute capability 8.0' in str(paths._no_triton())) == too_old
    monkeypatch.setattr(paths, '_triton_installed', lambda: False)
    assert reason() == 'triton is not installed'


def test_available_paths_gives_every_reason(cpu_machine):
    rows = available_paths()
    assert [row[:3] for row in rows] == [
        ('knn', 'torch', True), ('knn', 'triton', False),
        ('neighbor_conv', 'torch', True), ('neighbor_conv', 'triton', False)]
    assert rows[1].reason == 'no CUDA device'


@pytest.mark.parametrize('faster', [False, True])
def test_available_paths_says_what_multiplies_on_a_cpu(monkeypatch, faster):
    monkeypatch.setattr(paths, 'convolutions_are_faster', lambda: faster)
    assert [('convolutions' in row.reason) for row in available_paths() if row.path == 'torch'] == [faster, faster]


def test_available_paths_says_how_to_turn_triton_on(runs_triton):
    assert available_paths()[1].usable and 'off unless CONVNN_TIMM_OPS=triton' in available_paths()[1].reason
    with use_path('triton'):
        assert available_paths()[1].reason.startswith('chosen, ')


def test_the_environment_variable_sets_the_first_choice(monkeypatch, cpu_machine):
    def fresh(value):
        monkeypatch.setenv('CONVNN_TIMM_OPS', value)
        spec = importlib.util.spec_from_file_location('convnn_timm.ops.fresh_paths', paths.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.choose

    args = 'knn', torch.ones(1, 4, 2), 2
    assert fresh('')(*args) == fresh('torch')(*args) == 'torch'
    with pytest.raises(RuntimeError, match='no CUDA device'):
        fresh('triton')(*args)
    with pytest.raises(ValueError, match="unknown path 'tritno'.*CONVNN_TIMM_OPS"):
        fresh('tritno')(*args)


def test_everything_but_the_kernels_works_without_triton():
    code = """
import sys
sys.modules['triton'] = None  # what `import triton` meets where it is not installed
import torch
from convnn_timm.ops import available_paths, knn
assert 'convnn_timm.ops.triton' not in sys.modules
print(knn(torch.ones(1, 4, 2), torch.ones(1, 4, 2), 2)[0].shape, available_paths()[1].reason)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'torch.Size([1, 4, 2]) triton is not installed', done.stderr
