"""Select neighbours exactly, by feature: `knn` and `knn_index`.

Ranks need less than scores: dividing by the query's norm (cosine) or subtracting it (euclidean) changes no order. So
one matrix product against prepared candidates ranks them, and that is the operator. Here are checks, this preparation,
derivatives, shapes and costs. `eager` and `triton` hold the algorithms.
"""
from typing import Optional, Tuple

import torch
from torch.utils.flop_counter import register_flop_formula

from ._common import (
    cast_under_autocast, differentiable, no_autocast, once_differentiable, refuse_forward_mode, widen)
from .dispatch import choose, implementation
from .eager.selection import knn_backward, knn_in_standard_operators
from .reference import inverse_norm

__all__ = ['METRICS', 'knn', 'knn_index']

METRICS = ('cosine', 'euclidean')


def knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str = 'cosine',
        exclude: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Select the k nearest candidates of every query, nearest first; equal scores go to the lower candidate index.

    Definition: `ops.reference.knn`. Computed in float32 (float64 for float64 input) whatever the autocast dtype.

    Args:
        query: (B, Q, C).
        candidates: (B, M, C).
        k: Number of neighbours, at most M.
        metric: 'cosine' (score is the cosine similarity) or 'euclidean' (score is the negative squared distance).
        exclude: (Q,) the candidate that a query must not select, or -1; it comes last if there are no others.
        backend: 'torch', 'triton', 'onnx' (standard operators only), or None for the default choice.

    Returns:
        index (B, Q, k) int64 and score (B, Q, k); gradient flows through the score only.

    Raises:
        ValueError: Unknown metric or backend, shapes or dtypes that do not fit, or k outside [1, M].
        RuntimeError: The backend that was asked for cannot run here, or not with these tensors.
    """
    _check(query, candidates, k, metric, exclude)
    backend = choose('knn', backend, candidates)
    with no_autocast(query):
        score, index, measure = _rank(query, candidates, k, metric, exclude, backend)
        if measure is None:
            return index, score * inverse_norm(widen(query))
        square, scale = measure
        score = score.masked_fill(score == torch.finfo(score.dtype).min, -torch.inf)
        return index, (score - square.unsqueeze(-1)) / scale / scale


def knn_index(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str = 'cosine',
        exclude: Optional[torch.Tensor] = None,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Select the indices (B, Q, k) of `knn` without its scores, which need every query's norm.

    Arguments and errors are those of `knn`.
    """
    _check(query, candidates, k, metric, exclude)
    backend = choose('knn', backend, candidates)
    with no_autocast(query):  # detached, for torch.export cannot load a network with one no_grad inside another
        return _rank(query.detach(), candidates.detach(), k, metric, exclude, backend)[1]


def _check(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str,
        exclude: Optional[torch.Tensor],
) -> None:
    if metric not in METRICS:
        raise ValueError(f'unknown metric {metric!r}, valid are {", ".join(METRICS)}')
    if query.ndim != 3 or candidates.ndim != 3 or query.shape[::2] != candidates.shape[::2]:
        raise ValueError(
            f'knn takes query (B, Q, C) and candidates (B, M, C), '
            f'not {tuple(query.shape)} and {tuple(candidates.shape)}')
    if query.dtype != candidates.dtype:
        raise ValueError(f'knn takes query and candidates of one dtype, not {query.dtype} and {candidates.dtype}')
    refuse_forward_mode(query, candidates)
    if not 1 <= k <= candidates.shape[1]:
        raise ValueError(f'k must lie in [1, {candidates.shape[1]}], the number of candidates, but is {k}')
    if exclude is not None and exclude.shape != query.shape[1:2]:
        raise ValueError(
            f'exclude names one candidate for each of {query.shape[1]} queries, but is {tuple(exclude.shape)}')


def _rank(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str,
        exclude: Optional[torch.Tensor],
        backend: str,
) -> Tuple[torch.Tensor, torch.Tensor, Optional[Tuple[torch.Tensor, torch.Tensor]]]:
    """Scores and indices (B, Q, k), and by distance how they were measured: squared norms (B, Q), and scale (B, 1, 1).

    Cosine scores still lack the query's inverse norm as a factor, distances its squared norm as a summand. A candidate
    that is infinitely far scores the least finite number, because -inf marks the excluded one.
    """
    candidates = widen(candidates)
    if metric == 'cosine':
        return *_select(query, candidates * inverse_norm(candidates), None, exclude, k, backend), None
    origin = _origin(candidates)
    query, candidates = widen(query) - origin, candidates - origin
    scale = _scale(query, candidates)
    query, query_square = _with_square(query * scale)
    candidates, square = _with_square(candidates * scale)
    offset = (-square).clamp_min(torch.finfo(square.dtype).min)
    return *_select(query, 2 * candidates, offset, exclude, k, backend), (query_square, scale)


