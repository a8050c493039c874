"""The parts of a layer are called as modules: hooks, adapters, parametrizations, offloading, sharding depend on it."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn

from convnn_timm.layers import Branching2d, BranchingAttention2d, ConvNNAttention1d, ConvNNAttention2d, CoordConv2d
from layer_examples import LAYERS_1D, LAYERS_2D, example, image


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
