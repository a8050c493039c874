"""Aggregate over neighbours: a convolution whose window is an index, one weight matrix per neighbour rank.

Gather the K rows of every query, then one matrix product with the (K * C) x O weight, chunk by chunk. Backward gathers
again: nothing K times the size of the input is ever kept.
"""
from typing import Iterator, Optional, Tuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .chunks import batch_chunks, no_autocast, once_differentiable, widen
from .paths import choose

__all__ = ['neighbor_conv']


def neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        score: Optional[torch.Tensor] = None,
        groups: int = 1,
) -> torch.Tensor:
    """Convolve over neighbours: `y[t, o] = bias[o] + sum_r sum_c weight[o, c, r] * score[t, r] * x[index[t, r], c]`.

    Definition: `ops.reference.neighbor_conv`. Under autocast it computes in the autocast dtype, like a convolution.

    Args:
        x: (B, T, C) tokens.
        index: (B, Q, K) int64, the neighbours of every query in rank order.
        weight: (O, C / groups, K), one matrix per neighbour rank.
        bias: (O,).
        score: (B, Q, K), a factor for every neighbour.
        groups: Blocks of channels that do not see each other, as in a convolution.

    Returns:
        (B, Q, O).

    Raises:
        ValueError: Shapes that do not fit.
    """
    O, group_channels, K = weight.shape
    if x.ndim != 3 or index.ndim != 3 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f'neighbor_conv takes x (B, T, C) and index (B, Q, K), not {tuple(x.shape)} and {tuple(index.shape)}')
    if group_channels * groups != x.shape[2] or O % groups or K != index.shape[2]:
        raise ValueError(
            f'weight {tuple(weight.shape)} with {groups} groups does not fit x {tuple(x.shape)} and '
            f'index {tuple(index.shape)}: it must be (O, C / groups, K) with O divisible by groups')
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    score = None if score is None else score.to(x.dtype)
    if torch.onnx.is_in_onnx_export():  # standard operators
        return reference.neighbor_conv(x, index, weight, bias, score, groups)
    return _neighbor_conv(x, index, weight, bias, score, groups)


@torch.library.custom_op('convnn_timm::neighbor_conv', mutates_args=())
def _neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        score: Optional[torch.Tensor],
        groups: int,
) -> torch.Tensor:
    if choose('neighbor_conv', x, weight, groups) == 'triton':
        from .triton.neighbor_conv import neighbor_conv as triton_neighbor_conv
        return triton_neighbor_conv(x, index, weight, bias, score, groups)
    B, Q, K = index.shape
    O = weight.shape[0]
    y = x.new_empty((B, Q, O))
    matrix = _rank_major(weight, groups)
    with no_autocast(x):
        for b, q, rows in _gather(x, index):
            if score is not None:
                rows = rows * score[b, q].reshape(-1, K, 1)
            out = _grouped_product(rows, matrix)
            y[b, q] = (out if bias is None else out + bias).reshape(-1, out.shape[0] // (b.stop - b.start), O)
    return y


@_neighbor_conv.register_fake
def _(x, index, weight, bias, score, groups):
    return x.new_empty((*index.shape[:2], weight.shape[0]))


def _gather(x: torch.Tensor, index: torch.Tensor) -> Iterator[Tuple[slice, slice, torch.Tensor]]:
    """Chunks of gathered rows (n * q, K, C) with the images and queries that they belong to; the next reuses the memory."""
    (B, T, C), (_, Q, K) = x.shape, index.shape
    x = x.contiguous()
    buffer = None
    for b, q in batch_chunks(B, Q, K * C * x.element_size()):
        rows = _flat(index[b, q], T)
        buffer = x.new_empty(len(rows), C) if buffer is None else buffer
        torch.index_select(x[b].view(-1, C), 0, rows, out=buffer[:len(rows)])
        yield b, q, buffer[:len(rows)].view(-1, K, C)


def _flat(index: torch.Tensor, T: int) -> torch.Tensor:
    """Row numbers in the flattened (n * T, C) tokens of an (n, q, K) index."""
    first = torch.arange(0, index.shape[0] * T, T, device=index.device)
    return (index + first[:, None, None]).reshape(-1)


def _rank_major(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(O, C / groups, K) -> (groups, K * C / groups, O / groups), rows in the order of gathered rows."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)


def _split_groups(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, K, C) -> (groups, N, K * C / groups)."""
    N, K, C = rows.shape
    return rows.reshape(N, K, groups, C // groups).permute(2, 0, 1, 3).reshape(groups, N, -1)


def _grouped_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(N, K, C) rows times (groups, K * C / groups, O / groups) -> (N, O)."""
    if matrix.shape[0] == 1:
        return rows.flatten(1) @ matrix[0]
    if matrix.shape[0] == rows.shape[2] and matrix.shape[2] == 1:  # depthwise
        return (rows * matrix[..., 0].T).sum(1)
    return torch.bmm(_split_groups(rows, matrix.shape[0]), matrix).transpose(0, 1).flatten(1)


def _setup_context(ctx, inputs, output) -> None:
    x, index, weight, bias, score, ctx.groups = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, index, weight, score)


def _backward(ctx, grad):
    x, index, weight, score = ctx.saved_tensors
    grad_x, grad_weight, grad_score = _neighbor_conv_backward(grad, x, index, weight, score, ctx.groups)
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 1)).to(ctx.bias_dtype)
    return grad_x, None, grad_weight, grad_bias, None if score is None else grad_score, None


