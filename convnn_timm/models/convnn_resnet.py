"""ResNet with ConvNN layers in place of the 3x3 convolutions of its blocks.

The networks are timm's ResNets: for small images with a 3x3 stem, no max-pool and strides 1, 2, 2, 2; those that end
with `_224` with timm's 7x7 stem and max-pool. Models with `convnn_branching` layers are in the form that trains best,
`PUBLISHED_FORM`; the paper's is `sampling_type='all', branch_ratio=0.5, branch_mix=True, neighbor_init='random'`.

Paper: `Attention Via Convolutional Nearest Neighbors` - https://arxiv.org/abs/2511.14137
"""
from typing import Any, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from convnn_timm.layers import layer_arguments
from convnn_timm.layers.base import check_choice
from convnn_timm.layers.registry import create_layer_for
from ._common import (
    add_input_noise, build_model, check_fits, check_known, cifar_cfg, imagenet_cfg, init_convnn_weights)
from ._weights import with_weights

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
        for name, conv in list(self.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                setattr(self, name, create_layer_for(conv, layer, **(layer_args or {}), **dd))


class ConvNNBasicBlock(_ConvNNBlock, BasicBlock):
    """timm's basic block with `layer` for both of its 3x3 convolutions."""


class ConvNNBottleneck(_ConvNNBlock, Bottleneck):
    """timm's bottleneck with `layer` for its 3x3 convolution."""


class ConvNNResNet(ResNet):
    """ResNet whose blocks hold `layer`."""
    layer_bias = False  # a norm follows each layer

    def __init__(
            self,
            block: Type[nn.Module],
            layers: Tuple[int, ...],
            small_stem: bool = True,
            layer: str = 'convnn',
            layer_args: Optional[Dict[str, Any]] = None,
            in_chans: int = 3,
            output_stride: Optional[int] = None,
            input_noise: float = 0.,
            zero_init_last: bool = False,
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
            output_stride: Pixels of the image for one of the last map: 8, 16 or 32, with the small stem 2, 4 or 8; the
                last of them by default. Layers beyond it are dilated instead (neighbours by feature ignore that).
            input_noise: Standard deviation of the noise that `forward` alone adds to (normalised) images in training.
            zero_init_last: Start the last norm of each block at zero, which silences the block. That costs the first
                epochs: after three, 64.5 against 75.3 top-1 on CIFAR-10 (e3_conv2d and e3_conv2d_active in
                train_scripts/results/search.csv).
            block_args: Further arguments of the blocks.
            **kwargs: Arguments of timm's ResNet, except those of stem and cardinality, which are fixed.

        Raises:
            ValueError: An output stride that the network cannot have.
            TypeError: A fixed or an unknown argument.
        """
        fixed = {'cardinality', 'replace_stem_pool', 'stem_type', 'stem_width'} & kwargs.keys()
        if fixed:
            raise TypeError(
                f'{type(self).__name__} has a fixed stem and cardinality: it takes no {", ".join(sorted(fixed))}')
        check_known(kwargs, ResNet)
        strides = (2, 4, 8) if small_stem else (8, 16, 32)
        check_choice('output_stride', output_stride, (None, *strides))
        if output_stride and output_stride < strides[-1] and 'dilation' not in layer_arguments(layer):
            raise ValueError(f'{layer} layers have no dilation, so output_stride must be {strides[-1]}')
        timms_stride = (output_stride or strides[-1]) * (4 if small_stem else 1)  # which counts timm's stem
        super().__init__(
            block, layers, in_chans=in_chans, output_stride=timms_stride, zero_init_last=zero_init_last,
            block_args=dict(block_args or {}, layer=layer, layer_args=layer_args),
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
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        init_convnn_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = add_input_noise(x, self.input_noise, self.training)
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Accept the state dict of this ResNet. (The paper code's never downsamples: it is another network.)"""
    check_fits(state_dict, model)
    return state_dict


def _cfg() -> Dict[str, Any]:
    return cifar_cfg(first_conv='conv1', classifier='fc', pool_size=(4, 4), min_input_size=(3, 8, 8))


def _cfg_224() -> Dict[str, Any]:
    return imagenet_cfg(first_conv='conv1', classifier='fc', pool_size=(7, 7), min_input_size=(3, 32, 32))


default_cfgs = generate_default_cfgs(with_weights({
    'resnet18_conv2d.cifar10': _cfg(),
    'resnet18_conv2d_new.cifar10': _cfg(),
    'resnet18_convnn.cifar10': _cfg(),
    'resnet18_convnn_attn.cifar10': _cfg(),
    'resnet18_convnn_branching.cifar10': _cfg(),
    'resnet18_convnn_branching_attn.cifar10': _cfg(),
    'resnet34_conv2d.cifar10': _cfg(),
    'resnet34_conv2d_new.cifar10': _cfg(),
    'resnet34_convnn.cifar10': _cfg(),
    'resnet34_convnn_attn.cifar10': _cfg(),
    'resnet34_convnn_branching.cifar10': _cfg(),
    'resnet34_convnn_branching_attn.cifar10': _cfg(),
    'resnet18_convnn_branching_224': _cfg_224(),
    'resnet34_convnn_branching_224': _cfg_224(),
    'resnet50_convnn_branching_224': _cfg_224(),
}))

LAYERS = {'resnet18': (2, 2, 2, 2), 'resnet34': (3, 4, 6, 3), 'resnet50': (3, 4, 6, 3)}
# The form of the branching layers that trains best. Figures are top-1 of held-out images after short trainings, whose
# names in train_scripts/results/search.csv stand in brackets.
PUBLISHED_FORM = dict(
    # The more outputs come from neighbours, the more slowly the network learns. After an epoch at quarter width: 61.8
    # at 0.125, 59.2 at 0.25, 65.2 for the convolution (q1_*_muon3).
    branch_ratio=0.125,
    # The branches stand side by side, and the next layer mixes them. The paper's 1x1 convolution costs most. After
    # twelve epochs at half width, on half of the images: 84.7 with it, 84.9 with it but without neighbours (K=1), 86.0
    # without it, 86.1 for the convolution (h32_hybrid*, h32_reflect_off9; one seed).
    branch_mix=False,
    # Neighbours are first chosen by features not yet learned, so they start silent. After an epoch at 0.125, two seeds
    # each: 64.1 and 65.0, the convolution 65.6 and 64.7. All tokens as candidates instead of 32: 64.2 (q1_*_float32).
    neighbor_init='zero',
    # 32 random tokens, drawn anew for every batch, cost little to search. In the authors' logs of VGG-11, 64 of 1024
    # reach 82.1 by cosine and 82.8 by distance, all reach 82.4 and 83.2; repetitions differ by 0.4.
    sampling_type='random',
    num_samples=32,
)


def _create_convnn_resnet(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args) -> ConvNNResNet:
    backbone, large = variant.partition('_')[0], variant.endswith('_224')
    if 'branch_mix' not in kwargs.get('pretrained_model_args', PUBLISHED_FORM):  # saved when the paper's was the form
        model_args = dict(sampling_type='spatial', num_samples=8) if large else {}
    return build_model(
        ConvNNResNet,
        variant,
        pretrained,
        dict(layers=LAYERS[backbone], **model_args),
        kwargs,
        pretrained_filter_fn=checkpoint_filter_fn,
        block=ConvNNBottleneck if backbone == 'resnet50' else ConvNNBasicBlock,
        small_stem=not large,
    )


@register_model
def resnet18_conv2d(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_resnet('resnet18_conv2d', pretrained, kwargs)


@register_model
def resnet18_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolutions that can see coordinates."""
    return _create_convnn_resnet('resnet18_conv2d_new', pretrained, kwargs)


@register_model
def resnet18_convnn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution over nearest neighbours."""
    return _create_convnn_resnet('resnet18_convnn', pretrained, kwargs)


@register_model
def resnet18_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: attention to nearest neighbours."""
    return _create_convnn_resnet('resnet18_convnn_attn', pretrained, kwargs)


@register_model
def resnet18_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution and ConvNN side by side."""
    return _create_convnn_resnet('resnet18_convnn_branching', pretrained, kwargs, **PUBLISHED_FORM)


@register_model
def resnet18_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_resnet('resnet18_convnn_branching_attn', pretrained, kwargs)


@register_model
def resnet34_conv2d(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_resnet('resnet34_conv2d', pretrained, kwargs)


@register_model
def resnet34_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolutions that can see coordinates."""
    return _create_convnn_resnet('resnet34_conv2d_new', pretrained, kwargs)


@register_model
def resnet34_convnn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution over nearest neighbours."""
    return _create_convnn_resnet('resnet34_convnn', pretrained, kwargs)


@register_model
def resnet34_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: attention to nearest neighbours."""
    return _create_convnn_resnet('resnet34_convnn_attn', pretrained, kwargs)


@register_model
def resnet34_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution and ConvNN side by side."""
    return _create_convnn_resnet('resnet34_convnn_branching', pretrained, kwargs, **PUBLISHED_FORM)


@register_model
def resnet34_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_resnet('resnet34_convnn_branching_attn', pretrained, kwargs)


@register_model
def resnet18_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for 224x224 images: convolution and ConvNN side by side."""
    return _create_convnn_resnet('resnet18_convnn_branching_224', pretrained, kwargs, **PUBLISHED_FORM)


@register_model
def resnet34_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for 224x224 images: convolution and ConvNN side by side."""
    return _create_convnn_resnet('resnet34_convnn_branching_224', pretrained, kwargs, **PUBLISHED_FORM)


@register_model
def resnet50_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-50 for 224x224 images: convolution and ConvNN side by side."""
    return _create_convnn_resnet('resnet50_convnn_branching_224', pretrained, kwargs, **PUBLISHED_FORM)
