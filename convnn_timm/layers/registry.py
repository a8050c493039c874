"""Create the layer that a model's name asks for."""
import inspect
from functools import lru_cache
from typing import Iterable, Optional, Tuple

import torch.nn as nn

from .attention import ConvNNAttention2d
from .base import check_choice
from .branching import Branching2d, BranchingAttention2d
from .convnn import ConvNN2d
from .coord_conv import CoordConv2d

__all__ = [
    'LAYER_TYPES', 'check_arguments', 'create_layer', 'first_modules', 'layer_arguments', 'rearranges_channels']

# Suffix of a model's name -> the layer in place of its 3x3 convolutions.
LAYER_TYPES = {
    'conv2d': nn.Conv2d,
    'conv2d_new': CoordConv2d,
    'convnn': ConvNN2d,
    'convnn_attn': ConvNNAttention2d,
    'convnn_branching': Branching2d,
    'convnn_branching_attn': BranchingAttention2d,
}
# What the network, not the user, decides.
_NETWORK_ARGUMENTS = ('in_channels', 'out_channels', 'stride', 'device', 'dtype')


@lru_cache(maxsize=None)
def layer_arguments(layer: Optional[str] = None) -> Tuple[str, ...]:
    """Names of the layer arguments that a model takes as keywords, or those of one layer type."""
    if layer is not None:
        check_choice('layer', layer, tuple(LAYER_TYPES))
    if layer == 'conv2d':
        return 'kernel_size', 'dilation', 'groups', 'bias'
    if layer is not None:
        return tuple(n for n in inspect.signature(LAYER_TYPES[layer]).parameters if n not in _NETWORK_ARGUMENTS)
    return tuple(dict.fromkeys(name for layer in LAYER_TYPES for name in layer_arguments(layer)))


def first_modules(layer: str, name: str) -> Tuple[str, ...]:
    """The modules, in a network's first layer of that name, whose weights timm adapts to other input channels.

    (Attention projects the input onto itself: such a layer cannot be adapted, and loading it for other channels is an
    error.)
    """
    return {
        'convnn_attn': (f'{name}.w_v',),
        'convnn_branching': (f'{name}.branch1', f'{name}.branch2'),
        'convnn_branching_attn': (f'{name}.branch1.w_v', f'{name}.branch2'),
    }.get(layer, (name,))


def rearranges_channels(layer: nn.Module) -> bool:
    """Whether a first layer shuffles pixels or sees coordinates, so that timm would adapt its weights wrongly."""
    return any(
        getattr(m, 'shuffle_pattern', 'NA') in ('B', 'BA') or getattr(m, 'aggregation_type', 'Col') != 'Col'
        for m in layer.modules())


def check_arguments(names: Iterable[str]) -> None:
    """Refuse arguments that no layer has."""
    if unknown := sorted(set(names) - set(layer_arguments())):
        raise TypeError(f'unknown argument {", ".join(unknown)}; layer arguments are {", ".join(layer_arguments())}')


def create_layer(
        layer: str,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        kernel_size: int = 3,
        device=None,
        dtype=None,
        **layer_args,
) -> nn.Module:
    """Create a layer that takes the place of a square convolution.

    All layer types accept the arguments of all, so that a twin is built from the arguments of its pair: a convolution
    ignores K. Convolutions pad dilation * (kernel_size // 2); `padding` is ConvNN's.

    Raises:
        ValueError: An unknown layer, or a value that it refuses.
        TypeError: An argument that no layer has.
    """
    check_arguments(layer_args)
    layer_args = {name: value for name, value in layer_args.items() if name in layer_arguments(layer)}
    if layer in ('conv2d', 'conv2d_new'):
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, so that the map keeps its size, got {kernel_size}')
        layer_args['padding'] = layer_args.get('dilation', 1) * (kernel_size // 2)
    if 'kernel_size' in layer_arguments(layer):
        layer_args['kernel_size'] = kernel_size
    return LAYER_TYPES[layer](in_channels, out_channels, stride=stride, **layer_args, device=device, dtype=dtype)
