"""Which positions of a padded map ask (queries) and which may be chosen (candidates): raster indices, ascending.

Everything here depends on shapes only, never on values. `size` is the unpadded map, (T,) or (H, W).
"""
from typing import Optional, Tuple

import torch

__all__ = ['SAMPLING_TYPES', 'candidate_positions', 'inner_positions', 'unpadded_positions']

SAMPLING_TYPES = ('all', 'random', 'spatial')


def inner_positions(
        size: Tuple[int, ...],
        padding: int,
        stride: int = 1,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """Raster indices, in the padded map, of the unpadded positions 0, stride, 2 stride, ... of each axis."""
    return _raster(size, padding, [torch.arange(0, n, stride, device=device) for n in size])


def unpadded_positions(
        positions: torch.Tensor,
        size: Tuple[int, ...],
        padding: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Raster indices, in the unpadded map, of positions (M,) of the padded one, and whether they lie in it."""
    place, inside, pitch = 0, True, 1
    for n in reversed(size):
        step = positions % (n + 2 * padding) - padding
        inside = (step >= 0) & (step < n) & inside
        place = place + step * pitch
        positions, pitch = positions // (n + 2 * padding), pitch * n
    return torch.where(inside, place, 0), inside


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
    """Raster indices, in the padded map, of the tokens that may become neighbours.

    Args:
        k: How many neighbours will be selected.
        sampling_type: 'all'; 'random': `num_samples` tokens of the padded map, drawn from torch's generator in training
            and the same pseudo-random ones in every evaluation; 'spatial': a regular grid of `num_samples` positions per
            axis, from `sample_padding` to the far side less `sample_padding`: of the unpadded map's in 2-D, of the
            padded signal's in 1-D (as in the paper's code). A number that exceeds the map selects 'all'.
        equal_padding: Padded tokens are all alike to the similarity. Then only the first k of them can ever be selected
            (equal scores go to the lower index), and `all` leaves out the others.

    Raises:
        ValueError: The grid has fewer than k positions.
    """
    tokens = torch.Size(n + 2 * padding for n in size).numel()
    if sampling_type == 'random' and num_samples <= tokens:
        order = torch.randperm(tokens, device=device) if training else _scrambled(tokens, device).argsort()
        return order[:num_samples].sort().values
    if sampling_type == 'spatial' and num_samples <= max(size):
        return _grid(size, padding, k, num_samples, sample_padding, device)
    if not (padding and equal_padding):
        return torch.arange(tokens, device=device)
    return _without_equal_padding(size, padding, k, device)


def _without_equal_padding(
        size: Tuple[int, ...],
        padding: int,
        k: int,
        device: Optional[torch.device],
) -> torch.Tensor:
    """The inner positions and the first k of the padding, ascending."""
    row = size[-1] + 2 * padding
    first = padding * row + padding if len(size) == 2 else padding  # of the inner positions
    if k <= first:  # as on all but the smallest maps
        return torch.cat([torch.arange(k, device=device), inner_positions(size, padding, device=device)])
    positions, padded = [], 0
    for t in range(torch.Size(n + 2 * padding for n in size).numel()):
        place = divmod(t, row) if len(size) == 2 else (t,)
        inside = all(padding <= i < padding + n for i, n in zip(place, size))
        padded += not inside
        if inside or padded <= k:
            positions.append(t)
    return torch.tensor(positions, device=device)


def _grid(
        size: Tuple[int, ...],
        padding: int,
        k: int,
        num_samples: int,
        sample_padding: int,
        device: Optional[torch.device],
) -> torch.Tensor:
    if len(size) == 1:
        size, padding = (size[0] + 2 * padding,), 0
    axes = []
    for n in size:
        first, last = sample_padding, n - 1 - sample_padding
        count = min(num_samples, last - first + 1)
        axes.append([first + i * (last - first) // max(count - 1, 1) for i in range(count)])
    found = torch.Size(len(axis) for axis in axes).numel()
    if found < k:
        raise ValueError(
            f'the sampling grid has {found} positions on a map of {" x ".join(map(str, size))}, but {k} neighbours are '
            f'to be selected: raise num_samples={num_samples}, or lower sample_padding={sample_padding} or K')
    return _raster(size, padding, [torch.tensor(axis, device=device) for axis in axes])


def _raster(size: Tuple[int, ...], padding: int, axes: list) -> torch.Tensor:
    """Raster indices in the padded map of the positions that `axes` span in the unpadded one."""
    index = torch.zeros((), dtype=torch.int64, device=axes[0].device)
    for n, axis in zip(size, axes):
        index = index.unsqueeze(-1) * (n + 2 * padding) + axis + padding
    return index.flatten()


def _scrambled(n: int, device: Optional[torch.device]) -> torch.Tensor:
    """n distinct pseudo-random integers, the same ones always (a 32-bit integer hash, which is one to one)."""
    x = torch.arange(1, n + 1, device=device)
    for multiplier, shift in ((0x9E3779B1, 15), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x = (x * multiplier) & 0xFFFFFFFF
        x = x ^ (x >> shift)
    return x
