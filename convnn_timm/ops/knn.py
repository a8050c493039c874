"""Select neighbours exactly: `knn` and `knn_index` by feature, `grid_neighbors` by location.

Ranks need less than scores: dividing by the query's norm (cosine) or subtracting it (euclidean) changes no order, so
one matrix product against prepared candidates ranks them. It runs chunk by chunk of queries, which are widened to
float32 there: neither a Q x M tensor nor a wider copy of the tokens is kept.
"""
from math import ceil
from typing import List, Optional, Tuple

import torch
from torch.utils.flop_counter import register_flop_formula

from ._common import (
    batch_chunks, cast_under_autocast, chunk_bytes, differentiable, full_float32, no_autocast, once_differentiable,
    refuse_forward_mode, widen)
from .paths import choose
from .products import convolves, rows_by_rows
from .reference import inverse_norm
from .topk import can_sort_columns, column_scratch, topk_of_columns, topk_of_rows

__all__ = ['knn', 'knn_index', 'grid_neighbors']

METRICS = ('cosine', 'euclidean')


def knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        k: int,
        metric: str = 'cosine',
        exclude: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Select the k nearest candidates of every query, nearest first; equal scores go to the lower candidate index.

    Definition: `ops.reference.knn`. Computed in float32 (float64 for float64 input) whatever the autocast dtype.

    Args:
        query: (B, Q, C).
        candidates: (B, M, C).
        k: Number of neighbours, at most M.
        metric: 'cosine' (score is the cosine similarity) or 'euclidean' (score is the negative squared distance).
        exclude: (Q,) the candidate that a query must not select, or -1; it comes last if there are no others.

    Returns:
        index (B, Q, k) int64 and score (B, Q, k); gradient flows through the score only.

    Raises:
        ValueError: Unknown metric, shapes or dtypes that do not fit, or k outside [1, M].
    """
    _check(query, candidates, k, metric, exclude)
    with no_autocast(query):
        score, index, measure = _rank(query, candidates, k, metric, exclude)
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
) -> torch.Tensor:
    """The indices (B, Q, k) of `knn` alone, for less: scores need every norm. Arguments and errors are its own."""
    _check(query, candidates, k, metric, exclude)
    with no_autocast(query):  # detached, for torch.export cannot load a network with one no_grad inside another
        return _rank(query.detach(), candidates.detach(), k, metric, exclude)[1]


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
) -> Tuple[torch.Tensor, torch.Tensor, Optional[Tuple[torch.Tensor, torch.Tensor]]]:
    """Scores and indices (B, Q, k), and by distance how they were measured: squared norms (B, Q), and scale (B, 1, 1).

    Of scores by cosine the inverse norm of each query is missing as a factor, of those by distance its squared norm as
    a summand. The score of a candidate that is infinitely far is the least finite number: only the excluded one's is
    -inf while they are ranked.
    """
    select = _knn_onnx if torch.onnx.is_in_onnx_export() else _differentiable_knn
    candidates = widen(candidates)
    if metric == 'cosine':
        return *select(query, candidates * inverse_norm(candidates), None, exclude, k), None
    origin = _origin(candidates)
    query, candidates = widen(query) - origin, candidates - origin
    scale = _scale(query, candidates)
    query, query_square = _with_square(query * scale)
    candidates, square = _with_square(candidates * scale)
    offset = (-square).clamp_min(torch.finfo(square.dtype).min)
    return *select(query, 2 * candidates, offset, exclude, k), (query_square, scale)


def _has_direction(query: torch.Tensor) -> torch.Tensor:
    """Which queries (..., 1) are long enough to have one; to the others all candidates are equal."""
    return inverse_norm(query) != 0


def _origin(candidates: torch.Tensor) -> torch.Tensor:
    """A point (B, 1, C) amid the candidates (B, M, C), from which to measure: no distance between two depends on it.

    Features that lie far from 0 compared with their differences would lose these to rounding. Where they do not, it is
    0, so that zeros stay zeros. Of nine candidates it takes the median, to which a few outliers mean nothing.
    """
    places = torch.arange(9, device=candidates.device) * (candidates.shape[1] - 1) // 8
    ordered = candidates.detach().index_select(1, places).sort(dim=1).values
    low, middle, high = ordered[:, 2:7:2].split(1, dim=1)
    return torch.where(middle.abs() > high - low, middle, 0)  # never where one is not finite


def _scale(query: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """A factor (B, 1, 1) that keeps squares of both (B, N, C) from overflowing; 1 unless some would.

    It is not so small that ordinary features vanish beside a huge one. What stays too long then has no finite distance
    to others: its numbers are too coarse.
    """
    longest = torch.cat([torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1) for x in (query, candidates)], dim=1)
    longest = torch.where(longest < torch.inf, longest, 0).amax(dim=1)
    finfo = torch.finfo(query.dtype)
    most = (_longest_square(query) / query.shape[2]) ** 0.5
    return (most / longest).clamp(finfo.eps / 512, 1.)[:, None, None]


def _longest_square(x: torch.Tensor) -> float:
    """The largest squared norm whose sums with other such numbers are finite."""
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
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest `score[q, m] = query[q] . candidates[m] + offset[m]` of every query: score and index, (B, Q, k).

    Computed in the candidates' dtype, which may be wider. Without an offset a query without direction scores 0. The
    excluded candidate ranks as -inf: it comes last, for the scores of others are more.
    """
    if choose('knn', candidates, k) == 'triton':
        from .triton.knn import knn as triton_knn
        query = query.to(candidates.dtype)
        query = query * _has_direction(query) if offset is None else query
        return triton_knn(query, candidates, offset, exclude, k)
    B, Q, C = query.shape
    M = candidates.shape[1]
    index = query.new_empty((B, Q, k), dtype=torch.int64)
    score = candidates.new_empty((B, Q, k))
    by_column = can_sort_columns(candidates.dtype, query.device, B * Q, M, k)
    width = candidates.element_size()
    # For each query: first for its C numbers, in the candidates' dtype, then to sort the scores in.
    scratch_integers = max(ceil(C * width / 8), column_scratch(M, k) if by_column else 0)
    bytes_per_query = M * width + 8 * scratch_integers
    # Of images so large that each is alone in its chunk, however many there are: else its ranks might depend on others.
    by_convolution = (
        not by_column and 2 * Q * bytes_per_query > chunk_bytes(query.device) and convolves(candidates, Q * M * C))
    scratch = None  # memory of one chunk, as are the scores: fresh memory for each would cost as much as filling it
    with full_float32():
        for b, q in batch_chunks(B, Q, bytes_per_query, query.device):
            n, rows = b.stop - b.start, q.stop - q.start
            if scratch is None:
                scratch = index.new_empty(n * rows * scratch_integers)
                buffer = candidates.new_empty(0 if by_convolution else n * rows * M)
            wide = scratch.view(candidates.dtype)[:n * rows * C].view(n, rows, C).copy_(query[b, q])
            if offset is None:
                wide *= _has_direction(wide)
            if by_convolution:
                s = rows_by_rows(wide[0], candidates[b.start]).unsqueeze(0)
            elif by_column:
                s = buffer[:n * rows * M].view(n, M, rows)
                s = torch.bmm(candidates[b], wide.mT, out=s).mT
            else:
                s = buffer[:n * rows * M].view(n, rows, M)
                torch.bmm(wide, candidates[b].mT, out=s)
            if offset is not None:
                s += offset[b].unsqueeze(1)
            own = None if exclude is None else _mask_excluded(s, exclude[q])
            if by_column:
                value, place = (x.view(k, n, rows).movedim(0, 2) for x in topk_of_columns(s.mT, k, scratch))
            else:
                value, place = (x.view(n, rows, k) for x in topk_of_rows(s.flatten(0, 1), k))
            if own is not None:  # where there were no others
                value = torch.where(place == exclude[q].unsqueeze(-1), own, value)
            score[b, q], index[b, q] = value, place
    return score, index


