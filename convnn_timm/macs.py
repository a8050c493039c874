"""Size and cost of a model: parameters, and multiply-accumulates counted operator by operator."""
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, Tuple

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import convnn_timm.ops  # noqa: F401, registers its operators' formulas

__all__ = ['count_macs', 'count_parameters', 'evaluation_mode', 'fvcore_handles']


def count_parameters(model: nn.Module) -> int:
    """Count the elements of a model's parameters, trained or frozen. Buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: Tuple[int, int, int] = (3, 32, 32)) -> int:
    """Count the multiply-accumulates of one image's forward pass in evaluation mode.

    Convolutions, matrix products and this package's operators count. Normalization, activations and pooling do not, nor
    what a layer computes once for all images, such as neighbours by location. The model may be on the meta device.

    Args:
        model: Any model for images; its training mode is left as it was.
        input_size: Channels, height and width of the image.

    Returns:
        Multiply-accumulates; a FLOP count is twice that.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator is not counted, nor is fused attention by torch 2.14
    try:
        with torch.no_grad(), evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
            model(image)
            with FlopCounterMode(display=False) as counter:
                model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def fvcore_handles() -> Dict[str, Callable]:
    """Functions that count this package's operators for fvcore, by operator; fvcore takes unknown ones for free.

    `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())` counts multiply-accumulates, as fvcore does.
    """
    def counter(op: torch._ops.OpOverloadPacket) -> Callable:
        def count(inputs, outputs) -> int:
            shapes = [value.type().sizes() if value.isCompleteTensor() else None for value in inputs]
            return flop_registry[op](*shapes) // 2
        return count

    ops = torch.ops.convnn_timm.knn, torch.ops.convnn_timm.neighbor_conv
    return {f'convnn_timm::{op.__name__}': counter(op) for op in ops}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
