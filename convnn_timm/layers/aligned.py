"""A layer with the outputs of a convolution that pads more or less than half its window."""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .script import record_call

__all__ = ['Aligned']


class Aligned(nn.Module):
    """A layer in place of a convolution that pads more or less than half its window.

    The layer's outputs are at the positions 0, stride, 2 stride, ... of its input. Zeros in front of the input shift
    them to the convolution's; outputs that the convolution does not have are cut off.
    """

    def __init__(
            self,
            layer: nn.Module,
            kernel_size: int,
            stride: int,
            dilation: int,
            padding: Optional[Tuple[int, int]],
    ) -> None:
        """
        Args:
            layer: The layer.
            kernel_size: Side of the convolution's window.
            stride: Its stride.
            dilation: Its dilation.
            padding: Zeros around its input, rows and columns. None for timm's 'same', which depends on the map.
        """
        super().__init__()
        self.layer = layer
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):
                return record_call(self, x)
        top, bottom, first_row, rows = self.align(x.shape[-2], 0)
        left, right, first_column, columns = self.align(x.shape[-1], 1)
        x = self.layer(F.pad(x, (left, right, top, bottom)))
        return x[..., first_row:first_row + rows, first_column:first_column + columns]

    def align(self, size: int, axis: int) -> Tuple[int, int, int, int]:
        """Zeros in front and behind, the first output to keep, and how many, of an axis."""
        window, reach = self.dilation * (self.kernel_size - 1) + 1, self.dilation * (self.kernel_size // 2)
        padding = self.padding
        if padding is None:
            total = max((-(-size // self.stride) - 1) * self.stride + window - size, 0)
            before = total // 2
        else:
            before = padding[axis]
            total = 2 * before
        kept = (size + total - window) // self.stride + 1
        if kept < 1:
            raise ValueError(f'the window of {window} does not fit into {size} positions with {total} of padding')
        front = before - reach if before > reach else (before - reach) % self.stride
        first = (front + reach - before) // self.stride
        return front, max((first + kept - 1) * self.stride + 1 - front - size, 0), first, kept

    def extra_repr(self) -> str:
        padding = "'same'" if self.padding is None else self.padding
        return f'kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, padding={padding}'
