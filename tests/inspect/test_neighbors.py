"""Which neighbours layers choose: captured and measured."""
import copy
import math
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn as nn

import convnn_timm.models  # noqa: F401, registers the models
from convnn_timm import convert
from convnn_timm.inspect import capture_neighbors, neighbor_layers, neighbor_stats, window_neighbors
from convnn_timm.layers import Branching2d, ConvNN2d, ConvNNAttention2d

CHANNELS = (8, 8, 16, 16)
LAYERS = [f'layer{stage}.{block}.conv{conv}' for stage in range(1, 5) for block in range(2) for conv in (1, 2)]
LOC = dict(similarity_type='Loc', magnitude_type='euclidean', sampling_type='all')


def tiny(layer='convnn_branching', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'resnet18_{layer}', channels=CHANNELS, **kwargs)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('layer', ['convnn', 'convnn_attn', 'convnn_branching', 'convnn_branching_attn'])
def test_layers_are_named_like_the_convolutions_they_replace(layer):
    assert list(neighbor_layers(tiny(layer))) == LAYERS


def test_no_layers():
    for model in (tiny('conv2d'), tiny(branch_ratio=0)):
        with pytest.raises(ValueError, match='no ConvNN layers'):
            capture_neighbors(model, images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no layer 'layer9'; layers with neighbours are layer1.0.conv1, "):
        capture_neighbors(tiny(), images(1, 3, 32, 32), ['layer9'])


@pytest.mark.parametrize('fails', [False, True])
def test_model_is_untouched(fails):
    model = tiny(sampling_type='random', num_samples=50, zero_init_last=False).train()
    model.layer1.eval()  # as of a network that is partly frozen
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x, random = images(2, 3, 32, 32), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            capture_neighbors(model, images(2, 5, 32, 32))
    else:
        capture_neighbors(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = tiny(sampling_type='random', num_samples=50, zero_init_last=False).eval()(x)
    assert torch.equal(model.eval()(x), expected)


def test_positions_on_a_map_with_known_neighbors():
    """Three values, each at two places: a position's nearest neighbour is its twin. Rows, columns, padding, stride."""
    x = torch.zeros(1, 1, 4, 6)
    twins = {(0, 0): (3, 5), (2, 4): (1, 1), (0, 2): (3, 1)}
    for value, (one, other) in enumerate(twins.items(), 1):
        x[(0, 0, *one)] = x[(0, 0, *other)] = 10. * value
    layer = ConvNN2d(1, 1, K=2, stride=2, padding=2, magnitude_type='euclidean')
    (name, found), = capture_neighbors(layer, x).items()
    assert (name, found.size, found.stride, found.padding, found.window) == ('', (4, 6), 2, 2, 3)
    assert found.query.tolist() == [[r, c] for r in (0, 2) for c in (0, 2, 4)]
    chosen = {tuple(query): neighbors for query, neighbors in zip(found.query.tolist(), found.index[0].tolist())}
    for query, twin in twins.items():
        assert chosen[query] == [list(query), list(twin)]
    # All other positions are zero, as padding is: the first padded token comes first.
    assert chosen[0, 4] == [[0, 4], [-2, -2]]
    assert found.in_padding[0].any(dim=-1).tolist() == [query not in twins for query in chosen]


def test_shuffled_map():
    found = capture_neighbors(ConvNN2d(2, 4, shuffle_pattern='BA', shuffle_scale=2, **LOC), images(1, 2, 8, 12))['']
    assert found.size == (4, 6) and torch.equal(found.index, window_neighbors(found).index)


def test_window_is_dilated_as_the_layer_is():
    for layer_type, stride in (ConvNN2d, 3), (Branching2d, 1):
        layer = layer_type(2, 4, padding=2, dilation=2, stride=stride, **LOC)
        found, = capture_neighbors(nn.Sequential(layer), images(1, 2, 8, 11)).values()
        assert found.dilation == 2 and torch.equal(found.index, window_neighbors(found).index)
        line, = neighbor_stats(nn.Sequential(layer), images(1, 2, 8, 11))
        assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)


@pytest.mark.parametrize('layer, window', [
    (Branching2d(2, 4, kernel_size=5), 5), (Branching2d(2, 4, branch_ratio=1), 3), (ConvNN2d(2, 4, K=10), 5),
    (ConvNN2d(2, 4, K=5), 3), (ConvNNAttention2d(2, 4, K=1), 1)])
def test_window(layer, window):
    for name in '', '0', 'mybranch1':
        model = nn.Sequential(OrderedDict({name: layer})) if name else layer
        (found_name, found), = capture_neighbors(model, images(1, 2, 8, 8)).items()
        assert (found_name, found.window) == (name, window)


@pytest.mark.parametrize('conv', [
    nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 5, stride=3, padding=1), nn.Conv2d(2, 4, 3, stride=2, padding=4),
    nn.Conv2d(2, 4, 3, padding=(0, 1), dilation=2)], ids=str)
