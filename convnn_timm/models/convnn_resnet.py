"""ResNet with ConvNN layers in place of the 3x3 convolutions of its blocks.

On timm's ResNet. For small images: 3x3 stem, no max-pool, strides 1, 2, 2, 2. The models `..._224`: timm's 7x7 stem and
max-pool, and sampled candidates.

Paper: `Attention Via Convolutional Nearest Neighbors` - https://arxiv.org/abs/2511.14137
"""
from typing import Any, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from convnn_timm.layers import LAYER_TYPES, create_layer
from ._common import (
    add_input_noise, check_complete, check_known, cifar_cfg, entrypoint, imagenet_cfg, init_convnn_weights, sampled,
    split_layer_args)
from ._weights import published_cfg, tagged_names

__all__ = ['ConvNNResNet', 'ConvNNBasicBlock', 'ConvNNBottleneck']


class _ConvNNBlock(nn.Module):
    """A block of timm's with `layer` for its 3x3 convolutions."""

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
        for name, conv in list(self.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                setattr(self, name, create_layer(
                    layer, conv.in_channels, conv.out_channels, stride=conv.stride[0], **layer_args, **dd))


class ConvNNBasicBlock(_ConvNNBlock, BasicBlock):
    """timm's basic block with `layer` for both of its 3x3 convolutions."""


class ConvNNBottleneck(_ConvNNBlock, Bottleneck):
    """timm's bottleneck with `layer` for its 3x3 convolution."""


class ConvNNResNet(ResNet):
    """ResNet whose blocks hold `layer`."""

    def __init__(
            self,
            block: Type[nn.Module],
            layers: Tuple[int, ...],
            small_stem: bool = True,
            layer: str = 'convnn',
            layer_args: Optional[Dict[str, Any]] = None,
            in_chans: int = 3,
            input_noise: float = 0.,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            block: ConvNNBasicBlock or ConvNNBottleneck.
            layers: Number of blocks in each stage.
            small_stem: For small images: a 3x3 convolution without stride, not timm's 7x7 with stride and max-pool.
            layer: One of `convnn_timm.layers.LAYER_TYPES`.
            layer_args: Arguments of the layers.
            in_chans: Number of input channels.
            input_noise: Standard deviation of the noise that `forward` alone adds to (normalised) images in training.
            block_args: Further arguments of the blocks.
            **kwargs: Arguments of timm's ResNet, except those of stem, stride and cardinality, which are fixed.
        """
        fixed = {'cardinality', 'output_stride', 'replace_stem_pool', 'stem_type', 'stem_width'} & kwargs.keys()
        if fixed:
            raise TypeError(
                f'{type(self).__name__} has a fixed stem, stride and cardinality: '
                f'it takes no {", ".join(sorted(fixed))}')
        check_known(kwargs, ResNet)
        super().__init__(
            block, layers, in_chans=in_chans, block_args=dict(block_args or {}, layer=layer, layer_args=layer_args),
            device=device, dtype=dtype, **kwargs)
        self.input_noise = float(input_noise)
        if small_stem:
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


def _cfg_224(**kwargs) -> Dict[str, Any]:
    return imagenet_cfg(first_conv='conv1', classifier='fc', pool_size=(7, 7), min_input_size=(3, 32, 32), **kwargs)


_DEPTHS = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3), 'resnet50': (3, 4, 6, 3)}
_VARIANTS = {f'{depth}_{layer}': (depth, layer) for depth in ('resnet18', 'resnet34') for layer in LAYER_TYPES}
_VARIANTS_224 = {f'{depth}_convnn_branching_224': (depth, 'convnn_branching') for depth in _DEPTHS}

default_cfgs = generate_default_cfgs({
    **{name: _cfg(**published_cfg(name)) for name in tagged_names(_VARIANTS)},
    **{name: _cfg_224(**published_cfg(name)) for name in tagged_names(_VARIANTS_224, '')}})


def _create_convnn_resnet(variant: str, pretrained: bool = False, **kwargs) -> ConvNNResNet:
    large = variant in _VARIANTS_224
    depth, layer = (_VARIANTS_224 if large else _VARIANTS)[variant]
    layer_args, kwargs = split_layer_args(kwargs)
    layers = kwargs.pop('layers', _DEPTHS[depth])
    return build_model_with_cfg(
        ConvNNResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        block=ConvNNBottleneck if depth == 'resnet50' else ConvNNBasicBlock,
        layers=layers,
        small_stem=not large,
        layer=layer,
        layer_args=sampled(layer_args) if large else layer_args,
        **kwargs,
    )


# resnet18_conv2d, resnet18_conv2d_new, ... resnet34_convnn_branching_attn, then resnet18_convnn_branching_224, ...
for _variant, (_depth, _layer) in {**_VARIANTS, **_VARIANTS_224}.items():
    register_model(entrypoint(
        _create_convnn_resnet, _variant, __name__,
        f'ResNet-{_depth[6:]} with {LAYER_TYPES[_layer].__name__} layers, all layer arguments as keywords.'))
