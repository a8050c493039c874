"""VGG with ConvNN layers in place of its 3x3 convolutions.

On timm's VGG (with BatchNorm), at 32x32 as in the paper. `vgg11_convnn_branching_224` is the same network for 224x224
images, with sampled candidates.

Paper: `Attention Via Convolutional Nearest Neighbors` - https://arxiv.org/abs/2511.14137
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vgg import VGG, cfgs

from convnn_timm.layers import LAYER_TYPES, convert_original_state_dict, create_layer
from convnn_timm.layers.factory import first_modules, rearranges_channels
from ._common import (
    add_input_noise, check_complete, check_known, cifar_cfg, entrypoint, imagenet_cfg, init_convnn_weights, sampled,
    split_layer_args)
from ._weights import published_cfg, tagged_names

__all__ = ['ConvNNVGG']


def _create_conv(
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int = 0,
        bias: bool = True,
        layer: str = 'convnn',
        layer_args: Optional[Dict[str, Any]] = None,
        **dd,
) -> nn.Module:
    """A convolution of the network: of the features (3x3) the layer in its place, of the classifier itself."""
    if kernel_size != 3:
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias, **dd)
    return create_layer(layer, in_channels, out_channels, **(layer_args or {}), **dd)


class ConvNNVGG(VGG):
    """VGG whose feature layers are `layer`."""

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
    check_complete(state_dict, model, classifier='head.fc')
    check_channels(state_dict, model)
    return state_dict


def check_channels(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Refuse first weights for another number of channels where timm would adapt them to these wrongly.

    Raises:
        RuntimeError: The first layer has them in another order, shuffled, or sees coordinates too.
    """
    own = {f'features.0.{name}': value.shape for name, value in model.features[0].state_dict().items()}
    if rearranges_channels(model.features[0]) and any(
            shape != state_dict[name].shape for name, shape in own.items() if name in state_dict):
        raise RuntimeError(
            'the first layer shuffles pixels or sees coordinates: its weights cannot be adapted to another number of '
            'input channels')


def _cfg(layer: str, base: Callable[..., Dict[str, Any]] = cifar_cfg, pool: int = 1, **kwargs) -> Dict[str, Any]:
    return base(
        first_conv=first_modules(layer, 'features.0'), classifier='head.fc', pool_size=(pool, pool),
        min_input_size=(3, 32, 32), **kwargs)


_VARIANTS = {f'{depth}_{layer}': (depth, layer) for depth in cfgs for layer in LAYER_TYPES}
_VARIANTS_224 = {'vgg11_convnn_branching_224': ('vgg11', 'convnn_branching')}

default_cfgs = generate_default_cfgs({
    **{name: _cfg(_VARIANTS[name.split('.')[0]][1], **published_cfg(name)) for name in tagged_names(_VARIANTS)},
    **{name: _cfg('convnn_branching', imagenet_cfg, pool=7, **published_cfg(name))
       for name in tagged_names(_VARIANTS_224, '')}})


def _create_convnn_vgg(variant: str, pretrained: bool = False, **kwargs) -> ConvNNVGG:
    large = variant in _VARIANTS_224
    depth, layer = (_VARIANTS_224 if large else _VARIANTS)[variant]
    layer_args, kwargs = split_layer_args(kwargs)
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3, 4, 5))
    return build_model_with_cfg(
        ConvNNVGG,
        variant,
        pretrained,
        model_cfg=cfgs[depth],
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        pretrained_filter_fn=checkpoint_filter_fn,
        layer=layer,
        layer_args=sampled(layer_args) if large else layer_args,
        **kwargs,
    )


# vgg11_conv2d, vgg11_conv2d_new, ... vgg19_convnn_branching_attn, then vgg11_convnn_branching_224
for _variant, (_depth, _layer) in {**_VARIANTS, **_VARIANTS_224}.items():
    register_model(entrypoint(
        _create_convnn_vgg, _variant, __name__,
        f'VGG-{_depth[3:]} with {LAYER_TYPES[_layer].__name__} layers, all layer arguments as keywords.'))
