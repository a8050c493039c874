"""Coordinates of the positions of a map, as extra channels and as similarity features: x first, then y."""
from typing import Optional, Tuple

import torch

__all__ = ['append_coordinates', 'centered_positions', 'similarity_coordinates']


def append_coordinates(x: torch.Tensor) -> torch.Tensor:
    """Append one channel per axis that runs from -1 to 1 along it: (B, C, *size) -> (B, C + axes, *size).

    They are computed in float32 and rounded to x's dtype, as in the paper's code.
    """
    axes = [torch.linspace(-1, 1, n, device=x.device, dtype=torch.float32) for n in x.shape[2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1]).to(x.dtype)
    return torch.cat([x, grid.expand(x.shape[0], *grid.shape)], dim=1)


def centered_positions(size: Tuple[int, ...], device: Optional[torch.device] = None) -> torch.Tensor:
    """Integer coordinates of pitch 2 around the map's centre, (axes, *size) in float64. Their distances are exact."""
    axes = [torch.arange(1 - n, n, 2, device=device, dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1])


def similarity_coordinates(size: Tuple[int, ...], device: Optional[torch.device] = None) -> torch.Tensor:
    """Coordinates in [-1, 1] of the longer side, one pitch on all axes and centred: (axes, *size) in float32.

    With them the nearest positions form a window on any map. On square maps they are bitwise those of the paper's code.
    """
    longer = max(max(size) - 1, 1)
    axes = [torch.linspace(-(n - 1) / longer, (n - 1) / longer, n, device=device, dtype=torch.float32) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1])
