"""Branching: a convolution and ConvNN side by side, mixed by a 1x1 convolution if wanted."""
import inspect
import warnings
from typing import Type

import torch
import torch.nn as nn

from .attention import ConvNNAttention1d, ConvNNAttention2d
from .base import NeighborLayer, check_integer, check_number
from .convnn import ConvNN1d, ConvNN2d
from .inputs import check_input

__all__ = ['Branching1d', 'Branching2d', 'BranchingAttention1d', 'BranchingAttention2d']


class _Branching(nn.Module):
    """A convolution and a layer of `neighbor_layer` side by side. The public classes below have its documentation."""
    neighbor_layer: Type[NeighborLayer]

    def __init_subclass__(cls) -> None:
        """Let `inspect.signature` show the neighbour layer's arguments too."""
        super().__init_subclass__()
        own = dict(inspect.signature(cls.__init__).parameters)
        if own.pop('neighbor_args', None):
            theirs = inspect.signature(cls.neighbor_layer).parameters.items()
            own |= {name: p.replace(kind=p.KEYWORD_ONLY) for name, p in theirs if name not in own}
        cls.__signature__ = inspect.Signature(list(own.values())[1:])  # without self

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int = 3,
            *,
            stride: int = 1,
            branch_ratio: float = 0.5,
            branch_mix: bool = True,
            bias: bool = True,
            device=None,
            dtype=None,
            **neighbor_args,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_integer('in_channels', in_channels, 1)
        check_integer('out_channels', out_channels, 1)
        check_number('branch_ratio', branch_ratio, 0, 1)
        check_integer('kernel_size', kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, so that both branches keep the size, got {kernel_size}')
        neighbor_channels = int(out_channels * branch_ratio)
        if branch_ratio and not neighbor_channels:
            warnings.warn(f'branch_ratio={branch_ratio} of {out_channels} channels leaves none to the neighbours')
        conv_channels = out_channels - neighbor_channels
        dilation, groups = (neighbor_args.get(name, 1) for name in ('dilation', 'groups'))  # attention has neither
        if groups > 1 and (neighbor_channels % groups or conv_channels % groups):
            raise ValueError(
                f'groups={groups} must divide the outputs of both branches, but branch_ratio={branch_ratio} gives '
                f'{neighbor_channels} to the neighbours and {conv_channels} to the convolution')
        self.branch1 = self.branch2 = None
        if neighbor_channels:
            neighbors = self.branch1 = self.neighbor_layer(
                in_channels, neighbor_channels, stride=stride, bias=bias, **neighbor_args, **dd)
        else:  # only to check the arguments
            neighbors = self.neighbor_layer(in_channels, max(groups, 1), stride=stride, **neighbor_args, device='meta')
        if neighbors.shuffle_pattern in ('A', 'B') and neighbors.shuffle_scale > 1:
            raise ValueError(
                f"shuffle_pattern={neighbors.shuffle_pattern!r} changes the size of one branch only: use 'BA' or 'NA'")
        axes = neighbors.axes
        conv = nn.Conv2d if axes == 2 else nn.Conv1d
        if conv_channels:
            self.branch2 = conv(
                in_channels, conv_channels, kernel_size, stride=stride, padding=dilation * (kernel_size // 2),
                dilation=dilation, groups=groups, bias=bias, **dd)
        self.pointwise_conv = conv(out_channels, out_channels, 1, bias=bias, **dd) if branch_mix else None
        self.axes = axes
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.shuffle_scale = neighbors.shuffle_scale
        self.branch_ratio = branch_ratio

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in list(self.modules())[1:]:
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):  # torch.fx records; there is no shape to check
                return self.compute(x)
            check_input(x, self.axes, self.in_channels)
        return self.compute(x) if x.dim() == self.axes + 2 else self.compute(x.unsqueeze(0)).squeeze(0)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The output of a batch."""
        if self.branch1 is None:
            x = self.branch2(x)
        elif self.branch2 is None:
            x = self.branch1(x)
        else:
            x1, x2 = self.branch1(x), self.branch2(x)
            if not torch.jit.is_scripting():
                if not isinstance(x, torch.fx.Proxy) and x1.shape[2:] != x2.shape[2:]:
                    raise ValueError(
                        f'map {tuple(x.shape[2:])} must be divisible by the shuffle scale times the stride '
                        f'({self.shuffle_scale} x {self.stride}), so that both branches give the same size')
            x = torch.cat([x1, x2], dim=-1 - self.axes)  # counted from the end: torch.fx's graph takes a single map too
        return x if self.pointwise_conv is None else self.pointwise_conv(x)

    def neighbors(self, x: torch.Tensor) -> torch.Tensor:
        """The neighbours that `branch1` chooses."""
        if self.branch1 is None:
            raise ValueError(
                f'branch_ratio={self.branch_ratio} of {self.out_channels} channels leaves none to the neighbours')
        return self.branch1.neighbors(x)

    def extra_repr(self) -> str:
        return f'branch_ratio={self.branch_ratio}' + (', branch_mix=False' if self.pointwise_conv is None else '')


_DOC = """Hybrid of a convolution and {layer} for {input}, mixed by a 1x1 convolution.

    Both branches see the whole input: `int(out_channels * branch_ratio)` outputs come from {layer} (`branch1`), the
    rest from a kernel_size convolution that keeps the size of the map (`branch2`), in that order.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the convolution's window.
        stride: Stride of both branches.
        branch_ratio: Share of the outputs that come from {layer}, in [0, 1].
        branch_mix: Mix both branches' outputs by the 1x1 convolution. If not, they stand side by side, for the next
            layer to mix. (Always in the paper.)
        bias: Learn biases in both branches and the 1x1 convolution.
        **neighbor_args: Arguments of {layer}. Its dilation and groups, where it has them, are the convolution's too.

    Raises:
        ValueError: As {layer} does, and for an even kernel_size, a ratio outside [0, 1], a shuffle of one end only.
    """


class Branching1d(_Branching):
    __doc__ = _DOC.format(layer='ConvNN1d', input='sequences (B, C, T)')
    neighbor_layer = ConvNN1d


class Branching2d(_Branching):
    __doc__ = _DOC.format(layer='ConvNN2d', input='images (B, C, H, W)')
    neighbor_layer = ConvNN2d


class BranchingAttention1d(_Branching):
    __doc__ = _DOC.format(layer='ConvNNAttention1d', input='sequences (B, C, T)')
    neighbor_layer = ConvNNAttention1d


class BranchingAttention2d(_Branching):
    __doc__ = _DOC.format(layer='ConvNNAttention2d', input='images (B, C, H, W)')
    neighbor_layer = ConvNNAttention2d
