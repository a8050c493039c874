"""Aggregate over neighbours as implicit GEMM: gathered rows go straight into the matrix product, never back to memory.

The B * Q queries are one list, so that small maps fill whole tiles. Sums are taken in float32, and products of float32
are full float32 (no TF32). Names: N queries in all, Q per image, T tokens, C and O channels, K neighbours; `matrix` is
the weight with the rank first.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .._common import flat_rows
from . import INTERPRETED, block, configs, first_if_deterministic, on_device

# A weight gradient is summed in slices of this many queries, as long as the partial sums stay within this many bytes.
QUERIES_PER_PARTIAL = 4096
PARTIAL_BYTES = 2 ** 26
# Deterministic backward writes out the gradient of the gathered rows, for as many images as fit here.
ROW_GRADIENT_BYTES = 2 ** 28

WIDEN = tl.constexpr(INTERPRETED)


def neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        score: Optional[torch.Tensor],
        groups: int,
) -> torch.Tensor:
    """`y[t, o] = bias[o] + sum_r sum_c weight[o, c, r] * score[t, r] * x[index[t, r], c]`, (B, Q, O).

    Args:
        x: (B, T, C) float32, float16 or bfloat16.
        index: (B, Q, K) int64.
        weight: (O, C / groups, K), dtype of x.
        bias: (O,).
        score: (B, Q, K).
        groups: 1, or C with O = C.
    """
    (B, T, C), (_, Q, K), O = x.shape, index.shape, weight.shape[0]
    N = B * Q
    y = x.new_empty((B, Q, O))
    if y.numel() == 0:
        return y
    x, index, matrix, bias, score = _contiguous(x, index, weight.permute(2, 1, 0), bias, score)
    with on_device(x):
        if groups == 1:
            BO = block(O, 256 // x.element_size())
            _forward[lambda meta: (triton.cdiv(N, meta['BN']), triton.cdiv(O, BO))](
                x, index, matrix, bias, score, y, N, Q, T, C, O, K, BC=block(C, 64), BO=BO)
        else:
            BC = block(C, 64)
            _forward_depthwise[lambda meta: (triton.cdiv(N, meta['BN']), triton.cdiv(C, BC))](
                x, index, matrix, bias, score, y, N, Q, T, C, K, BC=BC)
    return y


def neighbor_conv_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        score: Optional[torch.Tensor],
        groups: int,
        of_x: bool,
        of_weight: bool,
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients to x and weight, if asked for, and to score, if there is one.

    Rows of x that are neighbours of many collect their gradient by atomic addition, in an order that differs from run
    to run; with `torch.use_deterministic_algorithms(True)` by `index_add_`, which then is deterministic and slower.
    """
    grad_score = None if score is None else x.new_zeros(index.shape)
    if grad.numel() == 0:
        return (
            torch.zeros_like(x) if of_x else None, torch.zeros_like(weight.transpose(1, 2)) if of_weight else None,
            grad_score)
    matrix = weight.permute(2, 1, 0)
    grad, x, index, matrix, score = _contiguous(grad, x, index, matrix, score)
    of_rows = of_x or score is not None
    grad_x = torch.zeros_like(x, dtype=torch.float32) if of_rows else None
    with on_device(x):
        if of_rows and torch.are_deterministic_algorithms_enabled():
            images = max(1, ROW_GRADIENT_BYTES // (4 * index[0].numel() * x.shape[2]))
            for b in (slice(i, i + images) for i in range(0, x.shape[0], images)):
                rows = grad_x.new_empty((index[b].numel(), x.shape[2]))
                some = (None, None) if score is None else (score[b], grad_score[b])
                _input_gradient(grad[b], x[b], index[b], matrix, *some, rows, groups, atomic=False)
                grad_x[b].view(-1, x.shape[2]).index_add_(0, flat_rows(index[b], x.shape[1]), rows)
        elif of_rows:
            _input_gradient(grad, x, index, matrix, score, grad_score, grad_x, groups, atomic=True)
        grad_weight = _weight_gradient(grad, x, index, score, groups) if of_weight else None
    return (
        grad_x.to(x.dtype) if of_x else None,
        grad_weight.permute(2, 0, 1).to(weight.dtype) if of_weight else None,
        grad_score)


def _input_gradient(grad, x, index, matrix, score, grad_score, out, groups, atomic) -> None:
    """Add into out (B, T, C), or without atomics write the gradient of every gathered row to out (B * Q * K, C)."""
    (B, T, C), (_, Q, K), O = x.shape, index.shape, grad.shape[2]
    _backward_input[lambda meta: (triton.cdiv(B * Q, meta['BN']), K)](
        grad, x, index, matrix, score, grad_score, out, B * Q, Q, T, C, O, K,
        DEPTHWISE=groups != 1, ATOMIC=atomic, BC=block(C, 64), BO=block(O, 64))


def _weight_gradient(grad, x, index, score, groups) -> torch.Tensor:
    """(K, C / groups, O) in float32: partial sums over slices of the queries, then their sum, in a fixed order."""
    (_, T, C), (B, Q, K), O = x.shape, index.shape, grad.shape[2]
    N, BC, BO = B * Q, block(C, 64), block(O, 64)
    shape = (K, C if groups == 1 else 1, O)
    size = 4 * shape[0] * shape[1] * shape[2]
    splits = max(1, min(triton.cdiv(N, QUERIES_PER_PARTIAL), PARTIAL_BYTES // size))
    partial = torch.empty((splits, *shape), dtype=torch.float32, device=x.device)
    share = triton.cdiv(N, splits)
    if groups == 1:
        grid = (triton.cdiv(C, BC) * triton.cdiv(O, BO), K, splits)
        _backward_weight[grid](grad, x, index, score, partial, N, share, Q, T, C, O, K, BC=BC, BO=BO)
    else:
        grid = (triton.cdiv(C, BC), K, splits)
        _backward_weight_depthwise[grid](grad, x, index, score, partial, N, share, Q, T, C, K, BC=BC)
    return partial.sum(0)


def _contiguous(*tensors: Optional[torch.Tensor]) -> Tuple[Optional[torch.Tensor], ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


_DENSE = configs(
    triton.Config({'BN': 64}, num_warps=4, num_stages=3),
    triton.Config({'BN': 32}, num_warps=4, num_stages=4),
    triton.Config({'BN': 128}, num_warps=8, num_stages=4),
    triton.Config({'BN': 64}, num_warps=4, num_stages=5),
)
_DEPTHWISE = configs(
    triton.Config({'BN': 32}, num_warps=4),
    triton.Config({'BN': 64}, num_warps=4),
    triton.Config({'BN': 16}, num_warps=2),
)
_WEIGHT = configs(
    triton.Config({'BN': 32}, num_warps=4, num_stages=3),
    triton.Config({'BN': 64}, num_warps=4, num_stages=3),
    triton.Config({'BN': 64}, num_warps=8, num_stages=4),
)
_PRUNE = {'early_config_prune': first_if_deterministic}


@triton.jit
def _queries(BN: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)


@triton.jit
def _neighbors(index, n, ok, r, Q, T, K):
    """Row of the r-th neighbour of queries n in the flattened (B * T, C) tokens."""
    return n // Q * T + tl.load(index + n * K + r, ok, 0)


@triton.jit
def _scaled(rows, score, n, ok, r, K):
    """Gathered rows times the score of their rank, in the dtype of the rows."""
    if score is not None:
        rows = (rows.to(tl.float32) * tl.load(score + n * K + r, ok, 0.).to(tl.float32)[:, None]).to(rows.dtype)
    return rows


@triton.jit
def _load(x, row, row_ok, column, width):
    """Block of a (rows, width) matrix, 0 outside."""
    return tl.load(x + row[:, None] * width + column[None, :], row_ok[:, None] & (column < width)[None, :], 0.)


@triton.jit
def _dot(a, b, total):
    """total + a b. The interpreter knows bfloat16 only as bits, which it would multiply."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision='ieee')


@triton.jit
def _store(y, value, row, row_ok, column, width):
    ok = row_ok[:, None] & (column < width)[None, :]
    tl.store(y + row[:, None] * width + column[None, :], value.to(y.dtype.element_ty), ok)


@triton.autotune(_DENSE, key=['C', 'O', 'K'], prune_configs_by=_PRUNE)
@triton.jit
def _forward(
        x, index, matrix, bias, score, y, N, Q, T, C, O, K,
        BN: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):
    n = _queries(BN)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BN, BO), tl.float32)
    blocks = tl.cdiv(C, BC)
    for step in range(K * blocks):  # one loop over ranks and channels, for the compiler to overlap loads and products
        r = step // blocks
        c = step % blocks * BC + tl.arange(0, BC)
        row = _neighbors(index, n, n < N, r, Q, T, K)
        rows = _scaled(_load(x, row, n < N, c, C), score, n, n < N, r, K)
        total = _dot(rows, _load(matrix, (r * C + c).to(tl.int64), c < C, o, O), total)
    if bias is not None:
        total += tl.load(bias + o, o < O, 0.).to(tl.float32)[None, :]
    _store(y, total, n, n < N, o, O)


@triton.autotune(_DEPTHWISE, key=['C', 'K'], prune_configs_by=_PRUNE)
@triton.jit
def _forward_depthwise(x, index, matrix, bias, score, y, N, Q, T, C, K, BN: tl.constexpr, BC: tl.constexpr):
    n = _queries(BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BN, BC), tl.float32)
    for r in range(K):
        row = _neighbors(index, n, n < N, r, Q, T, K)
        rows = _scaled(_load(x, row, n < N, c, C), score, n, n < N, r, K)
        total += rows.to(tl.float32) * tl.load(matrix + r * C + c, c < C, 0.).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + c, c < C, 0.).to(tl.float32)[None, :]
    _store(y, total, n, n < N, c, C)


@triton.autotune(
    _DENSE, key=['C', 'O', 'K', 'DEPTHWISE', 'ATOMIC'], prune_configs_by=_PRUNE,
    reset_to_zero=['out'],  # trials must not add up
)
@triton.jit
def _backward_input(
        grad, x, index, matrix, score, grad_score, out, N, Q, T, C, O, K,
        DEPTHWISE: tl.constexpr, ATOMIC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):
    """One rank of a tile of queries: the gradient of its gathered rows, and that times the rows for the score's."""
    n = _queries(BN)
    r = tl.program_id(1)
    row = _neighbors(index, n, n < N, r, Q, T, K)
    to_score = tl.zeros((BN,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        if DEPTHWISE:
            w = tl.load(matrix + r * C + c, c < C, 0.).to(tl.float32)
            total = _load(grad, n, n < N, c, C).to(tl.float32) * w[None, :]
        else:
            total = tl.zeros((BN, BC), tl.float32)
            for start_o in range(0, O, BO):
                o = start_o + tl.arange(0, BO)
                w = _load(matrix, (r * C + c).to(tl.int64), c < C, o, O)
                total = _dot(_load(grad, n, n < N, o, O), tl.trans(w), total)
        if score is not None:
            to_score += tl.sum(total * _load(x, row, n < N, c, C).to(tl.float32), 1)
            total *= tl.load(score + n * K + r, n < N, 0.).to(tl.float32)[:, None]
        if ATOMIC:
            ok = (n < N)[:, None] & (c < C)[None, :]
            tl.atomic_add(out + row[:, None] * C + c[None, :], total, ok, sem='relaxed')
        else:
            _store(out, total, n * K + r, n < N, c, C)
    if score is not None:
        tl.store(grad_score + n * K + r, to_score.to(grad_score.dtype.element_ty), n < N)


@triton.autotune(_WEIGHT, key=['C', 'O', 'K'], prune_configs_by=_PRUNE)
@triton.jit
def _backward_weight(
        grad, x, index, score, partial, N, share, Q, T, C, O, K,
        BN: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):
    blocks = tl.cdiv(O, BO)
    c = tl.program_id(0) // blocks * BC + tl.arange(0, BC)
    o = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    r = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    end = tl.minimum((split + 1) * share, N)
    total = tl.zeros((BC, BO), tl.float32)
    for start in range(split * share, end, BN):
        n = start + tl.arange(0, BN)
        row = _neighbors(index, n, n < end, r, Q, T, K)
        rows = _scaled(_load(x, row, n < end, c, C), score, n, n < end, r, K)
        total = _dot(tl.trans(rows), _load(grad, n, n < end, o, O), total)
    _store(partial, total, (split * K + r) * C + c, c < C, o, O)


@triton.autotune(_DEPTHWISE, key=['C', 'K'], prune_configs_by=_PRUNE)
@triton.jit
def _backward_weight_depthwise(
        grad, x, index, score, partial, N, share, Q, T, C, K, BN: tl.constexpr, BC: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    end = tl.minimum((split + 1) * share, N)
    total = tl.zeros((BC,), tl.float32)
    for start in range(split * share, end, BN):
        n = start + tl.arange(0, BN)
        row = _neighbors(index, n, n < end, r, Q, T, K)
        rows = _scaled(_load(x, row, n < end, c, C), score, n, n < end, r, K)
        total += tl.sum(rows.to(tl.float32) * _load(grad, n, n < end, c, C).to(tl.float32), 0)
    tl.store(partial + (split * K + r) * C + c, total, c < C)
