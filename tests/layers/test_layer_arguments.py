"""Arguments: defaults, what is refused and in which words, how weights start."""
import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn as nn

from convnn_timm.layers import (
    Branching1d, Branching2d, ConvNN1d, ConvNN2d, ConvNNAttention1d, ConvNNAttention2d, CoordConv2d, create_layer,
    layer_arguments)
from layer_examples import LAYERS_1D, LAYERS_2D, LOC, example


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


def test_similarity_type_is_checked():
    with pytest.raises(ValueError, match="unknown similarity_type 'Col_Loc', valid are 'Col', 'Loc', 'Loc_Col'"):
        ConvNN2d(3, 4, similarity_type='Col_Loc')


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
