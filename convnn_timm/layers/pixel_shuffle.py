"""Trade positions for channels: pixel (un)shuffle of sequences and images.

In 1-D each channel is cut into contiguous pieces, as in the paper's code. In 2-D they interleave, as in torch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .inputs import check_rank

__all__ = ['PixelShuffle1d', 'PixelUnshuffle1d', 'SHUFFLE_PATTERNS', 'shuffle', 'unshuffle']

# Which ends of a layer shuffle: none, before (input unshuffled), after (output shuffled), both.
SHUFFLE_PATTERNS = ('NA', 'B', 'A', 'BA')


class PixelShuffle1d(nn.Module):
    """Join every `upscale_factor` channels end to end: (B, C, T) -> (B, C / factor, T * factor). B may be left out.

    Raises ValueError in forward when C is not divisible by the factor.
    """

    def __init__(self, upscale_factor: int) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_rank(x, 1)
        C = x.shape[-2]
        if C % self.upscale_factor:
            raise ValueError(f'{C} channels are not divisible by the upscale factor {self.upscale_factor}')
        return x.reshape(list(x.shape[:-2]) + [C // self.upscale_factor, -1])

    def extra_repr(self) -> str:
        return f'upscale_factor={self.upscale_factor}'


class PixelUnshuffle1d(nn.Module):
    """Cut every channel into `downscale_factor` channels: (B, C, T) -> (B, C * factor, T / factor). B may be left out.

    Raises ValueError in forward when T is not divisible by the factor.
    """

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_rank(x, 1)
        C, T = x.shape[-2:]
        if T % self.downscale_factor:
            raise ValueError(f'{T} tokens are not divisible by the downscale factor {self.downscale_factor}')
        return x.reshape(list(x.shape[:-2]) + [C * self.downscale_factor, T // self.downscale_factor])

    def extra_repr(self) -> str:
        return f'downscale_factor={self.downscale_factor}'


def unshuffle(x: torch.Tensor, scale: int) -> torch.Tensor:
    """(B, C, T) or (B, C, H, W) with `scale ** axes` times the channels on 1 / scale of each axis."""
    if any(n % scale for n in x.shape[2:]):
        raise ValueError(f'map {tuple(x.shape[2:])} is not divisible by the shuffle scale {scale}')
    return F.pixel_unshuffle(x, scale) if x.ndim == 4 else PixelUnshuffle1d(scale)(x)


def shuffle(x: torch.Tensor, scale: int) -> torch.Tensor:
    """Inverse of `unshuffle`."""
    return F.pixel_shuffle(x, scale) if x.ndim == 4 else PixelShuffle1d(scale)(x)
