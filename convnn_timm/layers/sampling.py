"""Positions of a padded map: those that ask (queries) and those that may be chosen (candidates).

A position is a raster index; all are ascending. They depend on shapes only, never on values. `size` is the map without
its padding, (T,) or (H, W).
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'SAMPLING_TYPES', 'candidate_positions', 'ceil_div', 'inner_positions', 'padded', 'raster', 'unpadded_positions',
]

SAMPLING_TYPES = ('all', 'random', 'spatial')


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0. (ONNX rounds the usual -(-a // b) towards 0 when a is a traced size.)"""
    return (a + b - 1) // b


def padded(size: Sequence[int], padding: int) -> torch.Size:
    """The size with its padding."""
    return torch.Size([n + 2 * padding for n in size])


def raster(size: Sequence[int], device: Optional[torch.device] = None) -> torch.Tensor:
    """A map of that size whose values are its raster indices."""
    return torch.arange(torch.Size(size).numel(), device=device).view(*size)


def inner_positions(
        size: Tuple[int, ...],
        padding: int,
        stride: int = 1,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """The positions 0, stride, 2 stride, ... of each axis of the unpadded map."""
    inner = tuple(slice(padding, padding + n, stride) for n in size)
    return raster(padded(size, padding), device)[inner].flatten()


def unpadded_positions(
        positions: torch.Tensor,
        size: Tuple[int, ...],
        padding: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Raster indices, in the unpadded map, of positions (M,) of the padded one, and whether they lie in it."""
    places = F.pad(raster(size, positions.device), [padding] * (2 * len(size)), value=-1).flatten()[positions]
    return places.clamp_min(0), places >= 0


def candidate_positions(
        size: Tuple[int, ...],
        padding: int,
        k: int,
        sampling_type: str,
        num_samples: int,
        sample_padding: int,
        equal_padding: bool,
        training: bool,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """The positions that may become neighbours.

    Args:
        size: The unpadded map.
        padding: Zeros around it.
        k: How many neighbours will be selected.
        sampling_type: 'all'; 'random': `num_samples` positions, drawn from torch's generator in training and one
            pseudo-random draw in every evaluation; 'spatial': a regular grid of `num_samples` positions per axis, from
            `sample_padding` to the far side less `sample_padding`: of the unpadded map in 2-D, of the padded signal in
            1-D (as in the paper's code). A number that exceeds the map selects 'all'.
        equal_padding: Padded tokens are all alike to the similarity. Then only the first k of them can ever be selected
            (equal scores go to the lower index), and 'all' leaves out the others.

    Raises:
        ValueError: The grid has fewer than k positions.
    """
    tokens = padded(size, padding).numel()
    if sampling_type == 'random' and num_samples <= tokens:
        order = torch.randperm(tokens, device=device) if training else _scrambled(tokens, device).argsort()
        return order[:num_samples].sort().values
    if sampling_type == 'spatial' and num_samples <= max(size):
        return _grid(size, padding, k, num_samples, sample_padding, device)
    if equal_padding and padding:
        return _without_equal_padding(size, padding, k, device)
    return torch.arange(tokens, device=device)


def _without_equal_padding(
        size: Tuple[int, ...],
        padding: int,
        k: int,
        device: Optional[torch.device],
) -> torch.Tensor:
    """The inner positions and the first k of the padding.

    The padding lies before the first inner row, in equal gaps between the rows, and after the last.
    """
    inner = inner_positions(size, padding, device=device)
    rows, width = size if len(size) == 2 else (1, size[0])
    gap = 2 * padding
    before = padding * (width + gap) + padding if len(size) == 2 else padding
    if k <= before:  # on all but the smallest maps
        return torch.cat([torch.arange(k, device=device), inner])
    pad = torch.arange(min(k, padded(size, padding).numel() - rows * width), device=device)
    gaps_passed = ((pad - before) // gap).clamp(0, rows - 1)
    pad = torch.where(pad < before, pad, pad + width * (gaps_passed + 1))
    return torch.cat([pad, inner]).sort().values


def _grid(
        size: Tuple[int, ...],
        padding: int,
        k: int,
        num_samples: int,
        sample_padding: int,
        device: Optional[torch.device],
) -> torch.Tensor:
    spanned, start = (size, padding) if len(size) == 2 else (padded(size, padding), 0)
    axes = []
    for n in spanned:
        first, last = sample_padding, n - 1 - sample_padding
        count = max(0, min(num_samples, last - first + 1))
        axes.append(start + first + torch.arange(count, device=device) * (last - first) // max(count - 1, 1))
    found = torch.Size(len(axis) for axis in axes).numel()
    if found < k:
        raise ValueError(
            f'the sampling grid has {found} positions on a map of {" x ".join(map(str, spanned))}, but {k} neighbours '
            f'are to be selected: raise num_samples={num_samples}, or lower sample_padding={sample_padding} or K')
    return raster(padded(size, padding), device)[torch.meshgrid(*axes, indexing='ij')].flatten()


def _scrambled(n: int, device: Optional[torch.device]) -> torch.Tensor:
    """n distinct pseudo-random integers, always the same ones: a 32-bit integer hash, which is one to one."""
    x = torch.arange(1, n + 1, device=device)
    for multiplier, shift in ((0x9E3779B1, 15), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x = (x * multiplier) & 0xFFFFFFFF
        x = x ^ (x >> shift)
    return x