_neighbor_conv.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op('convnn_timm::neighbor_conv_backward', mutates_args=())
def _neighbor_conv_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        score: Optional[torch.Tensor],
        groups: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x, weight and score (empty without a score); sums over neighbours and tokens are taken in float32."""
    if choose('neighbor_conv', x, weight, groups) == 'triton':
        from .triton.neighbor_conv import neighbor_conv_backward
        return neighbor_conv_backward(grad, x, index, weight, score, groups)
    (B, T, C), K, O = x.shape, index.shape[2], weight.shape[0]
    matrix = _rank_major(weight, groups)
    grad_x = torch.zeros_like(widen(x), memory_format=torch.contiguous_format)
    grad_matrix = None  # (groups, O / groups, K * C / groups)
    grad_score = x.new_empty(index.shape if score is not None else (0,))
    depthwise = groups == C == O
    with no_autocast(x):
        for b, q, rows in _gather(x, index):
            g = grad[b, q].reshape(-1, O)
            s = None if score is None else score[b, q].reshape(-1, K, 1)
            scaled = rows if s is None else rows * s
            if groups == 1:
                grad_rows = (g @ matrix[0].T).reshape_as(rows)
                part = (g.T @ scaled.flatten(1)).unsqueeze(0)
            elif depthwise:
                grad_rows = g.unsqueeze(1) * matrix[..., 0].T
                part = (scaled * g.unsqueeze(1)).sum(0).T.unsqueeze(1)
            else:
                g = g.unflatten(1, (groups, -1)).transpose(0, 1)
                grad_rows = torch.bmm(g, matrix.mT).unflatten(2, (K, -1)).permute(1, 2, 0, 3).flatten(2)
                part = torch.bmm(g.mT, _split_groups(scaled, groups))
            grad_matrix = widen(part) if grad_matrix is None else grad_matrix.add_(part)
            if s is not None:
                grad_score[b, q] = (grad_rows * rows).sum(-1).reshape(index[b, q].shape)
                grad_rows = grad_rows * s
            grad_x[b].view(-1, C).index_add_(0, _flat(index[b, q], T), widen(grad_rows).reshape(-1, C))
    if grad_matrix is None:
        grad_matrix = matrix.new_zeros(groups, O // groups, K * C // groups)
    return grad_x.to(x.dtype), _weight_layout(grad_matrix.to(weight.dtype), K), grad_score


def _weight_layout(matrix: torch.Tensor, K: int) -> torch.Tensor:
    """(groups, O / groups, K * C / groups) -> (O, C / groups, K), in memory rank by rank like a channels_last weight."""
    return matrix.contiguous().unflatten(2, (K, -1)).transpose(2, 3).flatten(0, 1)


@_neighbor_conv_backward.register_fake
def _(grad, x, index, weight, score, groups):
    (O, C, K), shape = weight.shape, index.shape if score is not None else (0,)
    return x.new_empty(x.shape), _weight_layout(weight.new_empty(groups, O // groups, K * C), K), x.new_empty(shape)


once_differentiable(_neighbor_conv_backward)


@register_flop_formula(torch.ops.convnn_timm.neighbor_conv)
def _flops(x_shape, index_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    O, C, K = weight_shape
    return 2 * index_shape[0] * index_shape[1] * O * C * K
