"""How a layer starts from the convolution whose place it takes: its window as neighbours, its weights as theirs."""
import math
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

__all__ = ['start_branching', 'start_convnn', 'window_arguments']


def window_arguments(conv: nn.Conv2d, by_location: bool) -> Dict[str, Any]:
    """As many neighbours, of a map padded as widely, as the window of a convolution needs."""
    side = conv.kernel_size[0]
    # The nearest places form a square of 3 or 5 at its side; a larger window's corners need a disc around it.
    radius = math.isqrt(2 * (side // 2) ** 2) if by_location else side // 2
    return dict(K=len(_disc(side)) if by_location else side ** 2, padding=conv.dilation[0] * radius)


@torch.no_grad()
def start_convnn(layer: nn.Module, conv: nn.Conv2d, outputs: Optional[torch.Tensor] = None) -> None:
    """Give a ConvNN2d the weights of a convolution, or those of some of its outputs."""
    outputs = _all_outputs(conv) if outputs is None else outputs
    weight = conv.weight[outputs]
    taps = _taps(conv.kernel_size[0], layer.K, layer.similarity_type == 'Loc')
    ranks = [rank for rank, tap in enumerate(taps) if tap is not None]
    layer.weight.zero_()  # of coordinates, and of ranks without a tap
    layer.weight[:, :weight.shape[1], ranks, 0] = weight.flatten(2)[:, :, [taps[rank] for rank in ranks]]
    if layer.bias is not None:
        layer.bias.copy_(conv.bias[outputs])


@torch.no_grad()
def start_branching(layer: nn.Module, conv: nn.Conv2d) -> None:
    """Divide the outputs of a convolution between the branches of a Branching2d.

    The neighbour branch takes the first outputs of each group; the 1x1 convolution puts them back in order.
    """
    outputs = _all_outputs(conv)
    share = (layer.branch1.out_channels if layer.branch1 is not None else 0) // conv.groups
    parts = [part.flatten() for part in outputs.view(conv.groups, -1).tensor_split([share], dim=1)]
    if layer.branch1 is not None:
        start_convnn(layer.branch1, conv, parts[0])
    if layer.branch2 is not None:
        layer.branch2.weight.copy_(conv.weight[parts[1]])
        if layer.branch2.bias is not None:
            layer.branch2.bias.copy_(conv.bias[parts[1]])
    if layer.pointwise_conv is not None:
        layer.pointwise_conv.weight.zero_()[torch.cat(parts), outputs] = 1
        if layer.pointwise_conv.bias is not None:
            layer.pointwise_conv.bias.zero_()


def _all_outputs(conv: nn.Conv2d) -> torch.Tensor:
    return torch.arange(conv.out_channels, device=conv.weight.device)


def _taps(side: int, K: int, by_location: bool) -> List[Optional[int]]:
    """Which tap of the window, in raster order, becomes the weight of each neighbour rank; None for none."""
    places = sorted((y * y + x * x, y, x) for y, x in _square(max(side, math.isqrt(K)) + 1))
    if by_location:  # the ranks are the K nearest places, in raster order
        places = sorted(places[:K], key=lambda place: place[1:])
    else:
        places = [place for place in places if max(abs(place[1]), abs(place[2])) <= side // 2]
    half = side // 2
    taps = [(y + half) * side + x + half if max(abs(y), abs(x)) <= half else None for _, y, x in places[:K]]
    return taps + [None] * (K - len(taps))


def _square(radius: int) -> List[Tuple[int, int]]:
    return [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]


def _disc(side: int) -> List[Tuple[int, int]]:
    """The places that are as near as the corners of a window."""
    corner = 2 * (side // 2) ** 2
    return [(y, x) for y, x in _square(math.isqrt(corner)) if y * y + x * x <= corner]