@_knn.register_fake
def _(query, candidates, offset, exclude, k):
    shape = (*query.shape[:2], k)
    return candidates.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


# Wherever autocast is on, be it around an exported network that was made without it.
cast_under_autocast('knn', lambda device: torch.float32)


def _knn_onnx(query, candidates, offset, exclude, k):
    """The same in standard operators. (ONNX defines that TopK gives ties to the lower index; torch.topk does not.)"""
    query = widen(query)
    query = query * _has_direction(query) if offset is None else query
    score = query @ candidates.transpose(1, 2)
    if offset is not None:
        score = score + offset.unsqueeze(1)
    rank = score
    if exclude is not None:
        excluded = exclude.unsqueeze(1) == torch.arange(candidates.shape[1], device=query.device)
        rank = score.masked_fill(excluded, -torch.inf)
    index = rank.topk(k).indices
    return score.gather(-1, index), index


def _mask_excluded(score: torch.Tensor, exclude: torch.Tensor) -> torch.Tensor:
    """Set the excluded candidate's score to -inf in place, in Q writes, and return what it was, (B, Q, 1).

    score is (B, Q, M), exclude (Q,) with -1 for none.
    """
    column = exclude.clamp_min(0).expand(score.shape[0], -1).unsqueeze(-1)
    own = score.gather(-1, column)
    score.scatter_(-1, column, own.masked_fill((exclude >= 0).unsqueeze(-1), -torch.inf))
    return own


def _setup_context(ctx, inputs, output) -> None:
    query, candidates, offset, _, _ = inputs
    ctx.has_offset = offset is not None
    ctx.save_for_backward(query, candidates, output[1])


