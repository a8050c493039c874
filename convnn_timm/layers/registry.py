"""The layers that may stand in place of a convolution: one record each, which models, conversion and cards read."""
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Dict, Iterable, Iterator, Optional, Tuple, Type

import torch.nn as nn

from .attention import ConvNNAttention2d
from .base import check_choice
from .branching import Branching2d, BranchingAttention2d
from .convnn import ConvNN2d
from .coord_conv import CoordConv2d
from .from_conv import start_branching, start_convnn

__all__ = [
    'LAYER_TYPES', 'REGISTRY', 'LayerType', 'check_arguments', 'create_layer', 'create_layer_for', 'first_modules',
    'layer_arguments', 'layer_type', 'rearranges_channels', 'register_layer']

# What the network, not the user, decides.
_NETWORK_ARGUMENTS = {'in_channels', 'out_channels', 'stride', 'device', 'dtype'}


@dataclass(frozen=True)
class LayerType:
    """A layer that may stand in place of a convolution."""
    name: str  # ending of the names of models
    cls: Type[nn.Module]
    kind: str  # words of a model card, after "An image classifier for timm, "
    same_padding: bool = False  # it is built with the padding that keeps the map's size, whatever the user's `padding`
    first_convs: Tuple[str, ...] = ('',)  # its modules, '' for itself, that timm can adapt to other input channels
    start: Optional[Callable[[nn.Module, nn.Conv2d], None]] = None  # gives it the weights of a convolution

    @cached_property
    def arguments(self) -> Tuple[str, ...]:
        """Names of the arguments that a user may choose."""
        fixed = _NETWORK_ARGUMENTS | (set() if self.is_own else {'padding', 'padding_mode'})
        return tuple(name for name in inspect.signature(self.cls).parameters if name not in fixed)

    @property
    def is_own(self) -> bool:
        """Whether the layer is of this package, not torch's convolution."""
        return self.cls is not nn.Conv2d


class _Classes(Mapping):
    """The classes of the registered layers, by name."""

    def __getitem__(self, name: str) -> Type[nn.Module]:
        return REGISTRY[name].cls

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)


REGISTRY: Dict[str, LayerType] = {}
LAYER_TYPES: Mapping[str, Type[nn.Module]] = _Classes()


def register_layer(name: str, cls: Type[nn.Module], kind: str, **options) -> None:
    """Make a layer known to models, conversion and cards. The options are the fields of `LayerType`."""
    if name in REGISTRY:
        raise ValueError(f'there is a layer {name!r} already')
    REGISTRY[name] = LayerType(name, cls, kind, **options)


register_layer('conv2d', nn.Conv2d, 'with convolutions, the baseline of the ConvNN models', same_padding=True)
register_layer('conv2d_new', CoordConv2d, 'with convolutions that can see coordinates', same_padding=True)
register_layer(
    'convnn', ConvNN2d, 'whose layers convolve over the most similar positions of the map (ConvNN)', start=start_convnn)
register_layer(
    'convnn_attn', ConvNNAttention2d, 'whose layers attend to the most similar positions of the map (ConvNN attention)',
    first_convs=('w_v',))
register_layer(
    'convnn_branching', Branching2d,
    'whose layers join a convolution with one over the most similar positions of the map (ConvNN)',
    first_convs=('branch1', 'branch2'), start=start_branching)
register_layer(
    'convnn_branching_attn', BranchingAttention2d,
    'whose layers join a convolution with attention to the most similar positions (ConvNN)',
    first_convs=('branch1.w_v', 'branch2'))


def layer_type(name: str) -> LayerType:
    """The record of that name."""
    check_choice('layer', name, tuple(REGISTRY))
    return REGISTRY[name]


def layer_arguments(layer: Optional[str] = None) -> Tuple[str, ...]:
    """Names of the arguments that a layer type takes from the user, or those of all types."""
    if layer is not None:
        return layer_type(layer).arguments
    return tuple(dict.fromkeys(name for record in REGISTRY.values() for name in record.arguments))


def first_modules(layer: str, name: str) -> Tuple[str, ...]:
    """The modules, in a network's first layer of that name, whose weights timm adapts to other input channels.

    (Attention projects the input onto itself: such a layer cannot be adapted, and loading it for other channels is an
    error.)
    """
    return tuple(f'{name}.{part}'.rstrip('.') for part in layer_type(layer).first_convs)


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

    Every layer type accepts the arguments of all, so that a twin is built from the arguments of its pair: a convolution
    ignores K. Convolutions pad dilation * (kernel_size // 2); `padding` is ConvNN's.

    Raises:
        ValueError: An unknown layer, or a value that it refuses.
        TypeError: An argument that no layer has.
    """
    check_arguments(layer_args)
    record = layer_type(layer)
    layer_args = {k: v for k, v in dict(layer_args, kernel_size=kernel_size).items() if k in record.arguments}
    if record.same_padding:
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, so that the map keeps its size, got {kernel_size}')
        layer_args['padding'] = layer_args.get('dilation', 1) * (kernel_size // 2)
    return record.cls(in_channels, out_channels, stride=stride, **layer_args, device=device, dtype=dtype)


def create_layer_for(conv: nn.Conv2d, layer: str, device=None, dtype=None, **layer_args) -> nn.Module:
    """Create the layer that takes the place of a convolution.

    Its channels, stride, window, groups and bias are the convolution's, unless `layer_args` name others. A dilation
    among these multiplies the convolution's.
    """
    geometry = dict(kernel_size=conv.kernel_size[0], groups=conv.groups, bias=conv.bias is not None)
    dilation = conv.dilation[0] * layer_args.get('dilation', 1)
    return create_layer(
        layer, conv.in_channels, conv.out_channels, stride=conv.stride[0], device=device, dtype=dtype,
        **{**geometry, **layer_args, 'dilation': dilation})
