"""Branching layers: two branches, and how they are mixed."""
import inspect

import pytest
import torch
import torch.nn as nn

from convnn_timm.layers import Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d
from layer_examples import example


def test_branches_share_groups_and_dilation():
    for layer_type in Branching1d, Branching2d:
        layer = layer_type(4, 8, K=4, kernel_size=5, dilation=3, groups=2, stride=2)
        assert (layer.branch1.dilation, layer.branch1.groups, layer.branch1.padding) == (3, 2, 1)
        assert (layer.branch2.dilation[0], layer.branch2.groups, layer.branch2.padding[0]) == (3, 2, 6)
        assert layer(example(layer, (15,) * layer.axes).float()).shape == (2, 8, *(8,) * layer.axes)
        assert layer_type(4, 8, groups=4, branch_ratio=0.).branch2.groups == 4


def test_branches_refuse_groups_that_do_not_divide_their_outputs():
    with pytest.raises(ValueError, match=(
            'groups=4 must divide the outputs of both branches, but branch_ratio=0.5 gives 6 to the neighbours and 6 '
            'to the convolution')):
        Branching2d(4, 12, groups=4)


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


@pytest.mark.parametrize('layer_type', [Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d])
def test_branching_takes_and_shows_the_arguments_of_its_neighbour_layer(layer_type):
    shown, theirs = (inspect.signature(kind).parameters.keys() for kind in (layer_type, layer_type.neighbor_layer))
    assert shown - theirs == {'kernel_size', 'branch_ratio', 'branch_mix'} and theirs < shown
    for ratio in 0., 0.5:
        with pytest.raises(TypeError, match="unexpected keyword argument 'k'"):
            layer_type(3, 4, branch_ratio=ratio, k=9)


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


def test_branch_sizes():
    for ratio, first in (0, 0), (.3, 2), (.5, 4), (1, 8):
        layer = Branching2d(3, 8, branch_ratio=ratio)
        assert (layer.branch1.out_channels if layer.branch1 is not None else 0) == first
        assert (layer.branch2.out_channels if layer.branch2 is not None else 0) == 8 - first
        assert layer.pointwise_conv.weight.shape == (8, 8, 1, 1)