def _backward(ctx, grad, _):
    query, candidates, index = ctx.saved_tensors
    grad_query, grad_candidates, grad_offset = _first_backward(grad, query, candidates, index)
    return grad_query, grad_candidates, grad_offset if ctx.has_offset else None, None, None


_differentiable_knn = differentiable(_knn, _backward, _setup_context)


@torch.library.custom_op('convnn_timm::knn_backward', mutates_args=())
def _knn_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        candidates: torch.Tensor,
        index: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the k scores (B, Q, k) to query, candidates and offset."""
    B, Q, C = query.shape
    k = index.shape[-1]
    grad_query = torch.empty_like(query)
    grad_candidates = torch.zeros_like(candidates)
    grad_offset = candidates.new_zeros(candidates.shape[:2])
    for b, q in batch_chunks(B, Q, 2 * k * C * query.element_size(), query.device):  # rows, and their gradient
        i = index[b, q].flatten(1)  # n, q * k
        g = grad[b, q]
        rows = candidates[b].gather(1, i.unsqueeze(-1).expand(-1, -1, C)).unflatten(1, (-1, k))
        with no_autocast(query):  # around a backward of the caller's
            grad_query[b, q] = (g.unsqueeze(-2) @ rows).squeeze(-2)
        spread = (g.unsqueeze(-1) * query[b, q].unsqueeze(-2)).flatten(1, 2)
        grad_candidates[b].scatter_add_(1, i.unsqueeze(-1).expand_as(spread), spread)
        grad_offset[b].scatter_add_(1, i, g.flatten(1))
    return grad_query, grad_candidates, grad_offset


@_knn_backward.register_fake
def _(grad, query, candidates, index):
    return torch.empty_like(query), torch.empty_like(candidates), candidates.new_empty(candidates.shape[:2])


_first_backward = once_differentiable(_knn_backward)


@register_flop_formula(torch.ops.convnn_timm.knn)
def _flops(query_shape, candidates_shape, *args, out_shape=None, **kwargs) -> int:
    B, Q, C = query_shape
    return 2 * B * Q * candidates_shape[1] * C


def grid_neighbors(
        size: Tuple[int, ...],
        k: int,
        starts: Optional[Tuple[int, ...]] = None,
        stride: int = 1,
        stops: Optional[Tuple[int, ...]] = None,
        device: Optional[torch.device] = None,
) -> torch.Tensor:
    """Select the k nearest positions of every `stride`-th position of a grid by euclidean distance, without a search.

    Distances are integers, so ties are exact and go to the lower index. Only a window that must hold the k nearest is
    looked at. Definition: the rows of `ops.reference.grid_neighbors` that the queries name.

    Args:
        size: Length of each axis of the grid, (T,) or (H, W).
        k: Number of neighbours, the position itself included.
        starts: First query on each axis (default: the first position).
        stride: Step between queries.
        stops: One past the last query on each axis (default: the end of the axis).

    Returns:
        (Q, k) int64 raster indices, ascending.

    Raises:
        ValueError: k outside [1, the number of positions].
    """
    if not 1 <= k <= torch.Size(size).numel():
        raise ValueError(f'k must lie in [1, {torch.Size(size).numel()}], the number of positions, but is {k}')
    radius = _covering_radius(size, k)
    axes, steps = [], []
    for n, start, stop in zip(size, starts or [0] * len(size), stops or size):
        axes.append(torch.arange(start, stop, stride, device=device))
        steps.append(torch.arange(-min(radius, n - 1), min(radius, n - 1) + 1, device=device))
    query, step = (torch.stack(torch.meshgrid(*a, indexing='ij'), -1).flatten(0, -2) for a in (axes, steps))
    limit = torch.tensor(size, device=device)
    # The window is in raster order, so (distance, place in the window) orders equal distances by index.
    key = step.square().sum(-1) * len(step) + torch.arange(len(step), device=device)
    nearest = []
    for _, q in batch_chunks(1, len(query), 4 * step.nbytes, device):
        position = query[q].unsqueeze(1) + step  # q, window, axes
        inside = ((position >= 0) & (position < limit)).all(-1)
        raster = position[..., 0]
        for axis in range(1, len(size)):
            raster = raster * size[axis] + position[..., axis]
        place = key.masked_fill(~inside, torch.iinfo(torch.int64).max).topk(k, largest=False).indices
        nearest.append(raster.gather(1, place).sort(dim=1).values)
    return torch.cat(nearest)


def _covering_radius(size: Tuple[int, ...], k: int) -> int:
    """Smallest radius around a corner of the grid, its worst place, that holds k positions."""
    radius = 0
    while True:
        counts: List[int] = [radius * radius]  # squared distance left after each axis
        for n in size:
            counts = [left - d * d for left in counts for d in range(min(n - 1, radius) + 1) if d * d <= left]
        if len(counts) >= k:
            return radius
        radius += 1
