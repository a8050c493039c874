"""The benchmark: its peer computes what the layer computes, memory is counted, wrong neighbours stop it."""
import csv

import pytest
import torch

from convnn_timm.layers import ConvNN2d
from convnn_timm.ops import knn_index
from convnn_timm.ops._common import CHUNK_BYTES

CPU = torch.device('cpu')
MIB = 2 ** 20


@pytest.fixture(scope='module')
def benchmark(load_script):
    return load_script('benchmark')


@pytest.mark.parametrize('padding', [0, 1])
def test_the_original_computes_what_the_layer_computes(benchmark, padding):
    original = benchmark.OriginalConvNN2d(3, 5, K=4, padding=padding).double()
    layer = ConvNN2d(3, 5, K=4, padding=padding).double()
    layer.load_state_dict({'weight': original.conv.weight.unsqueeze(-1), 'bias': original.conv.bias})
    x = torch.rand(2, 3, 5, 6, dtype=torch.double, requires_grad=True)
    y, z = original(x), layer(x)
    torch.testing.assert_close(y, z)
    grad = torch.randn_like(y)
    theirs = torch.autograd.grad(y, [x, *original.parameters()], grad)
    ours = torch.autograd.grad(z, [x, *layer.parameters()], grad)
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a.flatten(), b.flatten())
    assert torch.equal(original.neighbors(x), layer.neighbors(x))


def test_wrong_neighbours_stop_the_benchmark(benchmark):
    original, layer, x = benchmark.OriginalConvNN2d(8, 8), ConvNN2d(8, 8), torch.rand(2, 8, 6, 6)
    assert benchmark.compare_neighbors(original, layer, x)['equal positions'] == '100.000%'
    index = layer.neighbors(x)
    index[1, 7, 3] = index[1, 7, 8]
    layer.neighbors = lambda x: index
    with pytest.raises(RuntimeError, match=r'other neighbours than the original.*98.61% of the positions agree'):
        benchmark.compare_neighbors(original, layer, x)


def test_neighbours_may_differ_by_rounding(benchmark):
    original, layer, x = benchmark.OriginalConvNN2d(8, 8), ConvNN2d(8, 8), torch.rand(1, 8, 6, 6)
    x[..., 0, 1] = x[..., 0, 0] * 1.5  # equally similar to every other token
    index = layer.neighbors(x)
    a, b = 9, 10  # these two tokens in the padded map
    swapped = torch.where(index == a, b, torch.where(index == b, a, index))
    swapped[0, :2] = index[0, :2]
    assert not torch.equal(swapped, index)
    layer.neighbors = lambda x: swapped
    row = benchmark.compare_neighbors(original, layer, x)
    assert row['equal positions'] != '100.000%' and row['similarity differs by'] < 1e-6


def test_contenders_take_turns(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, 'SAMPLE_SECONDS', 0)
    order = []
    steps = {name: lambda name=name: order.append(name) for name in 'abc'}
    times = benchmark.interleaved(steps, 4, CPU)
    assert ''.join(order) == 'abc' * 6  # warm-up, sizing, 4 repetitions
    assert {name: len(values) for name, values in times.items()} == {'a': 4, 'b': 4, 'c': 4}


