"""Fused kernels of the ops in Triton, with the signatures of `ops.eager`; imported when `ops.dispatch` chooses them.

State: correct in Triton's interpreter (`TRITON_INTERPRET=1`, on the CPU) and compiling for a GPU, but neither run nor
timed on one. Block sizes and configurations are guesses until then, and the path is off unless somebody asks for it.
"""
from contextlib import AbstractContextManager, nullcontext
from typing import List

import torch
import triton

from ..dispatch import interpreting

# The interpreter is slow, and small blocks let small tests reach every border.
INTERPRETED = interpreting()


def configs(*candidates: triton.Config) -> List[triton.Config]:
    """What the autotuner may choose from; in the interpreter one configuration, with the smallest blocks."""
    return [triton.Config({name: 16 for name in candidates[0].kwargs})] if INTERPRETED else list(candidates)


def first_if_deterministic(candidates: List[triton.Config], *args, **kwargs) -> List[triton.Config]:
    """For the autotuner: a tuned block size, and with it the order of a sum, may differ between processes."""
    return candidates[:1] if torch.are_deterministic_algorithms_enabled() else candidates


def block(size: int, largest: int) -> int:
    """A power of two that covers size, at least 16 (a matrix product's smallest side) and at most `largest`."""
    return min(16 if INTERPRETED else largest, max(16, triton.next_power_of_2(size)))


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
