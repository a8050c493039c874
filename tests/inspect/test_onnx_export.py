"""Networks leave Python: torch.export, torch.compile, torch.fx, ONNX, on photographs that scikit-learn ships.

Whole ResNets take minutes to export, so by default these are of two blocks; `-m slow` runs the whole ones.
"""
import io
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.models import create_feature_extractor
from timm.models.resnet import downsample_conv
from torch.fx.experimental.optimization import fuse
from torchvision.models import feature_extraction
from torchvision.transforms.functional import normalize, to_tensor

from convnn_timm import layers
from convnn_timm.layers import Branching1d, ConvNN1d, ConvNNAttention1d
from convnn_timm.models.convnn_resnet import ConvNNBasicBlock
from convnn_timm.inspect.onnx_export import TOLERANCE, compare_onnx, export_onnx, sensitivity

LAYERS = ('convnn', 'convnn_attn', 'convnn_branching')


def photos(n, size=16):
    """Parts of two photographs, (n, 3, size, size)."""
    parts = []
    for i in range(n):
        image = Image.fromarray(load_sample_image(('china.jpg', 'flower.jpg')[i % 2]))
        left, top = 70 * (i // 2), 25 * (i // 2)
        parts.append(to_tensor(image.crop((left, top, left + 160, top + 160)).resize((size, size))))
    return normalize(torch.stack(parts), 0.5, 0.25)


def two_blocks(layer, **layer_args):
    """A ResNet's stem, one block of each of two stages, and its head."""
    torch.manual_seed(0)
    options = dict(layer=layer, layer_args=dict(sampling_type='random', num_samples=32, **layer_args))
    return fit_norms(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        ConvNNBasicBlock(32, 32, **options),
        ConvNNBasicBlock(32, 32, stride=2, downsample=downsample_conv(32, 32, 1, stride=2), **options),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))


def whole(layer):
    torch.manual_seed(0)
    return fit_norms(timm.create_model(f'resnet18_{layer}', num_classes=5))


def fit_norms(model):
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all that they see
    with torch.no_grad():
        model.train()(photos(16))
    return model.eval()


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


def agreement(model, path, size, dynamic):
    export_onnx(model, path, (3, size, size), batch=3, dynamic_batch=dynamic)
    images = photos(16, size)
    difference, same = compare_onnx(model, path, images)
    assert same[difference <= TOLERANCE].all()
    return difference, images


@pytest.mark.parametrize('layer, dynamic', [
    ('convnn_branching', True), ('convnn_attn', False), pytest.param('convnn', True, marks=pytest.mark.slow)])
def test_onnx_agrees_on_photographs(layer, dynamic, tmp_path, onnx_packages):
    """To 1e-4: most, and all on which PyTorch agrees with itself after a change of a millionth."""
    model = two_blocks(layer)
    difference, images = agreement(model, tmp_path / 'model.onnx', 16, dynamic)
    stable = sensitivity(model, images) <= TOLERANCE
    assert stable.sum() >= 4 and difference[stable].max() <= TOLERANCE
    assert (difference <= TOLERANCE).sum() >= 8
    assert compare_onnx(two_blocks(layer, K=5), tmp_path / 'model.onnx', images)[0].min() > TOLERANCE


def test_many_images_are_compared_in_parts(tmp_path, onnx_packages):
    model, sizes = two_blocks('conv2d'), []
    export_onnx(model, tmp_path / 'model.onnx', (3, 16, 16), dynamic_batch=True)
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    difference, same = compare_onnx(model, tmp_path / 'model.onnx', torch.rand(40, 3, 16, 16))
    assert same.all() and difference.shape == (40,) and difference.max() < TOLERANCE and max(sizes) <= 16


def test_what_cannot_be_exported(tmp_path, onnx_packages):
    class Eigenvalues(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x)  # which ONNX has not

    message = 'torch cannot export this network with any number of images; try a fixed one: .*eig'
    with pytest.raises(ValueError, match=message):
        export_onnx(Eigenvalues().eval(), tmp_path / 'model.onnx', (3, 4, 4), dynamic_batch=True)
    with pytest.raises(ValueError, match="no images of 64x64: Input height .64. doesn't match model"):
        export_onnx(timm.create_model('vit_tiny_patch16_224'), tmp_path / 'model.onnx', (3, 64, 64))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('layer', LAYERS)
def test_onnx_of_a_whole_network_agrees_on_photographs(layer, tmp_path, onnx_packages):
    difference, _ = agreement(whole(layer), tmp_path / 'model.onnx', 32, True)
    assert difference.max() <= TOLERANCE
