"""Coordinate convolution: a convolution with ConvNN's coordinates and shuffles, for a fair comparison with ConvNN."""
import torch
import torch.nn as nn

from .base import AGGREGATION_TYPES, check_choice, check_groups, check_integer
from .coordinates import append_coordinates
from .pixel_shuffle import SHUFFLE_PATTERNS, shuffle, unshuffle
from .script import ScriptedWhole

__all__ = ['CoordConv2d']


class CoordConv2d(ScriptedWhole, nn.Conv2d):
    """Conv2d that can see coordinates, between optional pixel-(un)shuffles. With its defaults it is a Conv2d.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the window.
        stride: Step of the convolution.
        padding: Zeros around the map (and its coordinates).
        dilation: Distance of the window's positions.
        groups: Blocks of channels that are convolved separately.
        shuffle_pattern: Pixel-unshuffle the input ('B'), pixel-shuffle the output ('A'), both ('BA') or none ('NA').
        shuffle_scale: Factor of the shuffle.
        aggregation_type: 'Loc_Col' appends its coordinates to the input, in [-1, 1] per axis; 'Col' does not.
        bias: Learn a bias.

    Raises:
        ValueError: Unknown options; in forward a wrong rank or number of channels, or a map not divisible by the scale.
    """
    axes = 2

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int = 3,
            stride: int = 1,
            padding: int = 1,
            dilation: int = 1,
            groups: int = 1,
            shuffle_pattern: str = 'NA',
            shuffle_scale: int = 1,
            aggregation_type: str = 'Col',
            bias: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        check_choice('shuffle_pattern', shuffle_pattern, SHUFFLE_PATTERNS)
        check_choice('aggregation_type', aggregation_type, AGGREGATION_TYPES)
        scale = shuffle_scale if shuffle_pattern != 'NA' else 1
        check_integer('shuffle_scale', scale, 1)
        coordinates = 2 if aggregation_type == 'Loc_Col' else 0
        channels = in_channels * (scale ** 2 if 'B' in shuffle_pattern else 1) + coordinates
        convolved = out_channels * (scale ** 2 if shuffle_pattern in ('A', 'BA') else 1)
        check_groups(groups, channels, convolved, coordinates)
        super().__init__(
            channels, convolved, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
            bias=bias, device=device, dtype=dtype)
        self.in_channels = in_channels  # of the layer; the convolution sees coordinates and shuffled channels too
        self.out_channels = out_channels
        self.shuffle_pattern = shuffle_pattern
        self.shuffle_scale = scale
        self.aggregation_type = aggregation_type

    @torch.jit.unused
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        if self.shuffle_pattern in ('B', 'BA'):
            x = unshuffle(x, self.shuffle_scale)
        if self.aggregation_type == 'Loc_Col':
            x = append_coordinates(x)
        x = self._conv_forward(x, self.weight, self.bias)
        return shuffle(x, self.shuffle_scale) if self.shuffle_pattern in ('A', 'BA') else x

    def extra_repr(self) -> str:
        text = f'{super().extra_repr()}, aggregation_type={self.aggregation_type}'
        if self.shuffle_pattern != 'NA':
            text += f', shuffle_pattern={self.shuffle_pattern}, shuffle_scale={self.shuffle_scale}'
        return text
