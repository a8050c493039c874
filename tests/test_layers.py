"""What the layers promise: the convolution they contain, invariances, precision, tracing, errors."""
import copy
import inspect
import itertools
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convnn_timm.layers import (
    Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d, ConvNN1d, ConvNN2d, ConvNNAttention1d,
    ConvNNAttention2d, CoordConv2d, PixelShuffle1d, PixelUnshuffle1d, convnn, create_layer, layer_arguments)
from convnn_timm.layers.base import map_to_tokens
from convnn_timm.ops import knn_index, neighbor_conv, reference

LAYERS_1D = [ConvNN1d, ConvNNAttention1d, Branching1d, BranchingAttention1d]
LAYERS_2D = [ConvNN2d, ConvNNAttention2d, Branching2d, BranchingAttention2d]
LOC = dict(similarity_type='Loc', magnitude_type='euclidean')


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(layer, size=None):
    return image(2, layer.in_channels, *(size or (8,) * layer.axes))


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


# Groups

@pytest.mark.parametrize('args', [
    dict(), dict(K=1), dict(stride=2), dict(aggregation_type='Loc_Col'), dict(magnitude_type='euclidean'),
    dict(sampling_type='random', num_samples=9), dict(similarity_type='Loc'), dict(aggregation_type='Loc_Col', K=1),
    dict(aggregation_type='Loc_Col', K=5, stride=2, padding=2, sampling_type='random', num_samples=6),
    dict(aggregation_type='Loc_Col', K=5, padding=2, sampling_type='spatial', num_samples=5),
    dict(similarity_type='Loc', magnitude_type='euclidean', K=49, padding=3),
    dict(similarity_type='Loc_Col', bias=False), dict(shuffle_pattern='B', shuffle_scale=2)])
@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_groups_are_blocks_of_channels_with_common_neighbours(layer_type, groups, args):
    channels = 8 - layer_type.axes if 'aggregation_type' in args else 8  # 8 with coordinates
    layer = layer_type(channels, 8, groups=groups, dtype=torch.float64, **args).eval()
    x = example(layer, (60,) if layer.axes == 1 else (12, 12))
    padded = layer.aggregated(layer.pad(layer.check_and_unshuffle(x)[0]))
    index, blocks = layer.neighbors(x), layer.weight.flatten(2).chunk(groups)
    tokens = padded.flatten(2).mT.chunk(groups, dim=2)
    y = torch.cat([reference.neighbor_conv(t, index, w) for t, w in zip(tokens, blocks, strict=True)], dim=2).mT
    y = y if layer.bias is None else y + layer.bias.unsqueeze(1)
    torch.testing.assert_close(layer(x).flatten(2), y, rtol=1e-12, atol=1e-12)


def test_groups_start_like_a_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=4)
    torch.manual_seed(0)
    layer = ConvNN2d(8, 8, groups=4)
    assert torch.equal(layer.weight.view_as(conv.weight), conv.weight) and torch.equal(layer.bias, conv.bias)


def test_branches_share_groups_and_dilation():
    for layer_type in Branching1d, Branching2d:
        layer = layer_type(4, 8, K=4, kernel_size=5, dilation=3, groups=2, stride=2)
        assert (layer.branch1.dilation, layer.branch1.groups, layer.branch1.padding) == (3, 2, 1)
        assert (layer.branch2.dilation[0], layer.branch2.groups, layer.branch2.padding[0]) == (3, 2, 6)
        assert layer(example(layer, (15,) * layer.axes).float()).shape == (2, 8, *(8,) * layer.axes)
        assert layer_type(4, 8, groups=4, branch_ratio=0.).branch2.groups == 4


# Selection by features

def test_the_token_itself_is_first_and_dead_tokens_take_the_lowest_indices():
    layer = ConvNN2d(3, 4, K=4, padding=0)
    index = layer.neighbors(torch.zeros(1, 3, 3, 3))
    assert index[0].tolist() == [[0, 1, 2, 3]] + [[1, 0, 2, 3], [2, 0, 1, 3]] + [[i, 0, 1, 2] for i in range(3, 9)]
    layer = ConvNN2d(3, 4, K=4, padding=1)  # positions of the 5 x 5 padded map: 0, 1, 2 are padding
    assert layer.neighbors(torch.zeros(1, 3, 3, 3))[0].tolist() == [
        [own, 0, 1, 2] for own in (6, 7, 8, 11, 12, 13, 16, 17, 18)]


@pytest.mark.parametrize('magnitude_type', ['cosine', 'euclidean'])
@pytest.mark.parametrize('K, padding, size', [
    (9, 1, (6, 6)), (9, 1, (2, 2)), (25, 2, (3, 4)), (12, 3, (1, 5)), (9, 1, (4, 1))])
def test_leaving_out_padded_tokens_changes_nothing(size, padding, K, magnitude_type):
    """Only the first K - 1 padded tokens are candidates. The definition, over all of them, selects the same."""
    layer = ConvNN2d(3, 4, K=K, padding=padding, magnitude_type=magnitude_type)
    x = image(2, 3, *size).round()  # with ties
    if magnitude_type == 'cosine':
        x = x * nn.functional.one_hot(torch.arange(torch.Size(size).numel()) % 3, 3).T.reshape(3, *size)  # exact norms
    tokens = nn.functional.pad(x, (padding,) * 4).flatten(2).mT
    queries = layer.queries(size, x.device)
    index, _ = reference.knn(tokens[:, queries], tokens, K - 1, magnitude_type, queries)
    assert torch.equal(layer.neighbors(x)[..., 1:], index)


