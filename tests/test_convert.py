"""Conversion of other people's networks: what is replaced, what it starts as, and that timm still knows the model."""
import copy
import fnmatch
import json
from collections.abc import Mapping, Sequence

import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from timm.models import get_model_traits, save_for_hf
from torch import nn
from torch.nn.utils import parametrize, prune

from convnn_timm import Branching2d, ConvNN2d, convert
from convnn_timm.macs import count_macs
from convnn_timm.models import convnn_converted

BY_LOCATION = dict(similarity_type='Loc', magnitude_type='euclidean')
# Convolutions that each layer replaces; those of depthwise networks cannot be divided between branches.
MODELS = {
    'test_efficientnet': (6, 4),
    'test_convnext': (9, 0),
    'resnet18': (17, 17),
    'convnext_atto': (12, 0),
    'regnety_002': (14, 14),
    'resnet50': (17, 17),
    'resnext50_32x4d': (17, 17),
    'wide_resnet50_2': (17, 17),
    'densenet121': (59, 59),
    'efficientnet_b0': (17, 1),
    'tf_efficientnet_b0': (17, 1),  # pads like TensorFlow
    'mobilenetv3_small_100': (12, 1),
    'dla34': (27, 27),
    'resnetv2_50': (17, 17),
    'cspresnet50': (17, 17),
    'vgg11_bn': (9, 9),  # with the first layer of its classifier, which has a window of 7 x 7
}
FAST = ('resnet18', 'test_efficientnet', 'test_convnext', 'repvit_m0_9', 'repvgg_a0', 'lcnetv2_small')


def create(name, **kwargs):
    """A model in float64 of which no layer is hidden: some begin with a factor of zero, or nearly so."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).double().eval()
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.ndim == 1:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def run(model, x):
    """Output of a model, and what its square's sum depends on in the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad


