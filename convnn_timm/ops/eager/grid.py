"""Neighbours by location: known from the grid, without a search."""
from typing import List, Optional, Tuple

import torch

from .._common import batch_chunks

__all__ = ['grid_neighbors']


def grid_neighbors(
        size: Tuple[int, ...],
        k: int,
        starts: Optional[Tuple[int, ...]] = None,
        stride: int = 1,
        stops: Optional[Tuple[int, ...]] = None,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """Select the k nearest positions of every `stride`-th position of a grid by euclidean distance, without a search.

    Distances are integers, so ties are exact and go to the lower index. Only a window that must hold the k nearest is
    looked at. Definition: the rows of `ops.reference.grid_neighbors` that the queries name.

    Args:
        size: Length of each axis of the grid, (T,) or (H, W).
        k: Number of neighbours, the position itself included.
        starts: First query on each axis (default: the first position).
        stride: Step between queries.
        stops: One past the last query on each axis (default: the end of the axis).

    Returns:
        (Q, k) int64 raster indices, ascending.

    Raises:
        ValueError: k outside [1, the number of positions].
    """
    if not 1 <= k <= torch.Size(size).numel():
        raise ValueError(f'k must lie in [1, {torch.Size(size).numel()}], the number of positions, but is {k}')
    radius = _covering_radius(size, k)
    axes, steps = [], []
    for n, start, stop in zip(size, starts or [0] * len(size), stops or size):
        axes.append(torch.arange(start, stop, stride, device=device))
        steps.append(torch.arange(-min(radius, n - 1), min(radius, n - 1) + 1, device=device))
    query, step = (torch.stack(torch.meshgrid(*a, indexing='ij'), -1).flatten(0, -2) for a in (axes, steps))
    limit = torch.tensor(size, device=device)
    # The window is in raster order, so (distance, place in the window) orders equal distances by index.
    key = step.square().sum(-1) * len(step) + torch.arange(len(step), device=device)
    nearest = []
    for _, q in batch_chunks(1, len(query), 4 * step.nbytes, device):
        position = query[q].unsqueeze(1) + step  # q, window, axes
        inside = ((position >= 0) & (position < limit)).all(-1)
        raster = position[..., 0]
        for axis in range(1, len(size)):
            raster = raster * size[axis] + position[..., axis]
        place = key.masked_fill(~inside, torch.iinfo(torch.int64).max).topk(k, largest=False).indices
        nearest.append(raster.gather(1, place).sort(dim=1).values)
    return torch.cat(nearest)


def _covering_radius(size: Tuple[int, ...], k: int) -> int:
    """Smallest radius around a corner of the grid, its worst place, that holds k positions."""
    radius = 0
    while True:
        counts: List[int] = [radius * radius]  # squared distance left after each axis
        for n in size:
            counts = [left - d * d for left in counts for d in range(min(n - 1, radius) + 1) if d * d <= left]
        if len(counts) >= k:
            return radius
        radius += 1
