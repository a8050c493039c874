"""Which backend a call takes, the reasons why not, and what a user sees who asks for one that cannot run."""
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnn_timm.ops import available_paths, dispatch, knn, neighbor_conv, use_path
from convnn_timm.ops.dispatch import can_run_triton_knn, can_run_triton_neighbor_conv, choose

TOKENS, INDEX, WEIGHT = torch.ones(1, 4, 2), torch.zeros(1, 4, 3, dtype=torch.int64), torch.ones(5, 2, 3)


@pytest.fixture(autouse=True)
def default_choice(monkeypatch):
    monkeypatch.setattr(dispatch, '_wanted', None)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)


@pytest.fixture
def cpu_machine(monkeypatch):
    monkeypatch.setattr(dispatch, '_triton_installed', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


@pytest.fixture
def runs_triton(monkeypatch):
    monkeypatch.setattr(dispatch, '_triton_installed', lambda: True)
    monkeypatch.setenv('TRITON_INTERPRET', '1')


def default():
    return choose('knn', None, TOKENS)


def test_the_default_is_torch_even_where_triton_runs(runs_triton):
    assert default() == 'torch'


def test_use_path_lasts_or_ends_with_its_block(runs_triton):
    use_path('triton')
    assert default() == 'triton'
    with pytest.raises(KeyError):
        with use_path('torch'):
            assert default() == 'torch'
            with use_path(None):
                assert default() == 'torch'
            raise KeyError
    assert default() == 'triton'


def test_a_call_may_ask_for_a_backend_of_its_own(runs_triton):
    with use_path('triton'):
        assert choose('neighbor_conv', 'torch', TOKENS) == 'torch'
        assert neighbor_conv(TOKENS, INDEX, WEIGHT, backend='torch').shape == (1, 4, 5)
        assert knn(TOKENS, TOKENS, 2, backend='torch')[0].shape == (1, 4, 2)
    for call in (lambda: neighbor_conv(TOKENS, INDEX, WEIGHT, backend='cuda'), lambda: knn(
            TOKENS, TOKENS, 2, backend='cuda')):
        with pytest.raises(ValueError, match="unknown backend 'cuda', valid are torch, triton, onnx"):
            call()


def test_use_path_refuses_what_does_not_exist_or_cannot_run(cpu_machine):
    with pytest.raises(ValueError, match="unknown path 'cuda'.*valid are torch, triton"):
        use_path('cuda')
    with pytest.raises(RuntimeError, match="'triton' cannot run here: no CUDA device"):
        use_path('triton')
    assert default() == 'torch'


def test_a_backend_that_cannot_run_says_why_and_what_to_do(runs_triton):
    many = torch.ones(1, 99, 2)
    with use_path('triton'), pytest.raises(RuntimeError, match=r'knn: .*K = 80 > 64.*use_path\(None\)'):
        knn(many, many, 80)
    with pytest.raises(RuntimeError, match=r"knn: .*tokens are float64.*without backend='triton'"):
        knn(many.double(), many.double(), 2, backend='triton')


def test_use_path_leaves_float64_ranking_to_torch(runs_triton):
    with use_path('triton'):
        assert choose('knn', None, TOKENS.double()) == 'torch'
        assert choose('neighbor_conv', None, TOKENS.double()) == 'triton'


def test_backward_takes_the_backend_of_its_forward(runs_triton):
    """Also that of a graph which left the choice open."""
    taken = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            taken.extend(args[8:] if op is torch.ops.convnn_timm.neighbor_conv_backward.default else [])
            return op(*args, **kwargs or {})

    for run in neighbor_conv, torch.ops.convnn_timm.neighbor_conv:
        y = run(TOKENS, INDEX, WEIGHT.clone().requires_grad_(), None, None, 1)
        with use_path('triton'), Watch():
            y.sum().backward()
    assert taken == ['torch', 'torch']


def backends_in(graph):
    return [node.args[-1] for node in graph.nodes if 'convnn_timm' in str(node.target)]


def select_and_convolve(x, weight):
    index, score = knn(x, x, 3)
    return neighbor_conv(x, index, weight, None, score)


def test_an_exported_program_leaves_the_choice_to_where_it_runs(runs_triton):
    class Net(torch.nn.Module):
        def forward(self, x, weight):
            return select_and_convolve(x, weight)

    with use_path('triton'):  # where it is exported
        program = torch.export.export(Net(), (TOKENS, WEIGHT))
    assert not {'torch', 'triton'} & {*backends_in(program.graph)}
    torch.testing.assert_close(program.module()(TOKENS, WEIGHT), select_and_convolve(TOKENS, WEIGHT))


def test_a_compiled_function_follows_use_path(runs_triton):
    graphs = []

    def keep(module, inputs):
        graphs.append(backends_in(module.graph))
        return lambda *args: (torch.zeros(1, 4, 5),)

    compiled = torch.compile(select_and_convolve, backend=keep, fullgraph=True)
    for path in None, 'triton', 'torch':
        with use_path(path):
            compiled(TOKENS, WEIGHT)
    assert graphs == [['torch'] * 2, ['triton'] * 2, ['torch'] * 2]


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
        assert ('older than compute capability 8.0' in str(dispatch._no_triton())) == too_old
    monkeypatch.setattr(dispatch, '_triton_installed', lambda: False)
    assert reason() == 'triton is not installed'


def test_available_paths_gives_every_reason(cpu_machine):
    rows = available_paths()
    assert [row[:3] for row in rows] == [
        ('knn', 'torch', True), ('knn', 'triton', False),
        ('neighbor_conv', 'torch', True), ('neighbor_conv', 'triton', False)]
    assert rows[1].reason == 'no CUDA device'


@pytest.mark.parametrize('faster', [False, True])
def test_available_paths_says_what_multiplies_on_a_cpu(monkeypatch, faster):
    monkeypatch.setattr(dispatch, 'convolutions_are_faster', lambda: faster)
    assert [('convolutions' in row.reason) for row in available_paths() if row.path == 'torch'] == [faster, faster]


def test_available_paths_says_how_to_turn_triton_on(runs_triton):
    assert available_paths()[1].usable and 'off unless CONVNN_TIMM_OPS=triton' in available_paths()[1].reason
    with use_path('triton'):
        assert available_paths()[1].reason.startswith('chosen, ')


def test_the_environment_variable_sets_the_first_choice(monkeypatch, cpu_machine):
    def fresh(value):
        monkeypatch.setenv('CONVNN_TIMM_OPS', value)
        spec = importlib.util.spec_from_file_location('convnn_timm.ops.fresh_dispatch', dispatch.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    assert fresh('').choose('knn', None, TOKENS) == fresh('torch').choose('knn', None, TOKENS) == 'torch'
    with pytest.raises(RuntimeError, match='no CUDA device'):
        fresh('triton').implementation('knn', 'auto', TOKENS, 2)
    with pytest.raises(ValueError, match="unknown path 'tritno'.*CONVNN_TIMM_OPS"):
        fresh('tritno').choose('knn', None, TOKENS)


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
