"""VGG with ConvNN layers in place of its 3x3 convolutions.

The networks are timm's VGGs with BatchNorm, for 32x32 images as in the paper. `vgg11_convnn_branching_224` is for
224x224 images and samples its candidates.

Paper: `Attention Via Convolutional Nearest Neighbors` - https://arxiv.org/abs/2511.14137
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vgg import VGG, cfgs

from convnn_timm.layers import convert_original_state_dict
from convnn_timm.layers.registry import create_layer_for, first_modules, rearranges_channels
from ._common import (
    add_input_noise, build_model, check_fits, check_known, cifar_cfg, imagenet_cfg, init_convnn_weights)
from ._weights import with_weights

__all__ = ['ConvNNVGG']


def _create_conv(
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        layer: str = 'convnn',
        layer_args: Optional[Dict[str, Any]] = None,
        device=None,
        dtype=None,
        **kwargs,
) -> nn.Module:
    """A convolution of the network: in the classifier itself, in the features (3x3) the layer that takes its place."""
    conv = partial(nn.Conv2d, in_channels, out_channels, kernel_size, **kwargs)
    if kernel_size != 3:
        return conv(device=device, dtype=dtype)
    return create_layer_for(conv(device='meta'), layer, **(layer_args or {}), device=device, dtype=dtype)


class ConvNNVGG(VGG):
    """VGG whose feature layers are `layer`."""
    layer_bias = True

    def __init__(
            self,
            cfg: List[Any],
            layer: str = 'convnn',
            layer_args: Optional[Dict[str, Any]] = None,
            input_noise: float = 0.,
            drop_rate: float = 0.5,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            cfg: Channels of the convolutions, 'M' for max-pools.
            layer: One of `convnn_timm.layers.LAYER_TYPES`.
            layer_args: Arguments of the layers.
            input_noise: Standard deviation of the noise that `forward` alone adds to (normalised) images in training.
            drop_rate: Dropout of the classifier.
            **kwargs: Arguments of timm's VGG, except `conv_layer` and `norm_layer`, which are fixed.
        """
        if fixed := {'conv_layer', 'norm_layer'} & kwargs.keys():
            raise TypeError(f'{type(self).__name__} has fixed layers: it takes no {", ".join(sorted(fixed))}')
        check_known(kwargs, VGG)
        conv_layer = partial(_create_conv, layer=layer, layer_args=layer_args)
        super().__init__(
            cfg, conv_layer=conv_layer, norm_layer=nn.BatchNorm2d, drop_rate=drop_rate, device=device, dtype=dtype,
            **kwargs)
        self.input_noise = float(input_noise)

    def _initialize_weights(self) -> None:
        super()._initialize_weights()
        init_convnn_weights(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def _stages(self) -> List[nn.Module]:
        """The features cut at the ends of stages: an in-place ReLU that starts a piece would overwrite its input."""
        starts = [0] + [end + 1 for end in self.feature_ends]
        return [self.features[i:j] for i, j in zip(starts, starts[1:] + [len(self.features)]) if i < j]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self._stages(), x)
        return self.features(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = add_input_noise(x, self.input_noise, self.training)
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Accept the state dict of this VGG and of the paper code's, whose classifier is a Sequential of Linear layers."""
    names = {'classifier.0.': 'pre_logits.fc1.', 'classifier.3.': 'pre_logits.fc2.', 'classifier.6.': 'head.fc.'}
    if 'classifier.0.weight' in state_dict:
        for old, new in names.items():
            state_dict = {name.replace(old, new): value for name, value in state_dict.items()}
        state_dict['pre_logits.fc1.weight'] = state_dict['pre_logits.fc1.weight'].unflatten(1, (-1, 7, 7))
        state_dict['pre_logits.fc2.weight'] = state_dict['pre_logits.fc2.weight'][..., None, None]
        state_dict = convert_original_state_dict(state_dict, model)
    check_fits(state_dict, model)
    check_channels(state_dict, model)
    return state_dict


def check_channels(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Refuse weights for another number of input channels where timm would adapt them wrongly.

    Raises:
        RuntimeError: The first layer shuffles pixels or sees coordinates.
    """
    own = {f'features.0.{name}': value.shape for name, value in model.features[0].state_dict().items()}
    if rearranges_channels(model.features[0]) and any(
            shape != state_dict[name].shape for name, shape in own.items() if name in state_dict):
        raise RuntimeError(
            'the first layer shuffles pixels or sees coordinates: its weights cannot be adapted to another number of '
            'input channels')


def _cfg(layer: str, base: Callable[..., Dict[str, Any]] = cifar_cfg, side: int = 1) -> Dict[str, Any]:
    return base(
        first_conv=first_modules(layer, 'features.0'), classifier='head.fc', pool_size=(side, side),
        min_input_size=(3, 32, 32))


default_cfgs = generate_default_cfgs(with_weights({
    'vgg11_conv2d.cifar10': _cfg('conv2d'),
    'vgg11_conv2d_new.cifar10': _cfg('conv2d_new'),
    'vgg11_convnn.cifar10': _cfg('convnn'),
    'vgg11_convnn_attn.cifar10': _cfg('convnn_attn'),
    'vgg11_convnn_branching.cifar10': _cfg('convnn_branching'),
    'vgg11_convnn_branching_attn.cifar10': _cfg('convnn_branching_attn'),
    'vgg13_conv2d.cifar10': _cfg('conv2d'),
    'vgg13_conv2d_new.cifar10': _cfg('conv2d_new'),
    'vgg13_convnn.cifar10': _cfg('convnn'),
    'vgg13_convnn_attn.cifar10': _cfg('convnn_attn'),
    'vgg13_convnn_branching.cifar10': _cfg('convnn_branching'),
    'vgg13_convnn_branching_attn.cifar10': _cfg('convnn_branching_attn'),
    'vgg16_conv2d.cifar10': _cfg('conv2d'),
    'vgg16_conv2d_new.cifar10': _cfg('conv2d_new'),
    'vgg16_convnn.cifar10': _cfg('convnn'),
    'vgg16_convnn_attn.cifar10': _cfg('convnn_attn'),
    'vgg16_convnn_branching.cifar10': _cfg('convnn_branching'),
    'vgg16_convnn_branching_attn.cifar10': _cfg('convnn_branching_attn'),
    'vgg19_conv2d.cifar10': _cfg('conv2d'),
    'vgg19_conv2d_new.cifar10': _cfg('conv2d_new'),
    'vgg19_convnn.cifar10': _cfg('convnn'),
    'vgg19_convnn_attn.cifar10': _cfg('convnn_attn'),
    'vgg19_convnn_branching.cifar10': _cfg('convnn_branching'),
    'vgg19_convnn_branching_attn.cifar10': _cfg('convnn_branching_attn'),
    'vgg11_convnn_branching_224': _cfg('convnn_branching', imagenet_cfg, 7),
}))


def _create_convnn_vgg(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args) -> ConvNNVGG:
    kwargs = dict(kwargs)
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3, 4, 5))
    return build_model(
        ConvNNVGG,
        variant,
        pretrained,
        model_args,
        kwargs,
        pretrained_filter_fn=checkpoint_filter_fn,
        model_cfg=cfgs[variant.partition('_')[0]],
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
    )


@register_model
def vgg11_conv2d(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_vgg('vgg11_conv2d', pretrained, kwargs)


@register_model
def vgg11_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: convolutions that can see coordinates."""
    return _create_convnn_vgg('vgg11_conv2d_new', pretrained, kwargs)


@register_model
def vgg11_convnn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: convolution over nearest neighbours."""
    return _create_convnn_vgg('vgg11_convnn', pretrained, kwargs)


@register_model
def vgg11_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: attention to nearest neighbours."""
    return _create_convnn_vgg('vgg11_convnn_attn', pretrained, kwargs)


@register_model
def vgg11_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: convolution and ConvNN, mixed."""
    return _create_convnn_vgg('vgg11_convnn_branching', pretrained, kwargs)


@register_model
def vgg11_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_vgg('vgg11_convnn_branching_attn', pretrained, kwargs)


@register_model
def vgg13_conv2d(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_vgg('vgg13_conv2d', pretrained, kwargs)


@register_model
def vgg13_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: convolutions that can see coordinates."""
    return _create_convnn_vgg('vgg13_conv2d_new', pretrained, kwargs)


@register_model
def vgg13_convnn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: convolution over nearest neighbours."""
    return _create_convnn_vgg('vgg13_convnn', pretrained, kwargs)


@register_model
def vgg13_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: attention to nearest neighbours."""
    return _create_convnn_vgg('vgg13_convnn_attn', pretrained, kwargs)


@register_model
def vgg13_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: convolution and ConvNN, mixed."""
    return _create_convnn_vgg('vgg13_convnn_branching', pretrained, kwargs)


@register_model
def vgg13_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-13 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_vgg('vgg13_convnn_branching_attn', pretrained, kwargs)


@register_model
def vgg16_conv2d(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_vgg('vgg16_conv2d', pretrained, kwargs)


@register_model
def vgg16_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: convolutions that can see coordinates."""
    return _create_convnn_vgg('vgg16_conv2d_new', pretrained, kwargs)


@register_model
def vgg16_convnn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: convolution over nearest neighbours."""
    return _create_convnn_vgg('vgg16_convnn', pretrained, kwargs)


@register_model
def vgg16_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: attention to nearest neighbours."""
    return _create_convnn_vgg('vgg16_convnn_attn', pretrained, kwargs)


@register_model
def vgg16_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: convolution and ConvNN, mixed."""
    return _create_convnn_vgg('vgg16_convnn_branching', pretrained, kwargs)


@register_model
def vgg16_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-16 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_vgg('vgg16_convnn_branching_attn', pretrained, kwargs)


@register_model
def vgg19_conv2d(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: convolutions, the twin of the ConvNN networks."""
    return _create_convnn_vgg('vgg19_conv2d', pretrained, kwargs)


@register_model
def vgg19_conv2d_new(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: convolutions that can see coordinates."""
    return _create_convnn_vgg('vgg19_conv2d_new', pretrained, kwargs)


@register_model
def vgg19_convnn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: convolution over nearest neighbours."""
    return _create_convnn_vgg('vgg19_convnn', pretrained, kwargs)


@register_model
def vgg19_convnn_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: attention to nearest neighbours."""
    return _create_convnn_vgg('vgg19_convnn_attn', pretrained, kwargs)


@register_model
def vgg19_convnn_branching(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: convolution and ConvNN, mixed."""
    return _create_convnn_vgg('vgg19_convnn_branching', pretrained, kwargs)


@register_model
def vgg19_convnn_branching_attn(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-19 for small images: convolution and ConvNN attention, mixed."""
    return _create_convnn_vgg('vgg19_convnn_branching_attn', pretrained, kwargs)


@register_model
def vgg11_convnn_branching_224(pretrained: bool = False, **kwargs) -> ConvNNVGG:
    """VGG-11 for 224x224 images: convolution and ConvNN, mixed, with a grid of 8x8 candidates."""
    # The first map has 50176 tokens, too many to compare each with all.
    return _create_convnn_vgg(
        'vgg11_convnn_branching_224', pretrained, kwargs, sampling_type='spatial', num_samples=8)