def _origin(candidates: torch.Tensor) -> torch.Tensor:
    """A point (B, 1, C) amid the candidates (B, M, C) to measure from; distances do not depend on it.

    Features far from 0 compared with their differences would lose these to rounding. Elsewhere the point is 0, so that
    zeros stay zeros. It is the median of nine candidates, which a few outliers do not move.
    """
    places = torch.arange(9, device=candidates.device) * (candidates.shape[1] - 1) // 8
    ordered = candidates.detach().index_select(1, places).sort(dim=1).values
    low, middle, high = ordered[:, 2:7:2].split(1, dim=1)
    return torch.where(middle.abs() > high - low, middle, 0)  # False where one is not finite


def _scale(query: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """A factor (B, 1, 1) that keeps squares of both (B, N, C) from overflowing; 1 unless some would.

    It is never so small that ordinary features vanish beside a huge one. Tokens that stay too long have no finite
    distance to others: their numbers are too coarse.
    """
    longest = torch.cat([torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1) for x in (query, candidates)], dim=1)
    longest = torch.where(longest < torch.inf, longest, 0).amax(dim=1)
    finfo = torch.finfo(query.dtype)
    most = (_longest_square(query) / query.shape[2]) ** 0.5
    return (most / longest).clamp(finfo.eps / 512, 1.)[:, None, None]


def _longest_square(x: torch.Tensor) -> float:
    """The largest squared norm that can be added to others without overflow."""
    return torch.finfo(x.dtype).max / 8


def _with_square(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, N, C) and their squared norm (B, N). Rows that are too long are zeros whose squared norm is infinite."""
    square = x.square().sum(-1)
    too_long = square > _longest_square(x)
    return x.masked_fill(too_long.unsqueeze(-1), 0), square.masked_fill(too_long, torch.inf)


@torch.library.custom_op('convnn_timm::knn', mutates_args=())
def _knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        offset: Optional[torch.Tensor],
        exclude: Optional[torch.Tensor],
        k: int,
        backend: str = 'auto',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest `score[q, m] = query[q] . candidates[m] + offset[m]` of every query: score and index, (B, Q, k).

    Computed in the candidates' dtype, which may be wider. Without an offset a query without direction scores 0. The
    excluded candidate ranks as -inf: it comes last, for the scores of others are more.
    """
    return implementation('knn', backend, candidates, k).knn(query, candidates, offset, exclude, k)


@_knn.register_fake
def _(query, candidates, offset, exclude, k, backend='auto'):
    shape = (*query.shape[:2], k)
    return candidates.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


# Ranks need float32 under any autocast, also around an exported network that was traced without it.
cast_under_autocast('knn', lambda device: torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    query, candidates, offset, *_ = inputs
    ctx.has_offset = offset is not None
    ctx.save_for_backward(query, candidates, output[1])


def _backward(ctx, grad, _):
    query, candidates, index = ctx.saved_tensors
    grad_query, grad_candidates, grad_offset = _first_backward(grad, query, candidates, index)
    return grad_query, grad_candidates, grad_offset if ctx.has_offset else None, None, None, None


_differentiable_knn = differentiable(_knn, _backward, _setup_context)


def _select(*args) -> Tuple[torch.Tensor, torch.Tensor]:
    *tensors_and_k, backend = args
    return knn_in_standard_operators(*tensors_and_k) if backend == 'onnx' else _differentiable_knn(*args)


@torch.library.custom_op('convnn_timm::knn_backward', mutates_args=())
def _knn_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        candidates: torch.Tensor,
        index: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the k scores (B, Q, k) to query, candidates and offset."""
    return knn_backward(grad, query, candidates, index)


@_knn_backward.register_fake
def _(grad, query, candidates, index):
    return torch.empty_like(query), torch.empty_like(candidates), candidates.new_empty(candidates.shape[:2])


_first_backward = once_differentiable(_knn_backward)


@register_flop_formula(torch.ops.convnn_timm.knn)
def _flops(query_shape, candidates_shape, *args, out_shape=None, **kwargs) -> int:
    B, Q, C = query_shape
    return 2 * B * Q * candidates_shape[1] * C