def assert_same_function(model, other, x):
    """Equal outputs and gradients to the input, to ten digits."""
    for ours, theirs in zip(run(model, x), run(other, x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().amax().item())


# By location it is the same function

@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching'])
@pytest.mark.parametrize('name', [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_a_network_converted_by_location_is_the_same_function(name, layer):
    model, x = create(name), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    converted, count = copy.deepcopy(model), MODELS[name][layer == 'convnn_branching']
    if not count:
        with pytest.raises(ValueError, match='its groups have 1 output each'):
            convert(converted, layer, **BY_LOCATION)
        return
    report = convert(converted, layer, **BY_LOCATION)
    assert len(report.replaced) == count
    kind = ConvNN2d if layer == 'convnn' else Branching2d
    assert sum(isinstance(module, kind) for module in converted.modules()) == count
    assert_same_function(converted, model, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters() if p.requires_grad)

    other = copy.deepcopy(model)
    convert(other, layer, init='random', **BY_LOCATION)
    with torch.no_grad():  # the test would see a difference
        assert not torch.allclose(other(x), model(x))


CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 8, 3, padding=1, bias=False),
    nn.Conv2d(6, 8, 5, padding='same'),
    nn.Conv2d(6, 8, 7, padding=3, stride=2),  # its corners are farther away than the 49th nearest place
    nn.Conv2d(6, 8, 3),  # 'valid', as all that follow: other paddings than half the window
    nn.Conv2d(6, 8, 3, stride=2),
    nn.Conv2d(6, 8, 5, stride=3, padding='valid'),
    nn.Conv2d(6, 8, 5, stride=3, padding=1),
    nn.Conv2d(6, 8, 3, stride=2, padding=4),
    nn.Conv2d(6, 8, 3, padding=(0, 1)),
    nn.Conv2d(6, 8, 3, padding=1, groups=2),
    nn.Conv2d(6, 12, 3, padding=1, groups=3, stride=2),
    nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    nn.Conv2d(6, 8, 3, padding=1, dilation=2, stride=2, groups=2),
    nn.Conv2d(6, 8, 7, padding=6, dilation=2, groups=2),
    Conv2dSame(6, 8, 3, stride=2),
    Conv2dSame(6, 8, 5, stride=3, groups=2),
    Conv2dSame(6, 8, 5, stride=2, dilation=2),
    Conv2dSame(6, 8, 3),
]


@pytest.mark.parametrize('conv', CONVOLUTIONS, ids=lambda conv: str(conv).replace(' ', ''))
@pytest.mark.parametrize('layer, ratio', [('convnn', 0.5), ('convnn_branching', 0.5), ('convnn_branching', 1.0)])
def test_a_convolution_converted_by_location_is_the_same_function(conv, layer, ratio):
    conv = nn.Sequential(copy.deepcopy(conv)).double()
    converted = copy.deepcopy(conv)
    convert(converted, layer, branch_ratio=ratio, **BY_LOCATION)
    for size in (16, 16), (13, 18), (11, 12):
        assert_same_function(converted, conv, torch.randn(2, 6, *size, dtype=torch.float64))


@pytest.mark.parametrize('conv', CONVOLUTIONS, ids=lambda conv: str(conv).replace(' ', ''))
def test_layers_that_choose_by_similarity_keep_the_size_of_every_map(conv):
    conv = nn.Sequential(conv)
    sampled = dict(sampling_type='random', num_samples=20, K=4)
    for layer, kwargs in (('convnn', dict(K=4)), ('convnn_branching', sampled)):
        converted = copy.deepcopy(conv)
        convert(converted, layer, **kwargs)
        for size in (16, 16), (13, 18):
            x = torch.randn(1, 6, *size)
            assert converted(x).shape == conv(x).shape
            assert converted(x[0]).shape == conv(x).shape[1:]


def test_outputs_of_groups_return_to_their_places():
    """Each group's outputs are divided; the 1x1 convolution is a permutation, not the identity."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    convert(model)
    mix = model[0].pointwise_conv.weight[..., 0, 0]
    assert mix.argmax(dim=1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7] and mix.sum() == 8


def test_without_a_mixture_only_outputs_of_one_group_keep_their_places():
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, dtype=torch.float64))
    converted = copy.deepcopy(conv)
    convert(converted, branch_mix=False, **BY_LOCATION)
    assert converted[0].pointwise_conv is None
    assert_same_function(converted, conv, torch.randn(2, 4, 9, 7, dtype=torch.float64))
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    with pytest.raises(ValueError, match="without branch_mix its groups' outputs would change places"):
        convert(grouped, branch_mix=False)
    convert(copy.deepcopy(grouped), 'convnn', branch_mix=False)  # which has no branches
    convert(grouped, branch_mix=False, init='random')


# By similarity: which tap each rank starts with

@pytest.mark.parametrize('kwargs, taps', [
    (dict(), [4, 1, 3, 5, 7, 0, 2, 6, 8]),  # the centre, its sides, the corners
    (dict(similarity_type='Loc_Col'), [4, 1, 3, 5, 7, 0, 2, 6, 8]),
    (dict(K=3), [4, 1, 3]),
    (dict(K=11), [4, 1, 3, 5, 7, 0, 2, 6, 8, None, None]),
    (dict(BY_LOCATION), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    (dict(BY_LOCATION, K=5), [1, 3, 4, 5, 7]),
    (dict(BY_LOCATION, K=13), [None, 0, 1, 2, None, 3, 4, 5, None, 6, 7, 8, None]),
])
def test_ranks_start_with_the_taps_of_the_window(kwargs, taps):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    conv = model[0]
    convert(model, 'convnn', **kwargs)
    assert torch.equal(model[0].bias, conv.bias)
    for rank, tap in enumerate(taps):
        expected = torch.zeros(4, 2) if tap is None else conv.weight.flatten(2)[..., tap]
        assert torch.equal(model[0].weight[:, :, rank, 0], expected)
    assert model[0].K == len(taps)


def test_coordinates_start_at_zero():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1)).double()
    other, x = copy.deepcopy(model), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    convert(other, 'convnn', aggregation_type='Loc_Col', **BY_LOCATION)
    assert_same_function(other, model, x)
    assert other[0].weight.shape == (4, 4, 9, 1)


def test_a_branching_layer_keeps_the_convolutions_share_of_the_function():
    model, x = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1)).double(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    convert(other, branch_ratio=0.25)
    assert torch.allclose(other(x)[:, 2:], model(x)[:, 2:]) and not torch.allclose(other(x)[:, :2], model(x)[:, :2])


@pytest.mark.parametrize('layer', ['convnn', 'convnn_branching', 'convnn_attn', 'convnn_branching_attn', 'conv2d_new'])
def test_any_layer_can_start_at_random(layer):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3))
    shape = model(torch.randn(1, 2, 12, 12)).shape
    report = convert(model, layer, init='random', aggregation_type='Loc_Col')
    assert report.replaced == ['0', '1'] and model(torch.randn(1, 2, 12, 12)).shape == shape


def test_arguments_of_all_layers_are_accepted():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    convert(model, 'convnn', branch_ratio=0.1, attention_dropout=0.3, K=2, padding=0)
    assert (model[0].K, model[0].padding) == (2, 0)


# Which convolutions

class Odd(nn.Module):
    """One convolution of each kind that is not replaced, and one that is."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(4, 4, 3)
        self.point = nn.Conv2d(4, 4, 1)
        self.even = nn.Conv2d(4, 4, 2)
        self.flat = nn.Conv2d(4, 4, (1, 3))
        self.mirror = nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')
        self.uneven = nn.Conv2d(4, 4, 3, stride=(1, 2))
        self.standard = StdConv2d(4, 4, 3)
        self.hooked = nn.Conv2d(4, 4, 3)
        self.hooked.register_forward_hook(lambda *args: None)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.wide = nn.Conv2d(4, 4, 3, dilation=(1, 2))
        self.parametrized = parametrize.register_parametrization(nn.Conv2d(4, 4, 3), 'weight', nn.ReLU())
        self.pruned = prune.l1_unstructured(nn.Conv2d(4, 4, 3), 'weight', 2)
        self.saved_apart = nn.Conv2d(4, 4, 3)
        self.saved_apart.register_state_dict_post_hook(lambda *args: None)
        self.offloaded = nn.Conv2d(4, 4, 3)
        self.offloaded.forward = lambda x: x
        self.masked = nn.Conv2d(4, 4, 3)
        self.masked.register_buffer('mask', torch.ones(4, 4, 3, 3))
        self.quantized = nn.Conv2d(4, 4, 3)
        self.quantized.weight = Quantized(torch.ones(4, 4, 3, 3))
        self.clipped = nn.Conv2d(4, 4, 3)
        self.clipped.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
        self.adapter = Adapter()


class Quantized(nn.Parameter):
    """A parameter of another kind, as quantisation and sharding make them."""


class Adapter(nn.Module):
    """A low-rank adapter, which merges its weight into the convolution's, as peft's and loralib's do."""
    merged = False

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Conv2d(4, 4, 3)
        self.lora_A = nn.ModuleDict({'default': nn.Conv2d(4, 2, 3)})


REASONS = {
    'point': 'a 1 x 1 kernel has no neighbours',
    'even': 'the kernel is 2 x 2, and an even one has no centre',
    'flat': 'the kernel is 1 x 3, not square',
    'mirror': "padding_mode='reflect', the layer pads with zeros",
    'uneven': 'stride=(1, 2) differs between the axes',
    'standard': 'StdConv2d does more than a convolution',
    'hooked': 'it has hooks, which would be lost',
    'depthwise': 'its groups have 1 output each, which branch_ratio does not divide between the branches: '
                 "choose another one, or layer='convnn'",
    'wide': 'dilation=(1, 2) differs between the axes',
    'parametrized': 'ParametrizedConv2d does more than a convolution',
    'pruned': 'it has hooks, which would be lost',
    'saved_apart': 'it has hooks, which would be lost',
    'offloaded': 'its forward was replaced, which would be lost',
    'masked': 'it holds other tensors than a weight and a bias, which would be lost',
    'quantized': 'its parameters are Quantizeds, which would be lost',
    'clipped': 'its parameters have hooks, which would be lost',
    'adapter.base_layer': 'an adapter will merge into it: merge that first, then convert',
    'adapter.lora_A.default': 'an adapter will merge into it: merge that first, then convert',
}


def test_what_cannot_be_replaced_stays_and_the_report_says_why():
    model = Odd()
    before = dict(model.named_children())
    report = convert(model)
    assert report.replaced == ['fine'] and report.skipped == REASONS
    assert [name for name, module in model.named_children() if module is not before[name]] == ['fine']
    text = str(report)
    assert text.startswith('convnn_branching in place of fine\n')
    assert all(f'  left: {reason}: ' in text for reason in REASONS.values())


@pytest.mark.parametrize('tie', [
    lambda a, b: setattr(b, 'weight', a.weight),
    lambda a, b: setattr(b.weight, 'data', a.weight.data),
])
@pytest.mark.parametrize('other', [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_that_shares_a_parameter_stays(tie, other):
    model = nn.ModuleDict(dict(a=nn.Conv2d(4, 4, 3), b=other(4, 4, 3), c=nn.Conv2d(4, 4, 3)))
    tie(model['a'], model['b'])
    report = convert(model)
    assert report.replaced == ['c'] and report.skipped['a'] == 'it shares its weight with b.weight'
    assert report.skipped.get('b') in (None, 'it shares its weight with a.weight')
    assert model['a'].weight.data_ptr() == model['b'].weight.data_ptr()


# Convolutions by location that are replaced: before a network is reparameterised, and after.
REPARAMETERIZED = {
    'repvit_m0_9': (0, 28),
    'repvgg_a0': (0, 22),
    'lcnetv2_small': (6, 12),
    'nextvit_small': (24, 24),  # folds others
    'tiny_vit_5m_224': (0, 17),
    'levit_conv_128s': (0, 4),
    'efficientvit_m0': (0, 46),
    'fastvit_t8': (10, 26),
    'fastvit_sa12': (12, 29),
    'mobileone_s0': (0, 22),
    'repghostnet_050': (10, 42),
    'ghostnetv3_050': (6, 42),
    'iformer_t': (0, 21),
    'efficientvim_m1': (6, 28),
    'shvit_s1': (0, 21),
}


@pytest.fixture
def float64_by_default():
    """Some of timm's networks fold into new convolutions of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in REPARAMETERIZED])
@torch.no_grad()
def test_reparameterisation_finds_its_convolutions_and_comes_first(name, float64_by_default):
    model = create(name)
    size = model.pretrained_cfg['input_size'][-1] if model.pretrained_cfg.get('fixed_input_size') else 64
    x, (before, after) = torch.randn(1, 3, size, size), REPARAMETERIZED[name]
    expected, converted = model(x), create(name)
    if before:
        report = convert(converted, 'convnn', **BY_LOCATION)
        assert len(report.replaced) == before
        text = str(report)
    else:
        with pytest.raises(ValueError) as error:
            convert(converted, 'convnn', **BY_LOCATION)
        text = str(error.value)
    assert ('reparameterize_model(model)` first, then convert' in text) == (name != 'nextvit_small')
    torch.testing.assert_close(timm.utils.reparameterize_model(converted, inplace=True)(x), expected)
    plain = timm.utils.reparameterize_model(model, inplace=True)
    report = convert(plain, 'convnn', **BY_LOCATION)
    assert len(report.replaced) == after and 'reparameterize' not in str(report)
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize('layer, reason', [
    ('convnn_attn', 'it has groups, which convnn_attn has not'),
    ('convnn_branching_attn', 'it is dilated, which convnn_branching_attn is not'),
])
def test_attention_has_neither_groups_nor_dilation(layer, reason):
    model = nn.ModuleList([nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3)])
    assert reason in convert(model, layer, init='random').skipped.values()


LAYER3 = ['layer3.0.conv1', 'layer3.0.conv2', 'layer3.1.conv1', 'layer3.1.conv2']


@pytest.mark.parametrize('where, expected', [
    ('layer3.*', LAYER3),
    ('layer3.?.conv1,layer3.?.conv2', LAYER3),
    (['layer3.0.*', 'layer3.1.conv?'], LAYER3),
    (lambda name, module: isinstance(module, nn.Conv2d) and name.startswith('layer3'), LAYER3),
])
def test_where(where, expected):
    model = timm.create_model('resnet18', device='meta')
    report = convert(model, where=where)
    assert report.replaced == expected
    assert report.skipped == {'layer3.0.downsample.0': REASONS['point']} or 'conv' in str(where)


def test_a_module_that_is_there_twice_is_replaced_everywhere_by_one_layer():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict(dict(a=conv, b=nn.Sequential(nn.ReLU(), conv, conv)))
    assert convert(model).replaced == ['a']
    assert isinstance(model['a'], Branching2d)
    assert model['a'] is model['b'][1] is model['b'][2]


def test_names_may_be_spaced():
    spaced, plain = (timm.create_model('resnet18', device='meta') for _ in range(2))
    replaced = convert(spaced, where='layer3.*, layer4.*').replaced
    assert replaced == convert(plain, where='layer3.*,layer4.*').replaced and replaced[-1].startswith('layer4')


def test_what_is_frozen_stays_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    convert(model, 'convnn', K=4)
    frozen = {name.replace('layer.', '') for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'0.bias', '1.weight'}


def test_a_map_smaller_than_the_window_is_refused_as_by_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 5))
    convert(model, 'convnn')
    assert model(torch.ones(1, 3, 5, 6)).shape == (1, 4, 1, 2)
    with pytest.raises(ValueError, match='the window of 5 does not fit into 4 positions with 0 of padding'):
        model(torch.ones(1, 3, 4, 4))


def test_layers_of_this_package_are_left_alone():
    model = timm.create_model('resnet18_convnn_branching', device='meta')
    assert convert(model).replaced == ['conv1']
    with pytest.raises(ValueError, match='none in this model'):
        convert(model)


@pytest.mark.parametrize('kwargs, message', [
    (dict(where='layer9.*'), "`where` selects no convolution ('layer9.*')\n  it can replace: conv1, layer1.0.conv1, "),
    (dict(where='layer3.*, layr4.*'), 'no convolution is named layr4.*; there are conv1, layer1.0.conv1, '),
    (dict(where=lambda name, module: False), '`where` selects no convolution (the function)\n  it can replace: '),
    (dict(where='*downsample*'), 'none of the convolutions that `where` selects:\n  a 1 x 1 kernel has no '),
    (dict(layer='conv2d'), "unknown layer 'conv2d', valid are conv2d_new, convnn, "),
    (dict(init='zero'), "unknown init 'zero', valid are conv, random"),
    (dict(K=0), 'K must be at least 1'),
    (dict(branch_ratio='half'), "branch_ratio must lie in [0, 1], got 'half'"),
    (dict(sampling_type='random', num_samples=3), 'candidates'),
    (dict(layer='convnn_attn'), "convnn_attn cannot start from a convolution's weights: choose init='random'"),
    (dict(shuffle_pattern='BA', shuffle_scale=2), "with a pixel shuffle cannot start from a convolution's weights"),
    (dict(shuffle_pattern='B', shuffle_scale=2, init='random'), "shuffle_pattern='B' changes the size of the map"),
    (dict(neighbor_init='zero'), "leave out neighbor_init, or choose init='random'"),
])
def test_an_error_says_what_to_do_and_leaves_the_model_alone(kwargs, message):
    model = timm.create_model('resnet18', device='meta')
    before = str(model)
    with pytest.raises(ValueError) as error:
        convert(model, **kwargs)
    assert message in str(error.value)
    assert str(model) == before and model.pretrained_cfg['architecture'] == 'resnet18'


@pytest.mark.parametrize('kwargs, message', [
    (dict(colour=3), 'unknown argument colour; layer arguments are '),
    (dict(where=3), '`where` must be names or a function, got 3'),
    (dict(where=['0', 3]), '`where` must be names or a function, got '),
    (dict(kernel_size=5, bias=False), 'kernel_size, bias: comes from the convolution'),
])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(TypeError, match=message):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)), **kwargs)


def test_a_convolution_alone_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match='put it into a'):
        convert(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match='the model has no Conv2d'):
        convert(nn.Linear(3, 4))


def test_a_compiled_network_is_refused():
    with pytest.raises(ValueError, match='convert it first, then compile it'):
        convert(torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_a_network_whose_gradients_are_synchronised_is_refused(monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, '__init__', lambda self: nn.Module.__init__(self))
    with pytest.raises(ValueError, match='convert it first, then wrap it'):
        convert(nn.parallel.DistributedDataParallel())


# What the report counts

@pytest.mark.parametrize('where, many', [(None, True), ('layer4.*', False)])
def test_a_network_that_becomes_very_slow_is_warned_of(where, many, recwarn):
    report = convert(timm.create_model('resnet18', channels=(8, 8, 16, 16), device='meta'), where=where)
    assert (report.macs[1] > 10 * report.macs[0]) == many == bool(recwarn)
    assert not many or 'times as many multiply-accumulates as before: choose' in str(recwarn[0].message)


@pytest.mark.parametrize('base, layer', [
    ('test_resnet', 'convnn'), ('test_resnet', 'convnn_branching'), ('test_efficientnet', 'convnn_branching')])
def test_a_converted_first_layer_is_adapted_to_grey_images(base, layer, tmp_path):
    model = timm.create_model(base, num_classes=4).eval()
    convert(model, layer, where=lambda name, conv: conv.in_channels == 3, magnitude_type='euclidean')
    timm.models.save_for_hf(model, tmp_path)
    grey = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1).eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    convert(model, layer, where=lambda name, conv: conv.in_channels != 3, K=3)  # again: what is adapted stays
    assert get_model_traits(model)['first_conv'] == get_model_traits(grey)['first_conv']


@pytest.mark.parametrize('args', [dict(shuffle_pattern='BA', shuffle_scale=2), dict(aggregation_type='Loc_Col')])
def test_a_converted_first_layer_that_rearranges_channels_is_not_adapted(args, tmp_path):
    model = timm.create_model('test_resnet', num_classes=4)
    convert(model, 'convnn', init='random', where='conv1.0', K=3, **args)
    timm.models.save_for_hf(model, tmp_path)
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    with pytest.raises(RuntimeError, match='in another shape, among them conv1.0.weight'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1)


def test_the_report_counts():
    model = timm.create_model('test_resnet', in_chans=1)
    before = sum(p.numel() for p in model.parameters()), count_macs(model, (1, 160, 160))
    report = convert(model, where='layer*', sampling_type='random', num_samples=16)
    after = sum(p.numel() for p in model.parameters()), count_macs(model, (1, 160, 160))
    assert report.parameters == (before[0], after[0]) and report.macs == (before[1], after[1])
    assert f'at 1 x 160 x 160: {before[1] / 1e9:.3f} G before, {after[1] / 1e9:.3f} G after' in str(report)


def test_the_size_is_that_which_a_network_was_built_for():
    model = timm.create_model('botnet26t_256', img_size=128)
    assert convert(model, where='stages.0.*', sampling_type='random', num_samples=16).input_size == (3, 128, 128)


def test_a_network_that_cannot_be_counted_is_converted():
    class Picky(nn.Sequential):
        def forward(self, x):
            assert x.shape[-1] == 100
            return super().forward(x)

    model = Picky(nn.Conv2d(3, 8, 3, padding=1))
    model.pretrained_cfg = dict(input_size=(3, 32, 32))
    assert convert(model).macs is None and isinstance(model[0], Branching2d)


def test_what_a_layer_has_no_use_for_stays_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    convert(model, 'convnn_attn', init='random', K=1)
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_network_that_tells_no_image_size_has_no_macs():
    report = convert(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert report.macs is None and 'multiply' not in str(report)


# The model stays what it was

def test_new_layers_are_where_and_what_the_old_ones_were():
    model = timm.create_model('test_resnet', dtype=torch.bfloat16).eval()
    model.layer1.requires_grad_(False)
    convert(model, where='layer*')
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())
    assert {p.device.type for p in convert_on('meta').parameters()} == {'meta'}


def convert_on(device, **kwargs):
    model = timm.create_model('test_resnet', device=device)
    convert(model, **kwargs)
    return model


def test_a_converted_timm_model_stays_a_timm_model():
    model, x = convert_on('cpu', K=5).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = model(x)
        again = convert_on('cpu', K=5, init='random').eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), y) and torch.equal(copy.deepcopy(model)(x), y)
        features = model.forward_intermediates(x, intermediates_only=True)
        assert [f.shape[1] for f in features] == [info['num_chs'] for info in model.feature_info]
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
def test_a_feature_extractor_is_converted_too(name):
    model, x = create(name, features_only=True), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    convert(model, 'convnn', **BY_LOCATION)
    after = model(x)
    for ours, theirs in zip(after, before):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert [f.shape[1] for f in after] == model.feature_info.channels()


@pytest.mark.parametrize('record', [torch.jit.script, torch.fx.symbolic_trace])
def test_scripted_and_traced(record):
    model = convert_on('cpu', where='layer*', K=5).eval()
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Conv2dSame(8, 8, 3, stride=2)).eval()
    convert(convolution, K=5)
    x = torch.randn(1, 3, 40, 40)
    for module in model, convolution:
        torch.testing.assert_close(record(module)(x), module(x))


# Saved and rebuilt

def save(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / 'config.json').read_text())


def test_what_timm_saves_is_rebuilt_by_its_name(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3, block_args=dict(attn_layer='se'))
    convert(model, where='layer3.*', K=5, branch_ratio=0.25)
    convert(model, 'convnn', where=lambda name, _: fnmatch.fnmatchcase(name, 'layer2.*'))
    config = save(model.eval(), tmp_path)
    assert config['architecture'] == 'convnn_converted' and config['model_args']['base'] == 'test_resnet'
    assert config['model_args']['convert'] == [
        dict(layer='convnn_branching', where=['layer3.*'], init='conv', K=5, branch_ratio=0.25),
        dict(layer='convnn', where=['layer2.0.conv1', 'layer2.0.conv2'], init='conv')]
    again, x = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), torch.randn(1, 3, 64, 64)
    assert str(again) == str(model) and torch.equal(again(x), model(x))
    for key in 'input_size', 'mean', 'classifier':
        assert list(again.pretrained_cfg[key]) == list(model.pretrained_cfg[key])

    convert(again, where='conv1.*')  # and once more
    config = save(again, tmp_path / 'again')
    assert [c['where'] for c in config['model_args']['convert']][2] == ['conv1.*']
    last = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
    assert str(last) == str(again) and torch.equal(last(x), again(x))


def test_a_rebuilt_model_takes_timms_arguments(tmp_path):
    model = convert_on('cpu', where='layer*').eval()
    save(model, tmp_path)
    name, x = f'local-dir:{tmp_path}', torch.randn(1, 3, 64, 64)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    base = timm.create_model('test_resnet', features_only=True)
    assert features.feature_info.info == base.feature_info.info
    for ours, theirs in zip(features(x), model.forward_intermediates(x, intermediates_only=True)):
        assert torch.equal(ours, theirs)
    assert timm.create_model(name, pretrained=True, num_classes=7)(x).shape == (1, 7)
    assert timm.create_model(name, pretrained=True, num_classes=0)(x).shape == (1, model.num_features)


def test_a_file_that_lacks_tensors_is_refused(tmp_path):
    model = convert_on('cpu')
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('layer4')}
    with pytest.raises(RuntimeError, match='the checkpoint lacks .* tensors'):
        timm.create_model(
            'convnn_converted', pretrained=True, base='test_resnet', num_classes=3,
            pretrained_cfg_overlay=dict(state_dict=state))


def test_created_by_name():
    conversion = dict(where='layer1.*', K=3)
    model = timm.create_model('convnn_converted', base='test_resnet', convert=conversion, num_classes=4)
    twin = timm.create_model('test_resnet', num_classes=4)
    convert(twin, **conversion)
    assert str(model) == str(twin)
    assert {**model.pretrained_cfg} == {**twin.pretrained_cfg}


@pytest.mark.parametrize('kwargs, error, message', [
    *[(dict(base=base), ValueError, f'base={base!r} is no model of timm: give a name that timm.list_models knows')
      for base in ('resnet17', 'hf-hub:timm/resnet18.a1_in1k', 'local-dir:resnet18', 'convnn_converted', 18)],
    (dict(base='resnet18.no_such_tag'), RuntimeError, r'Invalid pretrained tag \(no_such_tag\) for resnet18'),
    (dict(convert='layer3.*'), TypeError, "convert='layer3.*': give the arguments of `convnn_timm.convert`, or a list"),
    (dict(convert=['layer3.*']), TypeError, 'give the arguments of `convnn_timm.convert`, or a list of such'),
])
def test_a_wrong_base_or_conversion_is_an_error(kwargs, error, message, monkeypatch):
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('it asked the network'))
    for pretrained in False, True:
        with pytest.raises(error, match=message):
            timm.create_model('convnn_converted', pretrained=pretrained, **kwargs)


class Settings(Mapping):
    """A mapping that is no dict, such as OmegaConf's."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, name):
        return self.items_[name]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


class Several(Sequence):
    """A sequence that is no list."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


def test_conversions_are_any_mapping_or_sequence(tmp_path):
    model = convert_on('cpu', where=Several('layer1.*', 'layer2.*'), K=3)
    assert save(model, tmp_path)['model_args']['convert'][0]['where'] == ['layer1.*', 'layer2.*']
    settings = Settings(where=Several('layer1.*', 'layer2.*'), K=3)
    for conversions in settings, Several(settings):
        assert str(timm.create_model('convnn_converted', base='test_resnet', convert=conversions)) == str(model)


def test_timm_finds_the_architecture_but_does_not_list_it():
    assert timm.is_model('convnn_converted')
    for kwargs in dict(), dict(filter='*convnn*'), dict(filter='convnn_converted*', include_tags=True):
        assert 'convnn_converted' not in timm.list_models(**kwargs)
    assert timm.list_models('*convnn*')[0].startswith('resnet')


@pytest.mark.parametrize('pretrained', [False, True])
def test_the_base_gets_its_pretrained_weights_before_it_is_converted(pretrained, monkeypatch):
    asked, create_model = [], timm.create_model

    def without_network(name, pretrained, **kwargs):
        asked.append((name, pretrained))
        return create_model(name, **kwargs)

    monkeypatch.setattr(convnn_converted.timm, 'create_model', without_network)
    monkeypatch.setattr(convnn_converted, 'check_reach', lambda name: None)
    create_model('convnn_converted', pretrained=pretrained, base='test_resnet.r160_in1k', device='meta')
    assert asked == [('test_resnet.r160_in1k', pretrained)]
