"""Products of float32 matrices on a CPU, as 1x1 convolutions where these are faster.

torch multiplies matrices by MKL, which uses AVX-512 on Intel's processors only. oneDNN, which computes convolutions,
uses it on AMD's too and takes half the time there.
"""
import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from .._common import cpu_multiplies_full_float32

__all__ = ['columns_by_columns', 'convolutions_are_faster', 'convolves', 'rows_by_columns', 'rows_by_rows']

LEAST_PRODUCT = 2 ** 24  # multiplications that make up for a convolution's overhead
LEAST_ROWS = 512  # rows that make up for rearranging them for the gradient of a weight


def rows_by_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b.T of a (M, K) and b (N, K)."""
    if not convolves(a, a.numel() * len(b)):
        return a @ b.T
    return _as_matrix(F.conv2d(_as_pixels(a), b[:, :, None, None]))


def rows_by_columns(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of a (M, N) and b (N, K): the gradient of a convolution's input."""
    if not convolves(a, a.numel() * b.shape[1]):
        return a @ b
    return _as_matrix(F.conv_transpose2d(_as_pixels(a), b[:, :, None, None]))


def columns_by_columns(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a.T @ b of a (M, N) and b (M, K): the gradient of a convolution's weight."""
    if len(a) < LEAST_ROWS or not convolves(a, a.numel() * b.shape[1]):
        return a.T @ b
    weight = a.new_empty(a.shape[1], b.shape[1], 1, 1)  # only its shape is read
    _, gradient, _ = torch.ops.aten.convolution_backward(
        _as_pixels(a), _as_pixels(b), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    return gradient[:, :, 0, 0]


def convolves(matrix: torch.Tensor, multiplications: int) -> bool:
    """Whether a product of matrices like this one that takes so many multiplications is computed as a convolution."""
    return (
        matrix.dtype == torch.float32 and matrix.device.type == 'cpu' and multiplications >= LEAST_PRODUCT
        and convolutions_are_faster() and cpu_multiplies_full_float32())


def _as_pixels(rows: torch.Tensor) -> torch.Tensor:
    """(M, K) as a channels_last map of M pixels, (1, K, M, 1)."""
    return rows.reshape(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _as_matrix(pixels: torch.Tensor) -> torch.Tensor:
    """A channels_last map of M pixels, (1, K, M, 1), as (M, K)."""
    return pixels[0, :, :, 0].T


@lru_cache(maxsize=None)
def convolutions_are_faster() -> bool:
    """Whether this is a processor of AMD's with AVX-512, and torch one that multiplies matrices by MKL."""
    cpuinfo = Path('/proc/cpuinfo')
    maker = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return (
        'AuthenticAMD' in maker and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available())
