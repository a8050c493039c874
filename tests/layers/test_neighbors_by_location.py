"""Neighbours by location: a convolution, dilated and grouped too."""
import itertools
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convnn_timm.layers import Branching2d, ConvNN1d, ConvNN2d, convnn
from convnn_timm.layers.base import map_to_tokens
from convnn_timm.ops import knn_index, neighbor_conv, reference
from layer_examples import LOC, example, image


# Loc is a convolution

@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('size', [(8, 8), (5, 9), (12, 7), (1, 1), (2, 30)])
def test_loc_is_conv2d_to_the_last_bit(size, kernel_size, stride):
    conv = nn.Conv2d(3, 4, kernel_size, stride=stride, padding=kernel_size // 2, dtype=torch.float64)
    layer = ConvNN2d(
        3, 4, K=kernel_size ** 2, stride=stride, padding=kernel_size // 2, dtype=torch.float64, **LOC)
    layer.load_state_dict({'weight': conv.weight.view_as(layer.weight), 'bias': conv.bias})
    x = image(2, 3, *size)
    x, x_conv = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, y_conv = layer(x), conv(x_conv)
    assert torch.equal(y, y_conv)
    grad = image(*y.shape, seed=1)
    y.backward(grad)
    y_conv.backward(grad)
    assert torch.equal(x.grad, x_conv.grad)
    assert torch.equal(layer.weight.grad.view_as(conv.weight), conv.weight.grad)


@pytest.mark.parametrize('padding', [1, 2, 3])
@pytest.mark.parametrize('size', [(8, 8), (5, 9), (12, 7)])
def test_loc_neighbors_are_the_window_that_the_convolution_uses(size, padding):
    """The way through indices, which `forward` leaves out for a window, gives the same."""
    layer = ConvNN2d(3, 4, K=9, padding=padding, dtype=torch.float64, **LOC)
    x = image(2, 3, *size)
    tokens = nn.functional.pad(x, (padding,) * 4).flatten(2).mT
    y = neighbor_conv(tokens, layer.neighbors(x), layer.weight.flatten(2), layer.bias)
    torch.testing.assert_close(y.mT.reshape(2, 4, *size), layer(x), rtol=1e-12, atol=1e-12)


def test_loc_is_conv1d():
    for k, stride in (1, 1), (3, 1), (5, 2), (7, 3):
        conv = nn.Conv1d(3, 4, k, stride=stride, padding=k // 2, dtype=torch.float64)
        layer = ConvNN1d(3, 4, K=k, stride=stride, padding=k // 2, dtype=torch.float64, **LOC)
        layer.load_state_dict(conv.state_dict())
        assert torch.equal(layer(image(2, 3, 17)), conv(image(2, 3, 17)))


def test_loc_is_coordconv_with_coordinates():
    conv = nn.Conv2d(5, 4, 3, dtype=torch.float64)
    layer = ConvNN2d(3, 4, aggregation_type='Loc_Col', dtype=torch.float64, **LOC)
    layer.load_state_dict({'weight': conv.weight.view_as(layer.weight), 'bias': conv.bias})
    x = nn.functional.pad(image(2, 3, 5, 9), (1, 1, 1, 1))
    y, x_axis = torch.meshgrid(torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 11), indexing='ij')
    x = torch.cat([x, torch.stack([x_axis, y]).double().expand(2, -1, -1, -1)], 1)
    assert torch.equal(layer(image(2, 3, 5, 9)), conv(x))


@pytest.mark.parametrize('K', [2, 6, 9, 20, 49])
@pytest.mark.parametrize('padding', [0, 1])
def test_loc_selects_the_nearest_positions_at_the_border_too(K, padding):
    layer = ConvNN2d(1, 1, K=K, stride=2, padding=padding, **LOC)
    if padding == 0:
        expected = reference.grid_neighbors((7, 10), K).view(7, 10, K)[::2, ::2]
    else:
        expected = reference.grid_neighbors((9, 12), K).view(9, 12, K)[1:-1:2, 1:-1:2]
    assert torch.equal(layer.neighbors(image(1, 1, 7, 10))[0], expected.reshape(-1, K))


@pytest.mark.parametrize('args', [
    dict(magnitude_type='cosine'), dict(sampling_type='spatial', num_samples=4),
    dict(sampling_type='random', num_samples=20)])
def test_loc_with_a_search_is_in_raster_order_and_the_same_for_all_images(args):
    layer = ConvNN2d(3, 4, **{**LOC, **args}).eval()
    index = layer.neighbors(image(2, 3, 8, 8))
    assert (index.diff(dim=-1) > 0).all() and torch.equal(index[0], index[1])


@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('dilation', [1, 2, 3])
@pytest.mark.parametrize('groups, out_channels', [(1, 6), (2, 6), (4, 8)])
@pytest.mark.parametrize('kernel_size, size, more', [(3, (12, 9), 0), (3, (7, 14), 2), (5, (9, 5), 0), (3, (1, 2), 0)])
def test_loc_is_dilated_and_grouped_conv2d(kernel_size, size, more, groups, out_channels, dilation, stride):
    padding = dilation * (kernel_size // 2) + more
    options = dict(stride=stride, dilation=dilation, groups=groups, dtype=torch.float64)
    conv = nn.Conv2d(4, out_channels, kernel_size, padding=padding - more, **options)
    layer = ConvNN2d(4, out_channels, K=kernel_size ** 2, padding=padding, **LOC, **options)
    layer.load_state_dict({'weight': conv.weight.view_as(layer.weight), 'bias': conv.bias})
    x, x_conv = (image(2, 4, *size).requires_grad_() for _ in range(2))
    y, y_conv = layer(x), conv(x_conv)
    assert torch.equal(y, y_conv)
    grad = image(*y.shape, seed=1)
    y.backward(grad)
    y_conv.backward(grad)
    assert torch.equal(x.grad, x_conv.grad)
    assert torch.equal(layer.weight.grad.view_as(conv.weight), conv.weight.grad)
    # The way through indices, which `forward` leaves out for a window, gives the same.
    tokens = nn.functional.pad(x, (padding,) * 4).flatten(2).mT
    y = neighbor_conv(tokens, layer.neighbors(x), layer.weight.flatten(2), layer.bias, groups=groups)
    torch.testing.assert_close(y.mT.reshape(y_conv.shape), y_conv, rtol=1e-12, atol=1e-12)


def test_loc_is_dilated_and_grouped_conv1d():
    for k, stride, dilation, groups in (1, 1, 3, 2), (3, 1, 2, 4), (5, 2, 2, 1), (7, 3, 4, 2):
        options = dict(stride=stride, padding=dilation * (k // 2), dilation=dilation, groups=groups)
        conv = nn.Conv1d(4, 8, k, **options, dtype=torch.float64)
        layer = ConvNN1d(4, 8, K=k, **LOC, **options, dtype=torch.float64)
        layer.load_state_dict(conv.state_dict())
        assert torch.equal(layer(image(2, 4, 17)), conv(image(2, 4, 17)))


@pytest.fixture
def searches(monkeypatch):
    """The searches so far, one call each; what was found before is forgotten."""
    mock = Mock(wraps=knn_index)
    monkeypatch.setattr(convnn, 'knn_index', mock)
    convnn._remembered.cache_clear()
    return lambda: mock.call_count


@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d])
@pytest.mark.parametrize('args', [
    dict(), dict(stride=2), dict(K=4, magnitude_type='euclidean'), dict(sampling_type='spatial', num_samples=9),
    dict(sampling_type='random', num_samples=20)])
def test_loc_searches_once_for_a_size(layer_type, args, searches):
    def new():
        torch.manual_seed(0)
        return layer_type(3, 4, similarity_type='Loc', dtype=torch.float64, **args).eval()

    def check(layer, size):
        x = image(2, 3, *(size,) * layer.axes)
        y = neighbor_conv(
            map_to_tokens(layer.pad(x)), layer._find_by_location(x.shape[2:], x.device).expand(2, -1, -1),
            layer.weight.flatten(2), layer.bias)
        before = searches()
        assert torch.equal(layer(x).flatten(2).mT, y)
        return searches() - before

    by_search = 0 if 'magnitude_type' in args else 1  # with distances never
    layer = new()
    assert [check(layer, size) for size in (30, 30, 24, 30)] == [by_search, 0, by_search, 0]
    assert check(new(), 30) == 0  # nor do other layers of this form
    layer.stride = 3
    assert check(layer, 30) == by_search
    layer.train()
    assert (searches_of(layer, searches) > 0) == (args.get('sampling_type') == 'random')  # drawn anew


def searches_of(layer, searches):
    before = searches()
    layer(image(2, 3, *(30,) * layer.axes))
    return searches() - before


def test_a_compiled_network_does_not_search_by_location(searches):
    layer = ConvNN2d(3, 4, similarity_type='Loc', sampling_type='spatial', num_samples=6)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = image(2, 3, 8, 8, dtype=torch.float32)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), layer(x))
    assert searches() == 1
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert searches() == 1


def test_what_is_remembered_cannot_be_written_into(searches):
    layer = ConvNN2d(3, 4, similarity_type='Loc')
    x = image(1, 3, 8, 8, dtype=torch.float32)
    index = layer.neighbors(x)
    before = index.clone()
    index.zero_()
    assert torch.equal(layer.neighbors(x), before)


def test_loc_trains_after_an_inference(searches):
    layer = ConvNN2d(3, 4, similarity_type='Loc')
    x = image(2, 3, 8, 8, dtype=torch.float32)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = layer(torch.empty(2, 3, 9, 9))
    assert fake.shape == (2, 4, 9, 9) and torch.isfinite(layer(image(2, 3, 9, 9, dtype=torch.float32))).all()


# Dilation

def nearest_in_steps(layer, x):
    """The definition: the layer without dilation, on every dilation-th position of the padded map."""
    d, p = layer.dilation, layer.padding
    twin = type(layer)(layer.in_channels, 1, K=layer.K, padding=0, **LOC)
    position = torch.arange(nn.functional.pad(x, (p,) * (2 * layer.axes))[0, 0].numel())
    position = position.view([n + 2 * p for n in x.shape[2:]])
    index = position.new_zeros(*position.shape, layer.K)
    for phase in itertools.product(range(d), repeat=layer.axes):
        grid = position[tuple(slice(first, None, d) for first in phase)]
        if grid.numel() >= layer.K:
            found = twin.neighbors(x.new_zeros(1, layer.in_channels, *grid.shape))[0]
            index.view(-1, layer.K)[grid.flatten()] = grid.flatten()[found]
    inner = tuple(slice(p, p + n, layer.stride) for n in x.shape[2:])
    return index[inner].reshape(-1, layer.K).expand(len(x), -1, -1)


@pytest.mark.parametrize('layer_type, size', [
    (ConvNN2d, (8, 8)), (ConvNN2d, (5, 9)), (ConvNN2d, (12, 7)), (ConvNN2d, (3, 10)), (ConvNN1d, (17,))])
@pytest.mark.parametrize('dilation, stride, padding', [
    (2, 1, 0), (2, 1, 1), (2, 1, 3), (2, 2, 1), (2, 3, 2), (3, 1, 2), (3, 2, 4), (4, 6, 4)])
@pytest.mark.parametrize('K', [4, 5])
def test_dilated_loc_chooses_the_nearest_in_steps_of_the_dilation(layer_type, size, dilation, stride, padding, K):
    layer = layer_type(3, 4, K=K, padding=padding, dilation=dilation, stride=stride, dtype=torch.float64, **LOC)
    x = image(2, 3, *size)
    index = layer.neighbors(x)
    assert torch.equal(index, nearest_in_steps(layer, x))
    tokens = nn.functional.pad(x, (padding,) * (2 * len(size))).flatten(2).mT
    y = reference.neighbor_conv(tokens, index, layer.weight.flatten(2), layer.bias)
    torch.testing.assert_close(layer(x).flatten(2), y.mT, rtol=1e-12, atol=1e-12)


def test_dilation_needs_enough_tokens_only_where_outputs_are():
    """Of 5 x 5, the even rows and columns cross in 9 tokens, the odd ones in 4."""
    x, options = image(1, 3, 5, 5, dtype=torch.float32), dict(K=9, dilation=2, padding=0, **LOC)
    assert ConvNN2d(3, 4, stride=2, **options)(x).shape == (1, 4, 3, 3)
    with pytest.raises(ValueError, match=(
            'K=9 neighbours need as many tokens in steps of dilation=2, but a map of 5 x 5 with padding=0 has 6: use '
            'a larger input or padding, or a smaller K or dilation')):
        ConvNN2d(3, 4, **options)(x)


@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d])
@pytest.mark.parametrize('args', [
    dict(), dict(similarity_type='Loc_Col'), dict(sampling_type='random', num_samples=12, magnitude_type='euclidean')])
def test_neighbours_by_feature_ignore_dilation(layer_type, args):
    plain, dilated = (layer_type(3, 4, K=4, dilation=dilation, **args).eval() for dilation in (1, 8))
    x = example(plain).float()
    assert torch.equal(dilated.neighbors(x), plain.neighbors(x))


@pytest.mark.parametrize('args', [
    dict(magnitude_type='cosine'), dict(sampling_type='random', num_samples=12),
    dict(sampling_type='spatial', num_samples=8)])
def test_loc_without_a_window_refuses_dilation(args):
    for layer_type in ConvNN1d, ConvNN2d, Branching2d:
        with pytest.raises(ValueError, match="dilation=2 needs the window that similarity_type='Loc' has with "):
            layer_type(3, 4, dilation=2, **{**LOC, **args})


# Errors

def test_what_is_remembered_is_not_made_in_a_cuda_graph():
    assert torch.Tag.cudagraph_unsafe in torch.ops.convnn_timm.neighbors_by_location.default.tags
