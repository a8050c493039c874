"""ResNet with ConvNN layers in place of the 3x3 convolutions of its blocks.

On timm's ResNet, for small images: 3x3 stem, no max-pool, strides 1, 2, 2, 2.

Paper: `Convolutional Nearest Neighbor` - https://arxiv.org/abs/2511.14137
"""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from convnn_timm.layers import LAYER_TYPES, create_layer
from ._common import (
    add_input_noise, check_complete, cifar_cfg, entrypoint, init_convnn_weights, split_layer_args)
from ._weights import find_weights, published_cfg, tagged_names

__all__ = ['ConvNNResNet', 'ConvNNBasicBlock']


class ConvNNBasicBlock(BasicBlock):
    """timm's basic block with `layer` for both of its 3x3 convolutions."""

    def __init__(
            self,
            inplanes: int,
            planes: int,
            stride: int = 1,
            downsample: Optional[nn.Module] = None,
            layer: str = 'convnn',
            layer_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(inplanes, planes, stride, downsample, **kwargs, **dd)
        layer_args = {'bias': False, **(layer_args or {})}  # BatchNorm follows
        for name in 'conv1', 'conv2':
            conv = getattr(self, name)
            setattr(self, name, create_layer(
                layer, conv.in_channels, conv.out_channels, stride=conv.stride[0], **layer_args, **dd))


class ConvNNResNet(ResNet):
    """ResNet whose blocks hold `layer`."""

    def __init__(
            self,
            layers: Tuple[int, ...],
            layer: str = 'convnn',
            layer_args: Optional[Dict[str, Any]] = None,
            in_chans: int = 3,
            input_noise: float = 0.,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            layers: Number of blocks in each stage.
            layer: One of `convnn_timm.layers.LAYER_TYPES`.
            layer_args: Arguments of the layers.
            in_chans: Number of input channels.
            input_noise: Standard deviation of the noise added to (normalised) images in training.
            **kwargs: Arguments of timm's ResNet, except those of the stem and the output stride, which are fixed.
        """
        if fixed := kwargs.keys() & {'block', 'output_stride', 'replace_stem_pool', 'stem_type', 'stem_width'}:
            raise TypeError(f'{type(self).__name__} has a fixed stem and stride: it takes no {", ".join(sorted(fixed))}')
        super().__init__(
            ConvNNBasicBlock, layers, in_chans=in_chans, block_args=dict(layer=layer, layer_args=layer_args),
            device=device, dtype=dtype, **kwargs)
        self.input_noise = float(input_noise)
        self.conv1 = nn.Conv2d(
            in_chans, self.conv1.out_channels, 3, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for info in self.feature_info:  # the stem no longer divides by 4
            info['reduction'] = max(info['reduction'] // 4, 1)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        init_convnn_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = add_input_noise(x, self.input_noise, self.training)
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Accept the state dict of this ResNet. (The paper code's never downsamples: it is another network.)"""
    check_complete(state_dict, model, classifier='fc')
    return state_dict


def _cfg(**kwargs) -> Dict[str, Any]:
    return cifar_cfg(first_conv='conv1', classifier='fc', pool_size=(4, 4), min_input_size=(3, 8, 8), **kwargs)


_DEPTHS = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3)}
_VARIANTS = {f'{depth}_{layer}': (depth, layer) for depth in _DEPTHS for layer in LAYER_TYPES}

default_cfgs = generate_default_cfgs({name: _cfg(**published_cfg(name)) for name in tagged_names(_VARIANTS)})


def _create_convnn_resnet(variant: str, pretrained: bool = False, **kwargs) -> ConvNNResNet:
    depth, layer = _VARIANTS[variant]
    kwargs = find_weights(variant, kwargs) if pretrained else kwargs
    layer_args, kwargs = split_layer_args(kwargs)
    return build_model_with_cfg(
        ConvNNResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        layers=_DEPTHS[depth],
        layer=layer,
        layer_args=layer_args,
        **kwargs,
    )


# resnet18_conv2d, resnet18_conv2d_new, resnet18_convnn, ... resnet34_convnn_branching_attn
for _variant, (_depth, _layer) in _VARIANTS.items():
    register_model(entrypoint(
        _create_convnn_resnet, _variant, __name__,
        f'ResNet-{_depth[6:]} with {LAYER_TYPES[_layer].__name__} layers, all layer arguments as keywords.'))
