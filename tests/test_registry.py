"""Adding a layer: what CONTRIBUTING.md says is enough is enough."""
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from convnn_timm import convert
from convnn_timm.hub.card import Card
from convnn_timm.layers import LAYER_TYPES, create_layer, layer_arguments, registry

ROOT = Path(__file__).parents[1]
KIND = 'whose layers take the largest value around'


class MaxPool(nn.Module):
    """A layer with an argument that no other has, and a start from a convolution."""

    def __init__(self, in_channels, out_channels, stride=1, reach=1, bias=True, device=None, dtype=None):
        super().__init__()
        self.pool = nn.MaxPool2d(2 * reach + 1, stride, reach)
        self.mix = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        return self.mix(self.pool(x))


def start_max_pool(layer, conv):
    layer.mix.weight.data.copy_(conv.weight.sum((2, 3), keepdim=True))


@pytest.fixture(autouse=True)
def forget_new_layers():
    known = set(registry.REGISTRY)
    yield
    for name in registry.REGISTRY.keys() - known:
        del registry.REGISTRY[name]


@pytest.fixture
def max_pool():
    registry.register_layer('max_pool', MaxPool, KIND, first_convs=('mix',), start=start_max_pool)


def test_a_registered_layer_is_created_with_its_arguments(max_pool):
    assert LAYER_TYPES['max_pool'] is MaxPool and layer_arguments('max_pool') == ('reach', 'bias')
    layer = create_layer('max_pool', 3, 4, stride=2, reach=2, bias=False, K=9)
    assert layer(torch.ones(1, 3, 8, 8)).shape == (1, 4, 4, 4) and layer.pool.kernel_size == 5
    with pytest.raises(ValueError, match="there is a layer 'max_pool' already"):
        registry.register_layer('max_pool', MaxPool, KIND)


def test_a_registered_layer_replaces_convolutions(max_pool, tmp_path):
    model = timm.create_model('test_resnet')
    weight = model.conv1[0].weight.sum((2, 3), keepdim=True)
    report = convert(model, 'max_pool', reach=2)
    assert 'max_pool in place of conv1.0, ' in str(report) and torch.equal(model.conv1[0].mix.weight, weight)
    assert model._traits['first_conv'] == ('conv1.0.mix',)
    timm.models.save_for_hf(model.eval(), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_a_card_has_words_for_a_registered_layer(max_pool):
    config = dict(architecture='resnet18_max_pool', model_args=dict(reach=2, K=4))
    card = Card('resnet18_max_pool.x', config, {}, [], [], None)
    assert card.kind == KIND and card.arguments == ['`reach=2`']
    assert card.form.endswith('except that `reach` is 2, not 1')


def test_the_example_of_contributing_is_a_layer():
    """The lines that it adds, file by file."""
    block = re.search(r'```diff\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.DOTALL)[1]
    _, *parts = re.split(r'^\+\+\+ (\S+)\n', block, flags=re.MULTILINE)
    files = {path: re.sub(r'^\+', '', text, flags=re.MULTILINE) for path, text in zip(parts[::2], parts[1::2])}
    assert [path.split('/')[0] for path in files] == ['convnn_timm', 'convnn_timm', 'tests', 'docs']
    names = dict(torch=torch, create_layer=create_layer, register_layer=registry.register_layer)
    for path, text in files.items():
        if path.endswith('.py'):
            exec(re.sub(r'^from \..*\n', '', text), names)
    names['test_an_output_depends_on_one_position']()
    model = timm.create_model('test_resnet')
    assert convert(model, 'pointwise', init='random', where='layer1.*').replaced
    assert names['Pointwise2d'].__name__ in files['docs/layers.md']
