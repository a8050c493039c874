"""Train on a CPU with 3x3 convolutions by Winograd's algorithm: a quarter of the multiplications, the same network.

    python train_scripts/winograd.py -c cifar10 --no-amp ...        # the arguments of `convnn-timm train`

For float32 on CPUs that have no bfloat16. Results differ from those of torch's convolutions by rounding, less than 1e-5 of
a map's largest value. To keep freed memory rather than return it to the system saves more time:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 OMP_WAIT_POLICY=active python train_scripts/winograd.py ...

Needs a C++ compiler (g++ or clang++ with OpenMP). Source: Lavin and Gray, arXiv:1509.09308.
"""
import ctypes
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import torch
from torch import nn

P, Q = 5 / 8, 3 / 2  # half as much is rounded off as with the usual 1 and 2
POINTS = 0, P, -P, Q, -Q
G = torch.tensor([
    [power / math.prod(point - other for other in POINTS if other != point) for power in (1, point, point ** 2)]
    for point in POINTS] + [[0, 0, 1]])
WEIGHTS = torch.kron(G, G)  # (36, 9): from the 3x3 of a weight to its planes
CHUNK = 2_400_000  # numbers in the planes that are in use at once: they stay in the processor's cache
buffers: Dict[str, torch.Tensor] = {}


def compile_transforms() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, ('c++', 'g++', 'clang++'))), None)
    if compiler is None:
        sys.exit('error: winograd.py needs a C++ compiler; without one use convnn-timm train')
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / 'winograd.so'
        flags = '-O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math -fopenmp -shared -fPIC'
        flags += f' -DP={P} -DQ={Q}'
        subprocess.run(
            [compiler, *flags.split(), str(Path(__file__).with_suffix('.cpp')), '-o', str(library)], check=True)
        return ctypes.CDLL(str(library))


class Planes:
    """The transformed form (36, tiles + 1, C) of images of a channels-last map (B, C, H, W), in a buffer used again.

    The last row is zero. It keeps the planes from lying a power of two apart, of which a cache would hold few.
    """
    library: Optional[ctypes.CDLL] = None

    def __init__(self, images: torch.Tensor, buffer: str):
        self.images = images
        channels, tiles = images.shape[1], len(images) * count_tiles(images)
        size = 36 * (tiles + 1) * channels
        if buffer not in buffers or len(buffers[buffer]) < size:
            buffers[buffer] = torch.empty(size)
        self.values = buffers[buffer][:size].view(36, tiles + 1, channels)
        self.values[:, tiles] = 0

    def transform(self, name: str) -> torch.Tensor:
        """From images to planes (`input`, `gradient`) or back (`output`)."""
        channels, height, width = self.images.shape[1:]
        sizes = (len(self.images), height, width, channels, self.values.stride(0))
        getattr(self.library, name)(
            *map(ctypes.c_void_p, (self.images.data_ptr(), self.values.data_ptr())), *map(ctypes.c_int64, sizes))
        return self.values


def count_tiles(x: torch.Tensor) -> int:
    return -(-x.shape[-2] // 4) * -(-x.shape[-1] // 4)


def chunks(x: torch.Tensor, y: torch.Tensor) -> Iterator[Tuple[Planes, Planes]]:
    """Both maps' planes, for as many images at a time as fit CHUNK."""
    size = max(1, CHUNK // (36 * count_tiles(x) * max(x.shape[1], y.shape[1])))
    for images, others in zip(x.split(size), y.split(size)):
        yield Planes(images, 'x'), Planes(others, 'y')


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (batch, inputs, height, width), outputs = x.shape, len(weight)
    y = x.new_empty((batch, height, width, outputs)).permute(0, 3, 1, 2)
    planes = (WEIGHTS @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)
    for before, after in chunks(x, y):
        torch.bmm(before.transform('input'), planes, out=after.values)
        after.transform('output')
    return y


class Convolution(torch.autograd.Function):
    """Of x (B, C, H, W) with weight (O, C, 3, 3), stride 1, padding 1: float32 on the CPU, C and O multiples of 8."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        outputs, inputs = weight.shape[:2]
        of_x = convolve(gradient, weight.flip(2, 3).transpose(0, 1)) if ctx.needs_input_grad[0] else None
        planes = x.new_zeros(36, inputs, outputs)
        for before, after in chunks(x, gradient):
            planes.baddbmm_(before.transform('input').mT, after.transform('gradient'))
        of_weight = (WEIGHTS.T @ planes.view(36, -1)).view(3, 3, inputs, outputs).permute(3, 2, 0, 1)
        return of_x, of_weight


def fits(layer: nn.Conv2d, x: torch.Tensor, bias: Optional[torch.Tensor]) -> bool:
    return (
        x.device.type == 'cpu' and x.dtype == torch.float32 and bias is None and not torch.is_autocast_enabled('cpu')
        and len(x) >= 16  # fewer do not repay the transform of the weights
        and layer.kernel_size == (3, 3) and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1 and layer.padding_mode == 'zeros'
        and layer.in_channels % 8 == layer.out_channels % 8 == 0)


def use_winograd() -> None:
    """From now on, every nn.Conv2d that can does."""
    direct = nn.Conv2d._conv_forward

    def forward(self, x, weight, bias):
        return Convolution.apply(x, weight) if fits(self, x, bias) else direct(self, x, weight, bias)

    Planes.library = compile_transforms()
    nn.Conv2d._conv_forward = forward


if __name__ == '__main__':
    from convnn_timm.train import main

    use_winograd()
    main(command='python train_scripts/winograd.py')
