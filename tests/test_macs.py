"""Multiply-accumulates of known layers and networks."""
import pytest
import timm
import torch
from torch import nn

import convnn_timm  # noqa: F401, registers the models
from convnn_timm.layers import ConvNN2d
from convnn_timm.macs import count_macs, fvcore_handles


@pytest.mark.parametrize('layer, input_size, macs', [
    (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 8 * 3 * 9 * 10 * 12),
    (nn.Conv2d(3, 8, 3, padding='same'), (3, 10, 12), 8 * 3 * 9 * 10 * 12),
    (nn.Conv2d(4, 8, 3, stride=2, groups=2), (4, 9, 9), 8 * 2 * 9 * 4 * 4),
    (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 4, stride=4)), (3, 4, 4), 5 * 3 * 4 * 4),
    (nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), (3, 2, 2), 12 * 7),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 8), 4 * (4 * 8 * 8 + 2 * 4 * 8 + 2 * 8 * 16)),
    (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (3, 4, 4), 3 * 8 * 16),
])
def test_layers(layer, input_size, macs):
    assert count_macs(layer, input_size) == macs


def test_vgg11_without_neighbours_costs_what_its_convolutions_cost():
    model = timm.create_model('vgg11_convnn_branching', branch_ratio=0., device='meta')
    assert round(2 * count_macs(model) / 1e9, 3) == 0.599


def test_neighbours_are_counted():
    plain, hybrid = (
        count_macs(timm.create_model(
            'resnet18_convnn_branching', sampling_type='all', branch_ratio=ratio, device='meta'))
        for ratio in (0., 0.5)
    )
    assert hybrid > 1.05 * plain


@pytest.mark.parametrize('layer', ['convnn_branching', 'convnn_attn'])
def test_fvcore_counts_the_same_with_handles(layer):
    fvcore = pytest.importorskip('fvcore.nn', reason='fvcore is not installed')
    model = timm.create_model(f'resnet18_{layer}', channels=(8, 8, 16, 16), num_classes=5).eval()
    analysis = fvcore.FlopCountAnalysis(model, torch.zeros(1, 3, 16, 16)).unsupported_ops_warnings(False)
    counts = analysis.set_op_handle(**fvcore_handles()).by_operator()
    assert counts['knn'] and counts['neighbor_conv']
    counts = {name: count for name, count in counts.items() if name not in ('batch_norm', 'adaptive_avg_pool2d')}
    assert sum(counts.values()) == count_macs(model, (3, 16, 16))
    assert not any('convnn' in name for name in analysis.unsupported_ops())


def test_what_is_found_once_is_not_counted():
    layer = ConvNN2d(3, 4, K=9, similarity_type='Loc')
    assert count_macs(layer, (3, 16, 16)) == count_macs(layer, (3, 16, 16)) == 16 * 16 * 3 * 4 * 9
    assert count_macs(nn.ReLU()) == 0


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model)
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
