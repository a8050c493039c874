"""Check the shape of a layer's input, which may be a batch or a single map, as of torch's convolutions."""
from typing import Callable

import torch

__all__ = ['check_input', 'check_rank', 'on_batch']


def check_rank(x: torch.Tensor, axes: int) -> None:
    if x.ndim not in (axes + 1, axes + 2):
        size = {1: 'T', 2: 'H, W'}[axes]
        raise ValueError(f'expected an input (B, C, {size}) or (C, {size}), got {tuple(x.shape)}')


def check_input(x: torch.Tensor, axes: int, channels: int) -> None:
    check_rank(x, axes)
    if x.shape[-1 - axes] != channels:
        raise ValueError(f'expected {channels} input channels, got {x.shape[-1 - axes]} in {tuple(x.shape)}')


def on_batch(
        compute: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        axes: int,
        channels: int,
) -> torch.Tensor:
    """Check an input and compute its output. `compute` takes batches only: a single map becomes a batch of one."""
    check_input(x, axes, channels)
    return compute(x) if x.ndim == axes + 2 else compute(x.unsqueeze(0)).squeeze(0)