@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching'])
def test_positions_are_those_of_the_map_before_a_converted_layer_pads_it(conv, layer):
    """Where a convolution pads more or less than half its window."""
    k, (stride, _), (d, _) = conv.kernel_size[0], conv.stride, conv.dilation
    model = nn.Sequential(copy.deepcopy(conv))
    convert(model, layer, **LOC)
    x = images(2, 2, 13, 18)
    (name, found), = capture_neighbors(model, x).items()
    rows, columns = (
        torch.arange(out) * stride - padding + d * (k // 2) for out, padding in zip(conv(x).shape[2:], conv.padding))
    assert found.size == (13, 18) and torch.equal(found.query, torch.cartesian_prod(rows, columns))
    assert torch.equal(found.index, window_neighbors(found).index.expand_as(found.index))
    line, = neighbor_stats(model, x)
    assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)


@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching'])
def test_by_location_the_neighbors_are_the_window(layer):
    captured = capture_neighbors(tiny(layer, **LOC), images(2, 3, 32, 32))
    assert list(captured) == LAYERS
    for name, found in captured.items():
        assert torch.equal(found.index, window_neighbors(found).index.expand_as(found.index)), name
        assert found.stride == (2 if name in ('layer2.0.conv1', 'layer3.0.conv1', 'layer4.0.conv1') else 1)


def test_by_location_stats_are_those_of_the_window():
    for line in neighbor_stats(tiny(**LOC), images(2, 3, 32, 32)):
        assert line.inside == 1 and line.distance == pytest.approx(line.window_distance)
        assert line.hub_share == line.window_hub_share and line.hub_skewness == pytest.approx(line.window_hub_skewness)
        assert line.uniform_distance > line.distance and line.uniform_inside < 1


def test_any_token_of_a_dilated_layer_is_one_that_it_may_choose():
    """A row of five: 8, 6, 4 and 2 pairs are 1, 2, 3 and 4 steps apart. The dilated window reaches 2."""
    line, = neighbor_stats(ConvNN2d(1, 1, K=2, padding=0, dilation=2), images(1, 1, 1, 5))
    assert line.uniform_distance == pytest.approx(40 / 20) and line.uniform_inside == pytest.approx(14 / 20)
    assert line.window_distance == 2


@pytest.mark.parametrize('stride', [1, 2])
def test_any_token_is_measured_from_where_a_converted_layer_looks(stride):
    """Also from outside the map."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=stride, padding=4))
    convert(model, 'convnn', **LOC)
    x = images(1, 2, 7, 9)
    found, = capture_neighbors(model, x).values()
    steps = found.query.unsqueeze(1) - torch.cartesian_prod(torch.arange(7), torch.arange(9))
    steps = steps[(steps != 0).any(dim=-1)]
    line, = neighbor_stats(model, x)
    assert line.uniform_distance == pytest.approx(steps.double().norm(dim=-1).mean().item())
    assert line.uniform_inside == pytest.approx((steps.abs() <= 1).all(dim=-1).double().mean().item())


def test_stats_of_known_neighbors():
    """A row of four tokens that choose, in this order, the tokens 3, 2 (or 3, the same distance), 1, 1."""
    layer = ConvNN2d(1, 1, K=2, padding=0, magnitude_type='euclidean')
    x = torch.tensor([[[[0., 3., 4., 2.]]]])
    line, = neighbor_stats(layer, x)
    assert (line.layer, line.height, line.width, line.K, line.window, line.images) == ('', 1, 4, 2, 3, 1)
    assert line.distance == pytest.approx((3 + 1 + 1 + 2) / 4)
    assert line.inside == 2 / 4 and line.padding == 0
    assert line.uniform_distance == pytest.approx(20 / 12) and line.uniform_inside == pytest.approx(6 / 12)
    assert line.window_distance == 1 and line.window_hub_share == 2 / 4
    assert line.hub_share == 2 / 4  # token 1 is chosen twice; occurrences are 0, 2, 1, 1
    assert line.hub_skewness == pytest.approx(0)


def test_hubs_and_padding():
    """A token in the middle is every other's nearest; zeros are like padding, and choose that."""
    hub = torch.tensor([[1., 0.], [0., 1.], [-1., 0.], [0., -1.], [0.1, 0.1]]).T.reshape(1, 2, 1, 5)
    line, = neighbor_stats(ConvNN2d(2, 1, K=2, padding=0, magnitude_type='euclidean'), hub)
    assert line.hub_share == 4 / 5 and line.hub_skewness > 1 > line.window_hub_skewness
    line, = neighbor_stats(ConvNN2d(1, 1, K=3, magnitude_type='euclidean'), torch.zeros(2, 1, 3, 3))
    assert line.padding == 1 and math.isnan(line.distance) and line.hub_share == 0


def test_stats_of_a_loader():
    model, x = tiny(), images(5, 3, 32, 32)
    whole = neighbor_stats(model, x)
    parts = neighbor_stats(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(5)), 2))
    for a, b in zip(whole, parts, strict=True):
        assert a.layer == b.layer and a.images == b.images == 5
        assert a[7:] == pytest.approx(b[7:], rel=0.05, abs=0.05)  # selection may differ by batch where scores are equal
    with pytest.raises(ValueError, match='no images'):
        neighbor_stats(model, [])