def test_peak_memory_counts_what_lives_at_one_time(benchmark):
    kept = torch.ones(MIB // 4)

    def step():
        one = kept + 1
        two = one * 2
        del one
        return two + 1  # two live here, three were made

    assert benchmark.peak_memory(step, CPU) == pytest.approx(2 * MIB, rel=1e-3)


def test_peak_memory_of_a_backward_pass(benchmark):
    x = torch.ones(MIB // 4, requires_grad=True)
    step = benchmark.layer_step(torch.nn.ReLU(), x, True, lambda: torch.autocast('cpu', enabled=False))
    assert benchmark.peak_memory(step, CPU) == pytest.approx(3 * MIB, rel=1e-3)  # output, its gradient, the input's
    assert x.grad is None


def layer_peak(benchmark, layer, side):
    x = torch.rand(1, layer.conv.in_channels if hasattr(layer, 'conv') else layer.in_channels, side, side)
    step = benchmark.layer_step(layer, x.requires_grad_(), True, lambda: torch.autocast('cpu', enabled=False))
    return benchmark.peak_memory(step, CPU)


def test_a_search_keeps_no_wider_copy_of_the_tokens(benchmark):
    x = torch.randn(128, 1024, 64, dtype=torch.bfloat16)
    few = x[:, :32].contiguous()
    found = x.shape[0] * x.shape[1] * 4 * (8 + 4)  # indices and scores
    assert benchmark.peak_memory(lambda: knn_index(x, few, 4), CPU) - found < 2 * CHUNK_BYTES < 2 * x.nbytes


def test_a_layers_memory_grows_with_tokens_the_originals_with_their_square(benchmark):
    """Forward and backward, 9 neighbours among all tokens. The chunks' budget makes the layer's growth less yet."""
    layer, original = ConvNN2d(4, 4), benchmark.OriginalConvNN2d(4, 4)
    small, large = (layer_peak(benchmark, layer, side) for side in (32, 64))
    assert large < 4 * small
    assert large < 66 ** 4 * 4 / 3  # no token by token matrix
    small, large = (layer_peak(benchmark, original, side) for side in (32, 64))
    assert large > 12 * small


def test_backward_keeps_no_gathered_tokens(benchmark):
    """64 channels, where the original keeps 9 times the input and more."""
    layer, original = ConvNN2d(64, 64, sampling_type='random', num_samples=64), benchmark.OriginalConvNN2d(64, 64)
    assert layer_peak(benchmark, layer, 32) < layer_peak(benchmark, original, 32) / 6


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('scored', [False, True])
def test_the_gradients_of_gathered_tokens_stay_within_the_budget(benchmark, dtype, scored):
    x, grad, weight = (torch.rand(shape, dtype=dtype) for shape in ((64, 256, 64), (64, 256, 64), (64, 64, 9)))
    index = torch.randint(256, (64, 256, 9))
    score = torch.rand(64, 256, 9, dtype=dtype) if scored else None

    def step():
        torch.ops.convnn_timm.neighbor_conv_backward(grad, x, index, weight, score, 1, True, True)

    float32 = 4 // dtype.itemsize * x.nbytes + (x.nbytes if dtype != torch.float32 else 0)  # summed in it
    assert benchmark.peak_memory(step, CPU) - float32 < 2 * CHUNK_BYTES


def test_a_batch_of_few_outputs_stays_within_the_budget(benchmark):
    """Two outputs, whose places take more than themselves: besides the gradients, two chunks at most."""
    x, grad, weight = torch.rand(256, 256, 8), torch.rand(256, 256, 2), torch.rand(2, 8, 8)
    index = torch.randint(256, (256, 256, 8))

    def step():
        torch.ops.convnn_timm.neighbor_conv_backward(grad, x, index, weight, None, 1, True, True)

    assert benchmark.peak_memory(step, CPU) - x.nbytes - weight.nbytes < 2 * CHUNK_BYTES


@pytest.mark.slow
def test_a_layer_on_a_large_map_stays_within_two_gigabytes(benchmark):
    assert layer_peak(benchmark, ConvNN2d(64, 64), 224) < 2 * 10 ** 9


def test_a_model_step_leaves_the_weights(benchmark):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    before = model[1].weight.clone()
    step = benchmark.model_step(
        model, torch.randn(4, 3, 2, 2), torch.arange(4), lambda: torch.autocast('cpu', enabled=False))
    step()
    assert torch.equal(model[1].weight, before) and model[1].weight.grad is None


@pytest.mark.parametrize('start, end, busy', [(0.3, 2.1, False), (1.5, 2.0, True), (0.1, 3.9, True)])
def test_a_busy_machine_is_reported(benchmark, start, end, busy):
    warning = benchmark.load_warning(start, end, cores=2, threads=2)
    assert ('Do not trust the timings' in warning) == busy and bool(warning) == busy


@pytest.mark.parametrize('flags, message', [
    (['--repetitions', '1'], '--repetitions must be at least 2'),
    pytest.param(['--device', 'cuda'], 'torch finds no GPU', marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason='there is a GPU')),
])
def test_wrong_flags(benchmark, capsys, flags, message):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err


def test_the_cpu_may_have_a_number(benchmark):
    assert benchmark.parse(['--device', 'cpu:0']).device == torch.device('cpu:0')


def test_a_run(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'RESULTS', tmp_path / 'benchmarks')
    monkeypatch.setattr(benchmark, 'LAYERS', [(4, 4, 4)] * 6)
    monkeypatch.setattr(benchmark, 'SAMPLE_SECONDS', 0)
    narrow = {  # where bfloat16 is emulated, the whole network is slow
        name: (layer, {**kwargs, 'channels': (16, 16, 16, 16)})
        for name, (layer, kwargs) in benchmark.MODELS['resnet18'].items()}
    monkeypatch.setitem(benchmark.MODELS, 'resnet18', narrow)
    benchmark.main(['--quick', '--large', '--dtype', 'bfloat16', '--channels-last', '--output', 'here'])
    printed = capsys.readouterr().out
    assert (tmp_path / 'benchmarks' / 'here.md').read_text() + '\n' == printed
    for fact in ('commit', 'uncommitted_changes', 'cpu', 'cores', 'threads', 'torch', 'load'):
        assert f'- {fact}: ' in printed
    assert '- command: python train_scripts/benchmark.py --quick --large --dtype bfloat16' in printed
    with (tmp_path / 'benchmarks' / 'here.csv').open() as file:
        rows = list(csv.DictReader(file))
    tables = {row['table'] for row in rows}
    assert tables == {
        'Neighbours', 'Layers, forward', 'Layers, forward and backward', 'Training steps', 'One image, forward',
        'Where the time of a training step goes', 'Large map, forward and backward'}
    layers = [row for row in rows if row['table'] == 'Layers, forward and backward']
    contenders = [row['contender'] for row in layers]
    assert contenders[:3] == ['original', 'conv2d', 'attention']
    ours = [name for name in contenders if name.startswith('convnn')]
    assert {name.split(', ')[0] for name in ours} == {'convnn all', 'convnn random 64', 'convnn spatial 8'}
    by_name = {row['contender']: row for row in layers[:contenders.index('original', 1)]}
    for row in by_name.values():
        for unit, column in (('ms', 'ms/image'), ('MiB', 'MiB')):
            for peer in ('original', 'conv2d'):
                ratio = float(row[column]) / float(by_name[peer][column])
                assert float(row[f'{unit} / {peer}']) == pytest.approx(ratio)
    for table in 'Training steps', 'One image, forward':
        steps = [row['contender'] for row in rows if row['table'] == table]
        assert steps == ['conv2d', 'hybrid, torch', 'hybrid random 64, torch', 'hybrid as published, torch']
    large = rows[-1]
    assert float(large['peak resident MiB']) >= float(large['resident MiB before']) > 0 and float(large['seconds']) > 0
