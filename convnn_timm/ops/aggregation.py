"""Aggregate over neighbours: a convolution whose window is an index, one weight matrix per neighbour rank.

Checks, operators, derivatives, shapes and costs. `eager` and `triton` hold the algorithms.
"""
from typing import Optional, Tuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import reference
from ._common import cast_under_autocast, differentiable, no_autocast, once_differentiable, refuse_forward_mode
from .dispatch import choose, implementation, resolve

__all__ = ['neighbor_conv']


def neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        score: Optional[torch.Tensor] = None,
        groups: int = 1,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Convolve over neighbours: `y[t, o] = bias[o] + sum_r sum_c weight[o, c, r] * score[t, r] * x[index[t, r], c]`.

    Definition: `ops.reference.neighbor_conv`. Under autocast it computes in the autocast dtype, like a convolution.

    Args:
        x: (B, T, C) tokens.
        index: (B, Q, K) int64, the neighbours of every query in rank order, each in [0, T). (This is not checked.)
        weight: (O, C / groups, K), one matrix per neighbour rank.
        bias: (O,).
        score: (B, Q, K), a factor for every neighbour.
        groups: Blocks of channels that do not see each other, as in a convolution.
        backend: 'torch', 'triton', 'onnx' (standard operators only), or None for the default choice.

    Returns:
        (B, Q, O).

    Raises:
        ValueError: Shapes that do not fit, or unknown backend.
        RuntimeError: The backend that was asked for cannot run here, or not with these tensors.
    """
    O, group_channels, K = weight.shape
    if x.ndim != 3 or index.ndim != 3 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f'neighbor_conv takes x (B, T, C) and index (B, Q, K), not {tuple(x.shape)} and {tuple(index.shape)}')
    if group_channels * groups != x.shape[2] or O % groups or K != index.shape[2]:
        raise ValueError(
            f'weight {tuple(weight.shape)} with {groups} groups does not fit x {tuple(x.shape)} and '
            f'index {tuple(index.shape)}: it must be (O, C / groups, K) with O divisible by groups')
    if score is not None and score.shape != index.shape:
        raise ValueError(f'score {tuple(score.shape)} must have the shape of index, {tuple(index.shape)}')
    refuse_forward_mode(x, weight, bias, score)
    score = None if score is None else score.to(x.dtype)
    backend = choose('neighbor_conv', backend, x)
    if backend == 'onnx':
        return reference.neighbor_conv(x, index, weight, bias, score, groups)
    return _differentiable_conv(x, index, weight, bias, score, groups, backend)


@torch.library.custom_op('convnn_timm::neighbor_conv', mutates_args=())
def _neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        score: Optional[torch.Tensor],
        groups: int,
        backend: str = 'auto',
) -> torch.Tensor:
    module = implementation('neighbor_conv', backend, x, weight, groups)
    return module.neighbor_conv(x, index, weight, bias, score, groups)


@_neighbor_conv.register_fake
def _(x, index, weight, bias, score, groups, backend='auto'):
    return x.new_empty((*index.shape[:2], weight.shape[0]))


cast_under_autocast('neighbor_conv', torch.get_autocast_dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, index, weight, bias, score, ctx.groups, backend = inputs
    ctx.backend = resolve('neighbor_conv', backend, x)  # what forward has just run
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, index, weight, score)


def _backward(ctx, grad):
    x, index, weight, score = ctx.saved_tensors
    of_x, _, of_weight, of_bias, of_score, *_ = ctx.needs_input_grad
    grad_x = grad_weight = grad_score = None
    if of_x or of_weight or of_score:
        grad_x, grad_weight, grad_score = _first_backward(
            grad, x, index, weight, score, ctx.groups, of_x, of_weight, ctx.backend)
    grad_bias = grad.sum((0, 1)).to(ctx.bias_dtype) if of_bias else None
    return (
        grad_x if of_x else None, None, grad_weight if of_weight else None, grad_bias,
        grad_score if of_score else None, None, None)


_differentiable_conv = differentiable(_neighbor_conv, _backward, _setup_context)


@torch.library.custom_op('convnn_timm::neighbor_conv_backward', mutates_args=())
def _neighbor_conv_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        score: Optional[torch.Tensor],
        groups: int,
        of_x: bool,
        of_weight: bool,
        backend: str = 'auto',
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x and weight, if asked for, and to score, if there is one; else empty.

    Sums over neighbours and tokens are in float32.
    """
    module = implementation('neighbor_conv', backend, x, weight, groups)
    with no_autocast(x):
        grad_x, grad_weight, grad_score = module.neighbor_conv_backward(
            grad, x, index, weight, score, groups, of_x, of_weight)
    none = (x.new_empty(0) for _ in range(3))  # each its own: an operator's results may not share memory
    return (
        next(none) if grad_x is None else grad_x.to(x.dtype),
        # Rank by rank in memory, like a channels_last weight.
        next(none) if grad_weight is None else grad_weight.contiguous().transpose(1, 2),
        next(none) if grad_score is None else grad_score)


@_neighbor_conv_backward.register_fake
def _(grad, x, index, weight, score, groups, of_x, of_weight, backend='auto'):
    O, C, K = weight.shape
    return (
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(O, K, C).transpose(1, 2) if of_weight else x.new_empty(0),
        x.new_empty(0 if score is None else index.shape))


_first_backward = once_differentiable(_neighbor_conv_backward)


@register_flop_formula(torch.ops.convnn_timm.neighbor_conv)
def _flops(x_shape, index_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    O, C, K = weight_shape
    return 2 * index_shape[0] * index_shape[1] * O * C * K
