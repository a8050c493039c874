"""ResNet with ConvNN layers in place of the 3x3 convolutions of its blocks.

On timm's ResNet. For small images: 3x3 stem, no max-pool, strides 1, 2, 2, 2. The models `..._224`: timm's 7x7 stem and
max-pool. The models `..._convnn_branching` are in the form that trains best, `PUBLISHED_FORM`; the paper's is
`sampling_type='all', branch_ratio=0.5, branch_mix=True, neighbor_init='random'`.

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
                epochs: after three, 64.5 against 75.3 top-1 on CIFAR-10 (train_scripts/results/search, e3_conv2d and
                e3_conv2d_active).
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


def _cfg(**kwargs) -> Dict[str, Any]:
    return cifar_cfg(first_conv='conv1', classifier='fc', pool_size=(4, 4), min_input_size=(3, 8, 8), **kwargs)


def _cfg_224(**kwargs) -> Dict[str, Any]:
    return imagenet_cfg(first_conv='conv1', classifier='fc', pool_size=(7, 7), min_input_size=(3, 32, 32), **kwargs)


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

# The form of the branching layers that trains best, found in short runs on held-out images: see
# train_scripts/results/search, whose runs are named in brackets.
PUBLISHED_FORM = dict(
    # The more outputs come from neighbours, the more slowly the network learns: after an epoch at quarter width 65.2
    # top-1 for the convolution, 61.8 at 0.125, 59.2 at 0.25 (q1_*_muon3).
    branch_ratio=0.125,
    # The branches stand side by side, and the next layer mixes them. The 1x1 convolution that mixes them in the paper
    # is what costs most, even if it starts as the identity, behind a norm: in twelve epochs at half width, on half of
    # the images, 84.7 top-1 with it (84.9 without any neighbours, K=1), 86.0 without it, 86.1 for the convolution
    # (h32_hybrid*, h32_reflect_off9; one seed).
    branch_mix=False,
    # Neighbours are chosen by features not yet learned, and cost most at first: at 0.25, without any (K=1), those 59.2
    # would be 62.7. So they start silent: at 0.125 that gave 64.1 and 65.0 with two seeds, the convolution 65.6 and
    # 64.7. All tokens instead of 32 as candidates change nothing: 64.2 (q1_*_float32).
    neighbor_init='zero',
    # 32 random tokens, drawn anew for every batch, cost little to search. In the authors' logs of VGG-11 64 of 1024
    # lose little (82.1 top-1 by cosine, 82.8 by distance; all 82.4 and 83.2; repetitions differ by 0.4), 16 lose
    # nothing by cosine (82.5) and 1.3 by distance.
    sampling_type='random',
    num_samples=32,
)


def _create_convnn_resnet(
        variant: str,
        layer: str,
        pretrained: bool,
        model_args: Dict[str, Any],
        kwargs: Dict[str, Any],
) -> ConvNNResNet:
    large = variant.endswith('_224')
    if 'branch_mix' not in kwargs.get('pretrained_model_args', PUBLISHED_FORM):  # saved when the paper's was the form
        model_args = {name: value for name, value in model_args.items() if name not in PUBLISHED_FORM}
        model_args.update(dict(sampling_type='spatial', num_samples=8) if large else {})
    return build_model(
        ConvNNResNet,
        variant,
        layer,
        pretrained,
        model_args,
        kwargs,
        pretrained_filter_fn=checkpoint_filter_fn,
        block=ConvNNBottleneck if variant.startswith('resnet50') else ConvNNBasicBlock,
        small_stem=not large,
    )


@register_model
def resnet18_conv2d(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolutions, the twin of the ConvNN networks."""
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_convnn_resnet('resnet18_conv2d', 'conv2d', pretrained, model_args, kwargs)


@register_model
def resnet18_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolutions that can see coordinates."""
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_convnn_resnet('resnet18_conv2d_new', 'conv2d_new', pretrained, model_args, kwargs)


@register_model
def resnet18_convnn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution over nearest neighbours."""
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_convnn_resnet('resnet18_convnn', 'convnn', pretrained, model_args, kwargs)


@register_model
def resnet18_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: attention to nearest neighbours."""
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_convnn_resnet('resnet18_convnn_attn', 'convnn_attn', pretrained, model_args, kwargs)


@register_model
def resnet18_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution and ConvNN side by side."""
    model_args = dict(layers=(2, 2, 2, 2), **PUBLISHED_FORM)
    return _create_convnn_resnet('resnet18_convnn_branching', 'convnn_branching', pretrained, model_args, kwargs)


@register_model
def resnet18_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for small images: convolution and ConvNN attention, mixed."""
    model_args = dict(layers=(2, 2, 2, 2))
    return _create_convnn_resnet(
        'resnet18_convnn_branching_attn', 'convnn_branching_attn', pretrained, model_args, kwargs)


@register_model
def resnet34_conv2d(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolutions, the twin of the ConvNN networks."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_convnn_resnet('resnet34_conv2d', 'conv2d', pretrained, model_args, kwargs)


@register_model
def resnet34_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolutions that can see coordinates."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_convnn_resnet('resnet34_conv2d_new', 'conv2d_new', pretrained, model_args, kwargs)


@register_model
def resnet34_convnn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution over nearest neighbours."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_convnn_resnet('resnet34_convnn', 'convnn', pretrained, model_args, kwargs)


@register_model
def resnet34_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: attention to nearest neighbours."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_convnn_resnet('resnet34_convnn_attn', 'convnn_attn', pretrained, model_args, kwargs)


@register_model
def resnet34_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution and ConvNN side by side."""
    model_args = dict(layers=(3, 4, 6, 3), **PUBLISHED_FORM)
    return _create_convnn_resnet('resnet34_convnn_branching', 'convnn_branching', pretrained, model_args, kwargs)


@register_model
def resnet34_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for small images: convolution and ConvNN attention, mixed."""
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_convnn_resnet(
        'resnet34_convnn_branching_attn', 'convnn_branching_attn', pretrained, model_args, kwargs)


@register_model
def resnet18_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-18 for 224x224 images: convolution and ConvNN side by side."""
    model_args = dict(layers=(2, 2, 2, 2), **PUBLISHED_FORM)
    return _create_convnn_resnet('resnet18_convnn_branching_224', 'convnn_branching', pretrained, model_args, kwargs)


@register_model
def resnet34_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-34 for 224x224 images: convolution and ConvNN side by side."""
    model_args = dict(layers=(3, 4, 6, 3), **PUBLISHED_FORM)
    return _create_convnn_resnet('resnet34_convnn_branching_224', 'convnn_branching', pretrained, model_args, kwargs)


@register_model
def resnet50_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNResNet:
    """ResNet-50 for 224x224 images: convolution and ConvNN side by side."""
    model_args = dict(layers=(3, 4, 6, 3), **PUBLISHED_FORM)
    return _create_convnn_resnet('resnet50_convnn_branching_224', 'convnn_branching', pretrained, model_args, kwargs)