@pytest.mark.parametrize('layer_type', LAYERS_1D[:2] + LAYERS_2D[:2])
@pytest.mark.parametrize('magnitude_type', ['cosine', 'euclidean'])
def test_permuting_tokens_permutes_the_output(layer_type, magnitude_type):
    layer = layer_type(5, 6, K=4, padding=0, magnitude_type=magnitude_type, dtype=torch.float64).eval()
    x = example(layer)
    permutation = torch.randperm(x[0, 0].numel())

    def permuted(x):
        return x.flatten(2)[..., permutation].view_as(x)

    torch.testing.assert_close(layer(permuted(x)), permuted(layer(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_images_do_not_see_each_other(layer_type):
    layer = layer_type(5, 6, dtype=torch.float64).eval()
    x = example(layer)
    torch.testing.assert_close(layer(x.flip(0)), layer(x).flip(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1], rtol=1e-12, atol=1e-12)


def test_scale_of_an_image_does_not_matter_to_cosine_nor_to_loc_col():
    for args in dict(), dict(similarity_type='Loc_Col'), dict(similarity_type='Loc_Col', magnitude_type='euclidean'):
        layer = ConvNN2d(5, 6, **args)
        assert torch.equal(layer.neighbors(image(2, 5, 8, 8)), layer.neighbors(1000 * image(2, 5, 8, 8)))


@pytest.mark.parametrize('size', [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_loc_col_compares_features_of_unit_deviation_with_coordinates_of_one_pitch(size, metric):
    layer = ConvNN2d(3, 4, K=5, padding=0, similarity_type='Loc_Col', magnitude_type=metric, lambda_param=0.3)
    x, (H, W) = image(2, 3, *size), size
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    pitch = 2 / (max(H, W) - 1)
    location = torch.stack([(column - (W - 1) / 2) * pitch, (row - (H - 1) / 2) * pitch]).expand(2, -1, -1, -1)
    features = x / (x.std(dim=(1, 2, 3), keepdim=True) + 1e-6)
    compared = torch.cat([0.3 * features, 0.7 * location], dim=1).flatten(2).mT
    index = reference.knn(compared, compared, 4, metric, exclude=torch.arange(H * W))[0]
    assert torch.equal(layer.neighbors(x)[:, :, 1:], index)


def test_loc_col_of_an_image_of_one_colour_selects_by_location():
    args, x = dict(K=5, padding=0, magnitude_type='euclidean'), torch.zeros(1, 3, 9, 9)
    both, location = (ConvNN2d(3, 4, similarity_type=by, **args).neighbors(x) for by in ('Loc_Col', 'Loc'))
    inner = torch.arange(81).view(9, 9)[1:-1, 1:-1].flatten()
    assert torch.equal(both[:, inner].sort().values, location[:, inner].sort().values)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_loc_col_of_a_narrow_dtype_compares_in_float32(dtype):
    layer, x = ConvNN2d(3, 4, similarity_type='Loc_Col'), image(2, 3, 12, 12, dtype=dtype)
    assert torch.equal(layer.neighbors(x), layer.neighbors(x.float()))


@pytest.mark.parametrize('metric, own', [('cosine', 1.1), ('euclidean', 0.1)])
@pytest.mark.parametrize('K', [1, 4, 25])
def test_attention_is_its_definition(metric, own, K):
    layer = ConvNNAttention2d(3, 4, K=K, magnitude_type=metric, attention_dropout=0., dtype=torch.float64)
    layer.weight.data = image(*layer.weight.shape, seed=1)
    x = nn.functional.pad(image(2, 3, 3, 3), (1,) * 4)  # 25 tokens
    keys, queries, values = (w(x).flatten(2).mT for w in (layer.w_k, layer.w_q, layer.w_v))
    index, score = reference.knn(keys, queries, 24, metric, exclude=torch.arange(25))
    index = torch.cat([torch.arange(25).expand(2, 25).unsqueeze(-1), index], -1)[..., :K]
    score = torch.cat([torch.full((2, 25, 1), own, dtype=torch.float64), score], -1)[..., :K].softmax(-1)
    y = reference.neighbor_conv(values, index, layer.weight.flatten(2), layer.bias, score, groups=layer.token_channels)
    y = layer.w_o(layer.pointwise_conv(y.mT.unflatten(2, (5, 5))[..., 1:-1, 1:-1]))
    torch.testing.assert_close(layer(image(2, 3, 3, 3)), y, rtol=1e-10, atol=1e-10)


def test_attention_counts_a_position_once_where_there_are_too_few_others():
    layer = ConvNNAttention2d(3, 4, padding=0, sampling_type='random', num_samples=8, dtype=torch.float64).eval()
    x = image(1, 3, 4, 4)
    again = layer.neighbors(x)[0, :, -1] == torch.arange(16)  # the candidates themselves
    before = layer(x)
    layer.weight.data[:, :, -1] *= -3
    changed = (layer(x) != before).any(1).flatten()
    assert again.sum() == 8 and torch.equal(changed, ~again)


def test_lambda_runs_from_location_to_features():
    x = image(2, 5, 9, 9)

    def neighbors(**args):
        return ConvNN2d(5, 6, K=5, padding=0, magnitude_type='euclidean', **args).neighbors(x).sort(-1).values

    location = neighbors(similarity_type='Loc_Col', lambda_param=0.)
    inner = torch.arange(81).view(9, 9)[1:-1, 1:-1].flatten()  # a cross of 5 wherever it is unique
    assert torch.equal(location[:, inner], neighbors(similarity_type='Loc')[:, inner])
    assert torch.equal(neighbors(similarity_type='Loc_Col', lambda_param=1.), neighbors(similarity_type='Col'))


# Sampling

def test_spatial_sampling_takes_a_grid_of_the_interior():
    layer = ConvNN2d(3, 4, K=5, padding=1, sampling_type='spatial', num_samples=3, sample_padding=1)
    chosen = layer.neighbors(image(4, 3, 9, 9))[..., 1:].unique()
    assert set(chosen.tolist()) == {(y + 1) * 11 + x + 1 for y in (1, 4, 7) for x in (1, 4, 7)}


def test_spatial_sampling_takes_all_rows_of_a_map_with_fewer():
    layer = ConvNN2d(3, 4, K=4, padding=0, sampling_type='spatial', num_samples=7)
    chosen = layer.neighbors(image(4, 3, 5, 9))[..., 1:].unique()
    assert set(chosen.tolist()) == {9 * y + x for y in range(5) for x in (0, 1, 2, 4, 5, 6, 8)}


def test_spatial_sampling_of_a_sequence_takes_a_grid_of_the_padded_signal():
    layer = ConvNN1d(3, 4, K=4, padding=1, sampling_type='spatial', num_samples=6)
    assert set(layer.neighbors(image(4, 3, 16))[..., 1:].unique().tolist()) == {0, 3, 6, 10, 13, 17}


def test_random_sampling_draws_anew_in_training_and_never_in_evaluation():
    layer = ConvNN2d(3, 4, K=5, sampling_type='random', num_samples=12)
    x = image(3, 3, 10, 10)
    drawn = [layer.train().neighbors(x) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert all(len(index[..., 1:].unique()) <= 12 for index in drawn)  # one draw for the whole batch
    torch.manual_seed(1)
    first = layer.neighbors(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer.neighbors(x))
    assert torch.equal(layer.eval().neighbors(x), layer.neighbors(x))
    assert 6 < len(layer.neighbors(x)[..., 1:].unique()) <= 12


def test_equal_random_samples_are_taken_in_the_order_of_the_map():
    layer = ConvNN2d(3, 4, K=4, padding=0, sampling_type='random', num_samples=8)
    for mode in True, True, True, False:
        assert (layer.train(mode).neighbors(torch.zeros(1, 3, 6, 6))[0, :, 1:].diff(dim=1) > 0).all()


@pytest.mark.parametrize('args', [
    dict(sampling_type='random', num_samples=200), dict(sampling_type='spatial', num_samples=11)])
def test_samples_that_cover_the_map_are_all(args):
    x = image(2, 3, 10, 10)
    torch.testing.assert_close(ConvNN2d(3, 4, **args).neighbors(x), ConvNN2d(3, 4).neighbors(x))


# Shapes, gradients, precision

@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
@pytest.mark.parametrize('args', [
    dict(), dict(stride=2), dict(stride=3, K=4, padding=2), dict(K=1), dict(aggregation_type='Loc_Col'),
    dict(magnitude_type='euclidean'), dict(sampling_type='random', num_samples=9), dict(bias=False),
    dict(sampling_type='spatial', num_samples=8), dict(shuffle_pattern='BA', shuffle_scale=2, stride=2)])
def test_shapes_and_gradcheck(layer_type, args):
    layer = layer_type(2, 4, dtype=torch.float64, **args).eval()
    size = (12, 8) if layer.axes == 2 else (20,)
    x = image(1, 2, *size).requires_grad_()
    assert layer(x).shape == (1, 4, *(-(-n // args.get('stride', 1)) for n in size))
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d, Branching1d, Branching2d])
@pytest.mark.parametrize('args', [
    dict(dilation=2, groups=2), dict(dilation=3, stride=2, groups=2, padding=3, K=4, **LOC),
    dict(groups=2, sampling_type='random', num_samples=8),
    dict(sampling_type='spatial', num_samples=8, similarity_type='Loc_Col')])
def test_gradcheck_of_groups_and_dilation(layer_type, args):
    layer = layer_type(4, 4, dtype=torch.float64, **args).eval()
    x = image(1, 4, *((12, 8) if layer.axes == 2 else (20,))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize('pattern, channels, size', [('B', 4, 4), ('A', 4, 16), ('BA', 4, 8)])
def test_shuffle_patterns(pattern, channels, size):
    for layer in (ConvNN2d(3, 4, shuffle_pattern=pattern, shuffle_scale=2), CoordConv2d(
            3, 4, shuffle_pattern=pattern, shuffle_scale=2)):
        assert layer(image(1, 3, 8, 8, dtype=torch.float32)).shape == (1, channels, size, size)


def test_pixel_shuffle_1d_is_undone():
    x = image(2, 6, 12)
    assert PixelUnshuffle1d(3)(x).shape == (2, 18, 4)
    assert torch.equal(PixelShuffle1d(3)(PixelUnshuffle1d(3)(x)), x)
    for layer in PixelShuffle1d(3), PixelUnshuffle1d(3):
        assert torch.equal(layer(x[0]), layer(x)[0]) and torch.equal(torch.jit.script(layer)(x[0]), layer(x)[0])
        with pytest.raises(ValueError, match=r'expected an input \(B, C, T\) or \(C, T\), got \(12,\)'):
            layer(x[0, 0])
    with pytest.raises(ValueError, match='12 tokens are not divisible by the downscale factor 5'):
        PixelUnshuffle1d(5)(x)
    with pytest.raises(ValueError, match='6 channels are not divisible by the upscale factor 4'):
        PixelShuffle1d(4)(x)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_evaluation_is_deterministic_and_training_drops_attention(layer_type):
    attention = {'attention_dropout': 0.5} if 'Attention' in layer_type.__name__ else {}
    layer = layer_type(3, 4, sampling_type='random', num_samples=10, **attention)
    x = example(layer).float()
    assert torch.equal(layer.eval()(x), layer(x))
    if attention:
        layer = layer_type(3, 4, **attention).train()  # no sampling: only dropout can differ
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize('layer_type', [
    *[partial(ConvNN2d, similarity_type=similarity_type, **args)
      for similarity_type in ('Col', 'Loc', 'Loc_Col') for args in (dict(), dict(groups=4))],
    ConvNNAttention1d, partial(ConvNNAttention2d, aggregation_type='Loc_Col')])
def test_autocast_selects_the_neighbours_of_float32(layer_type):
    layer = layer_type(16, 8).eval()
    x = image(2, 16, *(12,) * layer.axes, dtype=torch.float32)
    expected = layer.neighbors(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(layer.neighbors(x), expected)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_autocast_leaves_float64(layer_type):
    layer = layer_type(3, 4, dtype=torch.float64).eval()
    x = example(layer)
    outside = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(layer(x), outside) and outside.dtype == torch.float64


@pytest.mark.parametrize('value', [torch.inf, torch.nan])
def test_what_is_not_finite_stays_with_those_that_select_it(value):
    layer = ConvNN2d(2, 3, padding=3, sampling_type='random', num_samples=20).eval()
    x = image(1, 2, 8, 8, dtype=torch.float32)
    x[0, :, 0, 0] = value
    index = layer.neighbors(x)[0]
    wrong = ~layer(x).isfinite().all(1).flatten()
    assert torch.equal(wrong, (index == 3 * 14 + 3).any(1)) and 0 < wrong.sum() < 64


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_narrow_dtypes_train(layer_type, dtype):
    layer = layer_type(3, 4, dtype=dtype)
    y = layer(example(layer).to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize('layer_type', LAYERS_2D)
def test_nan_gives_nan_and_no_index_error(layer_type):
    layer = layer_type(3, 4).eval()
    x = image(2, 3, 6, 6, dtype=torch.float32)
    x[0, :, 2, 2] = float('nan')
    y = layer(x)
    assert y[0, :, 2, 2].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize('layer_type', LAYERS_2D)
def test_channels_last_gives_the_same(layer_type):
    layer = layer_type(8, 8).eval()
    x = image(2, 8, 6, 6, dtype=torch.float32)
    y = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y)


# Life as a module

@pytest.mark.parametrize('layer_type', [
    *LAYERS_1D, *LAYERS_2D, partial(ConvNN2d, stride=3, sampling_type='random', num_samples=9),
    partial(Branching2d, dilation=2, branch_ratio=0.25), partial(ConvNN1d, padding=3, K=4, dilation=3, **LOC)])
def test_meta_deepcopy_pickle_and_state_dict(layer_type):
    meta = layer_type(3, 4, device='meta')
    x = example(meta).float()
    assert meta(x.to('meta')).shape == layer_type(3, 4)(x).shape == (2, 4, *(-(-8 // meta.stride),) * meta.axes)
    layer = layer_type(3, 4).eval()
    x = example(layer).float()
    y = layer(x)
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(twin(x), y)
    other = layer_type(3, 4).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert layer.__dict__.keys() == other.__dict__.keys()
    before = pickle.dumps(layer)
    layer(example(layer, (12,) * layer.axes).float())  # another size, and nothing is left behind
    assert pickle.dumps(layer) == before and torch.equal(layer(x), y)


@pytest.mark.parametrize('layer_type', [
    ConvNN1d, partial(ConvNN2d, magnitude_type='euclidean'), partial(BranchingAttention2d, attention_dropout=0.)])
def test_compiles_without_a_graph_break_and_not_for_every_size(layer_type):
    torch._dynamo.reset()
    layer = layer_type(3, 4)
    graphs = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    for i, n in enumerate((8, 11, 14, 12, 17)):
        inputs = [image(2 + i % 2, 3, *(n, 10)[:layer.axes], dtype=torch.float32).requires_grad_() for _ in range(2)]
        outputs = [f(x) for f, x in zip((compiled, layer), inputs)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(*[x.grad for x in inputs])
    assert graphs.frame_count <= 3


@pytest.mark.parametrize('layer_type', [ConvNN2d, ConvNNAttention2d])
@pytest.mark.parametrize('sampling_type, few, more', [('random', 16, 64), ('spatial', 4, 8)])
def test_fewer_candidates_cost_less(layer_type, sampling_type, few, more):
    def cost(**sampling):
        with FlopCounterMode(display=False) as counter:
            layer_type(8, 8, device='meta', **sampling)(torch.empty(1, 8, 16, 16, device='meta'))
        return counter.get_total_flops()

    some, others = (cost(sampling_type=sampling_type, num_samples=n) for n in (few, more))
    assert some < others < cost()


@pytest.mark.parametrize('layer_type', [
    ConvNN1d, Branching2d, ConvNNAttention2d, partial(ConvNN2d, K=4, dilation=2, **LOC)])
def test_exports(layer_type):
    layer = layer_type(3, 4).eval()
    x = example(layer).float()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize('layer_type', [
    ConvNN2d, partial(ConvNN2d, magnitude_type='euclidean'), partial(ConvNN2d, similarity_type='Loc_Col'),
    ConvNNAttention2d])
def test_exported_without_autocast_it_runs_with_it(layer_type):
    """And selects the same neighbours as if made with it: others would differ by the whole range of the outputs."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer_type(4, 4)).eval()
    x = image(2, 3, 8, 8, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = net(x)
    for exported in torch.export.export(net, (x,)).module(), torch.jit.trace(net, x), torch.jit.script(net):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = exported(x)
        assert y.dtype == torch.bfloat16
        assert (y - expected).abs().max() < 0.02
        assert (y.float() - net(x)).abs().median() < 0.02  # nearly all neighbours are the same


@pytest.mark.parametrize('dynamo', [False, True])
@pytest.mark.parametrize('layer_type, args', [
    (ConvNN1d, dict(magnitude_type='euclidean')), (ConvNN2d, dict(groups=3)),
    (ConvNN2d, dict(similarity_type='Loc')), (ConvNN2d, dict(dilation=2, **LOC)), (ConvNN2d, dict(dtype=torch.float16)),
    (BranchingAttention2d, dict(stride=2, sampling_type='random', num_samples=20))])
def test_onnx(layer_type, args, dynamo, tmp_path):
    """In standard operators, ties included: the input has dead tokens, and onnxruntime selects the same neighbours.

    So it does of tokens that are nearly dead, too short to have a direction.
    """
    onnxruntime = pytest.importorskip('onnxruntime', reason="needs onnxruntime: pip install 'convnn-timm[test]'")
    layer = layer_type(3, 6, K=5, **args).eval()
    x = example(layer, (9, 8)[:layer.axes]).float().relu()
    x[:, :, ::3] = 0
    x[:, :, 1::3] *= 1e-14
    x = x.to(args.get('dtype'))
    torch.onnx.export(layer, (x,), tmp_path / 'layer.onnx', dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'layer.onnx')
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    tolerance = dict(rtol=1e-2, atol=1e-2) if x.dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), **tolerance)


@pytest.mark.parametrize('layer_type, args', [
    *[(layer_type, dict(K=5, shuffle_pattern='BA', shuffle_scale=2)) for layer_type in LAYERS_2D + [CoordConv2d]],
    (ConvNN1d, dict(sampling_type='random', num_samples=12)), (BranchingAttention2d, dict(branch_ratio=0.)),
    (Branching2d, dict(branch_ratio=1., bias=False)), (ConvNNAttention2d, dict(aggregation_type='Loc_Col')),
    *[(layer_type, dict(dilation=2, groups=2)) for layer_type in (ConvNN1d, ConvNN2d, CoordConv2d)],
    (Branching2d, dict(dilation=2, stride=2, groups=2, branch_ratio=2 / 3))])
def test_scripts(layer_type, args, tmp_path):
    args = {name: value for name, value in args.items() if name != 'K' or layer_type is not CoordConv2d}
    layer = layer_type(4, 6, **args).eval()
    x = image(2, 4, *((20,) if layer_type is ConvNN1d else (12, 8)), dtype=torch.float32)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x))
    scripted.save(tmp_path / 'layer.pt')
    assert torch.equal(torch.jit.load(tmp_path / 'layer.pt')(x), layer(x))
    scripted(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_scripted_layers_train_and_evaluate():
    layer = ConvNNAttention2d(3, 4, attention_dropout=0.5).train()
    scripted, x = torch.jit.script(layer), image(2, 3, 6, 6, dtype=torch.float32)
    assert not torch.equal(scripted(x), scripted(x))
    assert torch.equal(scripted.eval()(x), layer.eval()(x))


def test_scripted_networks_run_in_threads():
    net = nn.Sequential(ConvNN2d(4, 4, K=3), nn.ReLU(), ConvNN2d(4, 4, K=3)).eval()
    scripted, x = torch.jit.script(net), image(2, 4, 6, 6, dtype=torch.float32)
    y = net(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: torch.equal(scripted(x), y), range(200)))


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Own(ConvNN2d):
        def __init__(self, channels):
            super().__init__(channels, np.int64(channels), K=5)

    layer, x = Own(4), image(2, 4, 6, 6, dtype=torch.float32)
    assert layer(x).shape == x.shape
    with pytest.raises(TypeError, match=r"Own cannot be scripted: .*the same names \(channels\)"):
        torch.jit.script(layer)
    layer = ConvNN2d(4, np.int64(6), K=5)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize('args', [
    dict(sampling_type='random', num_samples=12), dict(sampling_type='spatial', num_samples=3),
    dict(K=6, **LOC), dict()], ids=str)
def test_traces(args):
    layer = ConvNN2d(3, 4, **args).eval()
    x = image(2, 3, 8, 8, dtype=torch.float32)
    assert torch.equal(torch.jit.trace(layer, x)(x + 1), layer(x + 1))


# Modules are called as modules: hooks, adapters, parametrizations, offloading and sharding depend on it

def parts(layer):
    """The modules that have parameters of their own, by name; the layer itself may be one."""
    return {name: module for name, module in layer.named_modules() if list(module.parameters(recurse=False))}


class LowRank(nn.Module):
    """A convolution that stays as it is, and a term of low rank that is learned beside it."""

    def __init__(self, conv):
        super().__init__()
        kind = nn.Conv2d if isinstance(conv, nn.Conv2d) else nn.Conv1d
        self.conv = conv.requires_grad_(False)
        self.down = kind(conv.in_channels, 2, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = kind(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x.to(self.down.weight.dtype)))


class Reversed(nn.Module):
    """A parametrization: the weights of the outputs in reverse order."""

    def forward(self, weight):
        return weight.flip(0)


@pytest.mark.parametrize('layer_type', [*LAYERS_1D, *LAYERS_2D, CoordConv2d])
def test_hooks_fire_on_every_module_with_parameters(layer_type):
    layer, before, after = layer_type(3, 4, dtype=torch.float64), [], []
    for name, module in parts(layer).items():
        module.register_forward_pre_hook(lambda *args, name=name: before.append(name))
        module.register_forward_hook(lambda *args, name=name: after.append(name))
    layer(example(layer))
    assert sorted(before) == sorted(after) == sorted(parts(layer))


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_an_adapter_around_any_convolution_changes_the_output_and_learns(layer_type):
    for name, conv in parts(layer_type(3, 4)).items():
        if isinstance(conv, (nn.Conv1d, nn.Conv2d)):
            layer = layer_type(3, 4).eval()
            x = example(layer).float()
            y, adapter = layer(x), LowRank(layer.get_submodule(name))
            layer.set_submodule(name, adapter)
            assert not torch.allclose(layer(x), y), name
            layer(x).square().sum().backward()
            assert adapter.up.weight.grad.abs().sum() > 0 and adapter.down.weight.grad.abs().sum() > 0, name
            with torch.autocast('cpu', dtype=torch.bfloat16):
                assert layer(x).isfinite().all()


def test_lora_of_peft():
    peft = pytest.importorskip('peft')
    net, x = nn.Sequential(ConvNNAttention2d(3, 4)).eval(), image(2, 3, 6, 6, dtype=torch.float32)
    y = net(x)
    config = peft.LoraConfig(target_modules=['w_q', 'w_k', 'w_v', 'w_o'], r=2, init_lora_weights=False)
    net = peft.get_peft_model(net, config).eval()
    adapted = net(x)
    adapted.square().sum().backward()
    assert not torch.allclose(adapted, y)
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)
    torch.testing.assert_close(net.merge_and_unload()(x), adapted)


@pytest.mark.parametrize('layer_type', [ConvNNAttention1d, ConvNNAttention2d])
@pytest.mark.parametrize('replaced', [('w_q',), ('w_q', 'w_k')])
def test_what_replaces_a_projection_may_follow_autocast(layer_type, replaced):
    layer = layer_type(3, 4).eval()
    x = example(layer).float()
    y = layer(x)
    for name in replaced:
        module = (nn.Conv1d if layer.axes == 1 else nn.Conv2d)(3, 3, 1, bias=False)
        module.load_state_dict(layer.get_submodule(name).state_dict())
        layer.set_submodule(name, module)
    torch.testing.assert_close(layer(x), y)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D + [CoordConv2d])
def test_every_weight_can_be_parametrized(layer_type):
    for name in parts(layer_type(3, 4)):
        layer = layer_type(3, 4, dtype=torch.float64).eval()
        x, twin = example(layer), copy.deepcopy(layer)
        twin.get_submodule(name).weight.data = twin.get_submodule(name).weight.data.flip(0)
        nn.utils.parametrize.register_parametrization(layer.get_submodule(name), 'weight', Reversed())
        assert torch.equal(layer(x), twin(x)), name
        layer(x).square().sum().backward()
        assert layer.get_submodule(name).parametrizations.weight.original.grad is not None, name


def offload(layer):
    """Keep the parameters elsewhere, and put each module's in place only while it is called."""
    for module in parts(layer).values():
        real = dict(module.named_parameters(recurse=False))
        empty = {name: nn.Parameter(torch.empty_like(p, device='meta')) for name, p in real.items()}
        module.register_forward_pre_hook(lambda module, args, real=real: module._parameters.update(real))
        module.register_forward_hook(lambda module, args, y, empty=empty: module._parameters.update(empty))
        module._parameters.update(empty)


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D + [CoordConv2d])
@pytest.mark.parametrize('K', [1, 9])
@torch.no_grad()
def test_offloaded_it_gives_the_same_to_the_last_bit(layer_type, K):
    layer = (layer_type if layer_type is CoordConv2d else partial(layer_type, K=K))(3, 4).eval()
    x = example(layer).float()
    y, index = layer(x), None if layer_type is CoordConv2d else layer.neighbors(x)
    offload(layer)
    assert torch.equal(layer(x), y) and {p.device.type for p in layer.parameters()} == {'meta'}
    assert index is None or torch.equal(layer.neighbors(x), index)


@pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')
def test_sharded_part_by_part_it_gives_the_same():
    fully_shard = pytest.importorskip('torch.distributed.fsdp').fully_shard
    net = nn.Sequential(BranchingAttention2d(3, 4), Branching2d(4, 4), CoordConv2d(4, 4)).eval()
    x = image(2, 3, 8, 8, dtype=torch.float32)
    y = net(x)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
        for module in list(parts(net).values())[::-1]:
            fully_shard(module, mesh=mesh)
        sharded = fully_shard(net, mesh=mesh)(x)
        sharded.square().sum().backward()
        assert torch.equal(sharded, y) and all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def parametrize(layer):
    nn.utils.parametrize.register_parametrization(layer, 'weight', Reversed())


@pytest.mark.parametrize('change, message', [
    (lambda layer: layer.set_submodule('w_q', LowRank(layer.w_q)), 'its module w_q was replaced, changed or given'),
    (lambda layer: layer.set_submodule('w_v', nn.Conv2d(3, 3, 1)), 'its module w_v was replaced, changed or given'),
    (lambda layer: layer.w_o.register_forward_hook(lambda *args: None), 'its module w_o was .* given hooks'),
    (lambda layer: setattr(layer.attn_drop, 'p', 0.5), 'its module attn_drop was replaced, changed'),
    (lambda layer: setattr(layer.w_o, 'forward', partial(layer.w_o.forward)), 'its module w_o was .* or given hooks'),
    (lambda layer: parametrize(layer.pointwise_conv), 'its module pointwise_conv was replaced, changed'),
    (parametrize, 'cannot be scripted: there is no such class in .* a parametrization is to be removed first')])
def test_what_was_changed_is_not_scripted_as_it_was(change, message):
    layer = ConvNNAttention2d(3, 4).eval()
    change(layer)
    with pytest.raises(TypeError, match=message):
        torch.jit.script(layer)


# Without a batch, as torch's convolutions

@pytest.mark.parametrize('layer_type, args', [
    *[(layer_type, dict()) for layer_type in LAYERS_1D + LAYERS_2D + [CoordConv2d]],
    *[(layer_type, dict(shuffle_pattern='BA', shuffle_scale=2)) for layer_type in (ConvNN1d, Branching2d, CoordConv2d)],
    *[(Branching2d, dict(branch_ratio=ratio, stride=2)) for ratio in (0., 1.)],
    (ConvNN2d, LOC), (ConvNN2d, dict(K=1)), (ConvNN2d, dict(sampling_type='random', num_samples=9))], ids=str)
def test_a_single_map_is_a_batch_of_one(layer_type, args):
    layer = layer_type(3, 4, dtype=torch.float64, **args).eval()
    x = example(layer, (16,) * layer.axes)[0]
    y = layer(x)
    assert torch.equal(y, layer(x.unsqueeze(0)).squeeze(0)) and torch.equal(torch.jit.script(layer)(x), y)
    if layer_type is not CoordConv2d and getattr(layer, 'branch1', layer) is not None:
        assert torch.equal(layer.neighbors(x), layer.neighbors(x.unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), y)


@pytest.mark.parametrize('layer_type', [ConvNN1d, BranchingAttention2d])
def test_a_single_map_compiles(layer_type):
    torch._dynamo.reset()
    layer = layer_type(3, 4).eval()
    x = example(layer)[0].float()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend='aot_eager')(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


# Errors

@pytest.mark.parametrize('value', [-0.1, 1.5, 'half'])
@pytest.mark.parametrize('layer_type, name', [(ConvNN2d, 'lambda_param'), (ConvNNAttention1d, 'attention_dropout')])
def test_shares(layer_type, name, value):
    with pytest.raises(ValueError, match=rf'{name} must lie in \[0, 1\], got {value!r}'):
        layer_type(3, 4, **{name: value})


@pytest.mark.parametrize('name', ['in_channels', 'K', 'stride', 'padding', 'dilation', 'groups', 'num_samples'])
@pytest.mark.parametrize('value', [(2, 2), '5', 1.5, None])
def test_numbers_are_integers(name, value):
    with pytest.raises(ValueError, match=f'{name} must be one integer, the same for all axes, got '):
        ConvNN2d(**{'in_channels': 4, 'out_channels': 4, name: value})


@pytest.mark.parametrize('args, message', [
    (dict(K=0), 'K must be at least 1, got 0'),
    (dict(stride=0), 'stride must be at least 1'),
    (dict(padding=-1), 'padding must be at least 0'),
    (dict(sampling_type='some'), "unknown sampling_type 'some', valid are 'all', 'random', 'spatial'"),
    (dict(shuffle_pattern='AB'), "unknown shuffle_pattern 'AB', valid are 'NA', 'B', 'A', 'BA'"),
    (dict(magnitude_type='dot'), "unknown magnitude_type 'dot', valid are 'cosine', 'euclidean'"),
    (dict(aggregation_type='Loc'), "unknown aggregation_type 'Loc', valid are 'Col', 'Loc_Col'"),
    (dict(num_samples=64), "sampling_type='all' takes every token: leave num_samples at -1"),
    (dict(sampling_type='random'), "'random' with num_samples=-1 gives 0 candidates, but K=9 needs at least 8"),
    (dict(sampling_type='random', num_samples=7), "num_samples=7 gives 7 candidates, but K=9 needs at least 8"),
    (dict(sampling_type='spatial', num_samples=2), "candidates, but K=9 needs at least 8"),
    (dict(shuffle_pattern='BA', shuffle_scale=0), 'shuffle_scale must be at least 1, got 0'),
])
@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D)
def test_construction_refuses(layer_type, args, message):
    with pytest.raises(ValueError, match=message):
        layer_type(3, 4, **args)
    if 'Branching' in layer_type.__name__:
        with pytest.raises(ValueError, match=message):
            layer_type(3, 4, branch_ratio=0., **args)


@pytest.mark.parametrize('args, message', [
    (dict(dilation=0), 'dilation must be at least 1, got 0'),
    (dict(groups=0), 'groups must be at least 1, got 0'),
    (dict(groups=3), r'groups=3 must divide both the 4 channels that are aggregated and the \d+ output channels'),
    (dict(groups=4, aggregation_type='Loc_Col'), r"\(\d of them coordinates of aggregation_type='Loc_Col'\)"),
])
@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d, Branching1d, Branching2d])
def test_dilation_and_groups_are_checked(layer_type, args, message):
    for ratio in [dict(branch_ratio=0.), dict(branch_ratio=1.)] if 'Branching' in layer_type.__name__ else [{}]:
        with pytest.raises(ValueError, match=message):
            layer_type(4, 12, **args, **ratio)


def test_branches_refuse_groups_that_do_not_divide_their_outputs():
    with pytest.raises(ValueError, match=(
            'groups=4 must divide the outputs of both branches, but branch_ratio=0.5 gives 6 to the neighbours and 6 '
            'to the convolution')):
        Branching2d(4, 12, groups=4)


def test_similarity_type_is_checked():
    with pytest.raises(ValueError, match="unknown similarity_type 'Col_Loc', valid are 'Col', 'Loc', 'Loc_Col'"):
        ConvNN2d(3, 4, similarity_type='Col_Loc')


@pytest.mark.parametrize('args, message', [
    (dict(branch_ratio=1.5), r'branch_ratio must lie in \[0, 1\], got 1.5'),
    (dict(branch_ratio=-.1), 'branch_ratio must lie in'),
    (dict(branch_ratio='half'), r"branch_ratio must lie in \[0, 1\], got 'half'"),
    (dict(branch_ratio=(0, 5)), r'branch_ratio must lie in \[0, 1\], got \(0, 5\)'),
    (dict(out_channels=0), 'out_channels must be at least 1, got 0'),
    (dict(out_channels=-1, branch_ratio=0.), 'out_channels must be at least 1, got -1'),
    (dict(in_channels=0), 'in_channels must be at least 1, got 0'),
    (dict(kernel_size=4), 'kernel_size must be odd'),
    (dict(shuffle_pattern='B', shuffle_scale=2), "use 'BA' or 'NA'"),
])
def test_branching_refuses(args, message):
    for layer_type in Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d:
        with pytest.raises(ValueError, match=message):
            layer_type(**{'in_channels': 3, 'out_channels': 4, **args})


def test_a_share_of_less_than_one_channel_is_warned_of():
    with pytest.warns(UserWarning, match='branch_ratio=0.1 of 8 channels leaves none to the neighbours'):
        layer = Branching2d(3, 8, branch_ratio=0.1)
    with pytest.raises(ValueError, match='branch_ratio=0.1 of 8 channels leaves none to the neighbours'):
        layer.neighbors(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize('layer_type', LAYERS_2D + [CoordConv2d])
def test_forward_refuses(layer_type):
    layer = layer_type(3, 4)
    for shape in (8, 8), (1, 1, 3, 8, 8):
        with pytest.raises(ValueError, match=re.escape(f'expected an input (B, C, H, W) or (C, H, W), got {shape}')):
            layer(torch.ones(shape))
    for shape in (1, 5, 8, 8), (5, 8, 8):
        with pytest.raises(ValueError, match=re.escape(f'expected 3 input channels, got 5 in {shape}')):
            layer(torch.ones(shape))
    with pytest.raises(RuntimeError, match='dtype|type'):  # torch's own
        layer(torch.ones(1, 3, 8, 8, dtype=torch.float64))
    for size in (7, 8), (8, 7):
        with pytest.raises(ValueError, match=rf'map \({size[0]}, {size[1]}\) is not divisible by the shuffle scale 2'):
            layer_type(3, 4, shuffle_pattern='BA', shuffle_scale=2)(torch.ones(1, 3, *size))


@pytest.mark.parametrize('layer_type', LAYERS_2D)
def test_forward_refuses_a_map_with_fewer_tokens_than_k(layer_type):
    with pytest.raises(ValueError, match='K=9 neighbours need as many tokens, but a map of 2 x 4 with padding=0 has 8'):
        layer_type(3, 4, padding=0)(torch.ones(1, 3, 2, 4))
    with pytest.raises(ValueError, match='the sampling grid has 4 positions on a map of 4 x 4, but 8 neighbours'):
        layer_type(3, 4, sampling_type='spatial', num_samples=3, sample_padding=1)(torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match='the sampling grid has 0 positions on a map of 4 x 4'):
        layer_type(3, 4, sampling_type='spatial', num_samples=3, sample_padding=9)(torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize('layer_type', [ConvNNAttention1d, ConvNNAttention2d])
@pytest.mark.parametrize('K', [1, 4])
def test_attention_learns_with_all_parameters_that_ask_for_gradients(layer_type, K):
    """Or DistributedDataParallel refuses the second step. Without others the projections that compare learn nothing."""
    layer = layer_type(3, 4, K=K)
    layer(torch.randn(2, 3, *(6,) * layer.axes)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in layer.parameters())
    assert layer.w_q.weight.requires_grad == (K > 1)


def test_attention_starts_as_plain_attention():
    """All ranks weigh the same; the bias is that of a convolution of one channel and K taps."""
    layer = ConvNNAttention2d(200, 4, K=9)
    assert (layer.weight == 1).all() and 0.3 < layer.bias.abs().max() <= 1 / 3


def test_a_single_neighbour_is_dropped_like_others():
    layer, x = ConvNNAttention2d(3, 4, K=1, attention_dropout=0.5).train(), image(2, 3, 8, 8, dtype=torch.float32)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize('layer_type', LAYERS_1D + LAYERS_2D + [CoordConv2d])
def test_no_bias_where_none_is_wanted(layer_type):
    assert not [name for name, _ in layer_type(4, 8, bias=False).named_parameters() if name.endswith('bias')]


def test_defaults_are_those_of_the_paper():
    paper = dict(
        K=9, kernel_size=3, stride=1, padding=1, dilation=1, groups=1, bias=True, sampling_type='all', num_samples=-1,
        sample_padding=0, shuffle_pattern='NA', shuffle_scale=1, magnitude_type='cosine', similarity_type='Col',
        aggregation_type='Col', lambda_param=0.5, attention_dropout=0.1, branch_ratio=0.5)
    for layer_type in LAYERS_1D + LAYERS_2D + [CoordConv2d]:
        for name, parameter in inspect.signature(layer_type).parameters.items():
            assert name not in paper or parameter.default == paper[name], (layer_type, name)


@pytest.mark.parametrize('layer_type', [Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d])
def test_branching_takes_and_shows_the_arguments_of_its_neighbour_layer(layer_type):
    shown = inspect.signature(layer_type).parameters
    assert inspect.signature(layer_type.neighbor_layer).parameters.keys() | {'kernel_size', 'branch_ratio'} < shown.keys()
    for ratio in 0., 0.5:
        with pytest.raises(TypeError, match="unexpected keyword argument 'k'"):
            layer_type(3, 4, branch_ratio=ratio, k=9)


def test_what_is_remembered_is_not_made_in_a_cuda_graph():
    assert torch.Tag.cudagraph_unsafe in torch.ops.convnn_timm.neighbors_by_location.default.tags


def test_branching_refuses_a_map_that_its_branches_would_size_differently():
    with pytest.raises(ValueError, match=r'map \(14, 14\) must be divisible by the shuffle scale times the stride'):
        Branching2d(3, 4, stride=2, shuffle_pattern='BA', shuffle_scale=2)(torch.ones(1, 3, 14, 14))


@pytest.mark.parametrize('layer', [Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d])
def test_branching_mixes_its_branches(layer):
    layer = layer(3, 8, K=4, branch_ratio=0.25, dtype=torch.float64).eval()
    x = example(layer)
    assert torch.equal(layer(x), layer.pointwise_conv(torch.cat([layer.branch1(x), layer.branch2(x)], dim=1)))


@pytest.mark.parametrize('layer', [Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d])
def test_branching_can_leave_its_branches_side_by_side(layer):
    layer = layer(3, 8, K=4, branch_ratio=0.25, branch_mix=False, dtype=torch.float64).eval()
    x = example(layer)
    assert torch.equal(layer(x), torch.cat([layer.branch1(x), layer.branch2(x)], dim=1))
    assert {name.split('.')[0] for name in layer.state_dict()} == {'branch1', 'branch2'}
    layer.reset_parameters()
    assert 'branch_mix=False' in str(layer)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize('layer_type', [Branching1d, BranchingAttention2d])
def test_branching_starts_anew(layer_type):
    layer = layer_type(3, 8, K=4, dtype=torch.float64).eval()
    x = example(layer)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.)
    layer.reset_parameters()
    assert all((parameter != 7).all() for parameter in layer.parameters())
    assert torch.equal(layer.neighbors(x), layer.branch1.neighbors(x))


@pytest.mark.parametrize('layer_type', [ConvNN1d, ConvNN2d])
def test_convnn_can_start_as_a_1x1_convolution_and_learn_to_use_its_neighbors(layer_type):
    layer = layer_type(3, 8, K=4, stride=2, neighbor_init='zero', dtype=torch.float64)
    x = example(layer)
    kept = x[(..., *[slice(None, None, 2)] * layer.axes)]
    conv = nn.functional.conv1d(kept.flatten(2), layer.weight[:, :, :1].flatten(2), layer.bias)
    torch.testing.assert_close(layer(x).flatten(2), conv, rtol=1e-12, atol=1e-12)
    layer(x).square().sum().backward()
    assert (layer.weight.grad[:, :, 1:] != 0).all() and (layer.weight[:, :, :1] != 0).all()
    with pytest.raises(ValueError, match="neighbor_init='zero' leaves .* leave out neighbor_init, or select by 'Col'"):
        layer_type(3, 8, neighbor_init='zero', **LOC)


def test_a_zero_start_leaves_the_1x1_convolution_its_own_scale():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 1)
    torch.manual_seed(0)
    layer = ConvNN2d(16, 32, neighbor_init='zero')
    assert torch.equal(layer.weight[:, :, 0], conv.weight[..., 0]) and torch.equal(layer.bias, conv.bias)


def test_the_coordinate_convolution_shows_what_it_sees():
    assert str(CoordConv2d(3, 4)).endswith('padding=(1, 1), aggregation_type=Col)')
    layer = CoordConv2d(3, 4, aggregation_type='Loc_Col', shuffle_pattern='B', shuffle_scale=2)
    assert str(layer).endswith('aggregation_type=Loc_Col, shuffle_pattern=B, shuffle_scale=2)')


def test_branch_sizes():
    for ratio, first in (0, 0), (.3, 2), (.5, 4), (1, 8):
        layer = Branching2d(3, 8, branch_ratio=ratio)
        assert (layer.branch1.out_channels if layer.branch1 is not None else 0) == first
        assert (layer.branch2.out_channels if layer.branch2 is not None else 0) == 8 - first
        assert layer.pointwise_conv.weight.shape == (8, 8, 1, 1)


def test_create_layer_takes_the_arguments_of_all_layers_and_no_others():
    for layer_type in 'conv2d', 'conv2d_new', 'convnn', 'convnn_attn', 'convnn_branching', 'convnn_branching_attn':
        layer = create_layer(layer_type, 3, 4, stride=2, K=5, attention_dropout=0.2, kernel_size=5, bias=False)
        assert layer(torch.ones(1, 3, 8, 8)).shape == (1, 4, 4, 4)
        with pytest.raises(TypeError, match='unknown argument neighbors; layer arguments are .*K, '):
            create_layer(layer_type, 3, 4, neighbors=5)
        layer = create_layer(layer_type, 4, 8, stride=2, kernel_size=5, dilation=2, groups=2)
        assert layer(torch.ones(1, 4, 8, 8)).shape == (1, 8, 4, 4)
    assert {'K', 'padding', 'num_samples', 'branch_ratio', 'lambda_param'} <= set(layer_arguments())
    for refuse in partial(create_layer, 'foo', 3, 4), partial(layer_arguments, 'foo'):
        with pytest.raises(ValueError, match="unknown layer 'foo', valid are 'conv2d', 'conv2d_new', 'convnn', "):
            refuse()
