"""Select the k largest scores chunk by chunk of queries, in memory that all chunks share: no Q x M tensor is kept."""
from math import ceil
from typing import Optional, Tuple

import torch

from .._common import batch_chunks, chunk_bytes, full_float32, has_direction, no_autocast, widen
from .products import convolves, rows_by_rows
from .topk import can_sort_columns, column_scratch, topk_of_columns, topk_of_rows


def knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        offset: Optional[torch.Tensor],
        exclude: Optional[torch.Tensor],
        k: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Score and index of the operator `convnn_timm::knn`, (B, Q, k) each; the queries are widened in their chunks."""
    B, Q, C = query.shape
    M = candidates.shape[1]
    index = query.new_empty((B, Q, k), dtype=torch.int64)
    score = candidates.new_empty((B, Q, k))
    by_column = can_sort_columns(candidates.dtype, query.device, B * Q, M, k)
    width = candidates.element_size()
    # Scratch memory holds a query's C numbers in the candidates' dtype first, and what sorts its scores afterwards.
    scratch_integers = max(ceil(C * width / 8), column_scratch(M, k) if by_column else 0)
    bytes_per_query = M * width + 8 * scratch_integers
    # Only where a chunk holds one image whatever the batch: a convolution rounds differently, and ranks could follow.
    by_convolution = (
        not by_column and 2 * Q * bytes_per_query > chunk_bytes(query.device) and convolves(candidates, Q * M * C))
    scratch = None  # allocated once: fresh memory for each chunk would cost as much as filling it
    with full_float32():
        for b, q in batch_chunks(B, Q, bytes_per_query, query.device):
            n, rows = b.stop - b.start, q.stop - q.start
            if scratch is None:
                scratch = index.new_empty(n * rows * scratch_integers)
                buffer = candidates.new_empty(0 if by_convolution else n * rows * M)
            wide = scratch.view(candidates.dtype)[:n * rows * C].view(n, rows, C).copy_(query[b, q])
            if offset is None:
                wide *= has_direction(wide)
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
            if own is not None:  # selected only where there were no others
                value = torch.where(place == exclude[q].unsqueeze(-1), own, value)
            score[b, q], index[b, q] = value, place
    return score, index


def _mask_excluded(score: torch.Tensor, exclude: torch.Tensor) -> torch.Tensor:
    """Set the excluded candidate's score to -inf in place, in Q writes, and return what it was, (B, Q, 1).

    score is (B, Q, M), exclude (Q,) with -1 for none.
    """
    column = exclude.clamp_min(0).expand(score.shape[0], -1).unsqueeze(-1)
    own = score.gather(-1, column)
    score.scatter_(-1, column, own.masked_fill((exclude >= 0).unsqueeze(-1), -torch.inf))
    return own


def knn_backward(
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
        with no_autocast(query):  # the caller may run backward inside autocast
            grad_query[b, q] = (g.unsqueeze(-2) @ rows).squeeze(-2)
        spread = (g.unsqueeze(-1) * query[b, q].unsqueeze(-2)).flatten(1, 2)
        grad_candidates[b].scatter_add_(1, i.unsqueeze(-1).expand_as(spread), spread)
        grad_offset[b].scatter_add_(1, i, g.flatten(1))
    return grad_query, grad_candidates, grad_offset


def knn_in_standard_operators(
        query: torch.Tensor,
        candidates: torch.Tensor,
        offset: Optional[torch.Tensor],
        exclude: Optional[torch.Tensor],
        k: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Score and index for ONNX, whose TopK gives ties to the lower index. (torch.topk makes no such promise.)"""
    query = widen(query)
    query = query * has_direction(query) if offset is None else query
    score = query @ candidates.transpose(1, 2)
    if offset is not None:
        score = score + offset.unsqueeze(1)
    rank = score
    if exclude is not None:
        excluded = exclude.unsqueeze(1) == torch.arange(candidates.shape[1], device=query.device)
        rank = score.masked_fill(excluded, -torch.inf)
    index = rank.topk(k).indices
    return score.gather(-1, index), index
