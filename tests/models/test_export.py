"""Networks leave Python: torch.export, torch.compile, torch.fx, and the ONNX exporter that traces."""
import io
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import create_feature_extractor
from torch.fx.experimental.optimization import fuse
from torchvision.models import feature_extraction

from convnn_timm import layers
from convnn_timm.inspect.onnx_export import TOLERANCE, sensitivity
from convnn_timm.layers import Branching1d, ConvNN1d, ConvNNAttention1d
from small_networks import photos, two_blocks

LAYERS = ('convnn', 'convnn_attn', 'convnn_branching')


@pytest.mark.parametrize('layer', LAYERS)
def test_torch_export_takes_any_batch(layer):
    model = two_blocks(layer)
    program = torch.export.export(model, (photos(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for n in 1, 2, 5:
        with torch.no_grad():
            assert torch.equal(program.module()(photos(n)), model(photos(n)))


class Graphs:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, backend):
        self.count = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, example_inputs):
        self.count += 1
        return self.backend(graph, example_inputs)


@pytest.mark.parametrize('layer, backend', [
    ('convnn_branching', 'aot_eager'),
    *(pytest.param(layer, 'aot_eager', marks=pytest.mark.slow) for layer in LAYERS if layer != 'convnn_branching'),
    *(pytest.param(layer, 'inductor', marks=pytest.mark.slow) for layer in LAYERS)])
def test_torch_compile_takes_any_batch_and_two_sizes_without_compiling_again(layer, backend):
    if backend == 'inductor' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        pytest.skip('torch.compile needs a C++ compiler')
    torch._dynamo.reset()
    model, graphs, agreed = two_blocks(layer), Graphs(backend), []
    compiled = torch.compile(model, fullgraph=True, backend=graphs)

    def check(n, size):
        x = photos(n, size)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            close = (compiled(x) - model(x)).abs().amax(1) <= TOLERANCE
        assert (close | (sensitivity(model, x) > TOLERANCE)).all()
        agreed.extend(close.tolist())

    check(2, 16)
    check(2, 24)
    compiled_graphs = graphs.count
    assert 0 < compiled_graphs <= 2
    for n in 3, 4, 7:
        check(n, 16)
        check(n, 24)
    assert graphs.count == compiled_graphs and sum(agreed) > len(agreed) / 2


def test_what_loc_keeps_from_other_calls_does_not_make_a_network_compile_again():
    torch._dynamo.reset()
    model, graphs = two_blocks('convnn', similarity_type='Loc'), Graphs('aot_eager')
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for size in 16, 24, 16, 24, 16:
        x = photos(2, size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert 0 < graphs.count <= 2


@pytest.mark.parametrize('layer', [*LAYERS, 'conv2d_new', 'convnn_branching_attn'])
def test_torch_fx_records_a_network_whose_layers_stay_modules(layer):
    options = dict(channels=(16, 16, 16, 16), sampling_type='spatial', num_samples=4, magnitude_type='euclidean')
    model = timm.create_model(f'resnet18_{layer}', zero_init_last=False, **options).double().train()
    graph, x = torch.fx.symbolic_trace(model), photos(4).double()
    outputs, gradients = [], []
    for module in model, graph:
        torch.manual_seed(0)
        outputs.append(module(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), list(model.parameters())))
    assert torch.equal(*outputs) and all(torch.equal(*pair) for pair in zip(*gradients))
    model.eval(), graph.eval()
    torch.testing.assert_close(fuse(graph)(x), model(x), rtol=1e-9, atol=1e-9)
    for extractor in create_feature_extractor, feature_extraction.create_feature_extractor:
        assert torch.equal(extractor(model, ['layer2'])(x)['layer2'], model.forward_intermediates(x)[1][2])


def test_torch_fx_records_layers_for_sequences():
    net, x = nn.Sequential(ConvNN1d(3, 8), ConvNNAttention1d(8, 8), Branching1d(8, 4)).eval(), torch.randn(2, 3, 20)
    for graph in torch.fx.symbolic_trace(net), create_feature_extractor(net, {'2': 'last'}):
        y = graph(x)
        assert torch.equal(y if isinstance(y, torch.Tensor) else y['last'], net(x))


# Layers of each kind, on maps or sequences of 4 channels.
CHAIN = [
    *((kind, options) for kind in ('ConvNN2d', 'ConvNNAttention2d', 'Branching1d', 'BranchingAttention2d')
      for options in ({}, dict(sampling_type='spatial', num_samples=4), dict(magnitude_type='euclidean'))),
    ('ConvNN2d', dict(similarity_type='Loc')), ('ConvNN2d', dict(aggregation_type='Loc_Col')),
    ('ConvNN2d', dict(similarity_type='Loc_Col', padding=0)),  # zeros around would be equally far but for rounding
    ('ConvNN2d', dict(dilation=2, padding=2)), ('ConvNN2d', dict(groups=2, stride=2)),
    ('Branching1d', dict(shuffle_pattern='BA', shuffle_scale=2)), ('CoordConv2d', dict(aggregation_type='Loc_Col')),
]


def chain(kind, options, length=2):
    """Layers of one kind in a row, and what makes batches for them."""
    layer = getattr(layers, kind)
    if kind != 'CoordConv2d':
        options = {'K': 4, **options}
    net = nn.Sequential(*[layer(4, 4, **options) for _ in range(length)]).eval()
    return net, lambda n: torch.randn(n, 4, *((8, 8) if kind.endswith('2d') else (16,)))


@pytest.mark.parametrize('kind, options, training', [
    *((*case, False) for case in CHAIN), ('ConvNN2d', {}, True), ('BranchingAttention2d', {}, True)])
def test_what_torch_export_saves_it_loads(kind, options, training):
    """With gradients on, as they are by default; any batch."""
    net, batch = chain(kind, options)
    net.train(training)
    program = torch.export.export(net, (batch(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in 1, 2, 5:
        x, results = batch(n), []
        for module in loaded, net:
            torch.manual_seed(0)
            results.append(module(x))
        assert torch.equal(*results)


@pytest.mark.parametrize('kind, options, length, exported_at', [
    *((*case, 2, 2) for case in CHAIN), ('ConvNN2d', {}, 3, 1), ('BranchingAttention2d', {}, 3, 1)])
def test_torchs_older_onnx_exporter_takes_any_batch(kind, options, length, exported_at, onnx_packages):
    """The one that traces, which timm's onnx_export.py uses unless it is told otherwise."""
    import onnxruntime

    net, batch = chain(kind, options, length)
    file = io.BytesIO()
    torch.onnx.export(
        net, (batch(exported_at),), file, dynamo=False, input_names=['x'], opset_version=17,
        dynamic_axes={'x': {0: 'n'}})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    for n in 1, 2, 3, 5:
        x = batch(n)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {'x': x.numpy()})[0]), net(x).detach())
