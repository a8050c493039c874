"""Aggregate over neighbours, in one of two orders.

Gather first: the K rows of every query, then one product with the weights of all ranks. Or multiply first: every token
with the weights of all ranks, then for every query the sum of K of these products; cheaper where there are fewer tokens
than queries (sampled candidates) or fewer outputs than inputs. Either way chunk by chunk, and backward does it again:
nothing K times the size of the input is ever kept.
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

from .._common import batch_chunks, chunk_bytes, flat_rows, widen
from .products import columns_by_columns, rows_by_columns, rows_by_rows


def neighbor_conv(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        score: Optional[torch.Tensor],
        groups: int,
) -> torch.Tensor:
    """The operator `convnn_timm::neighbor_conv`, (B, Q, O)."""
    y = x.new_empty((*index.shape[:2], weight.shape[0]))
    forward = _multiply_and_sum if multiplies_first(x, index, weight) else _gather_and_multiply
    forward(y, x, index, weight, score, groups)
    return y if bias is None else y.add_(bias)


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
    """Gradients to x and weight, if asked for, and to score, if there is one."""
    backward = _multiply_backward if multiplies_first(x, index, weight) else _gather_backward
    return backward(grad, x, index, weight, score, groups, of_x, of_weight)


def multiplies_first(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether to multiply first: by the cost of both orders, and only where the products of one image fit a chunk.

    Never in float16, which one rank's product may exceed though the sum of all does not.
    """
    (T, C), Q, (O, group_channels, _) = x.shape[1:], index.shape[1], weight.shape
    if x.dtype == torch.float16 or _bytes_of_products(x, index, weight) > chunk_bytes(x.device):
        return False
    move = 6  # Moving one number costs about as much as 6 multiplications (measured, forward and backward).
    return T * O * group_channels + (T + Q) * O * move < Q * O * group_channels + 2 * Q * C * move


# Gather first

def _gather_and_multiply(y, x, index, weight, score, groups) -> None:
    matrix = _by_output(weight, groups)
    for b, q, rows in _gather(x, index):
        if score is not None:
            rows *= score[b, q].reshape(*rows.shape[:2], 1)
        y[b, q] = _grouped_product(rows, matrix).view(b.stop - b.start, -1, y.shape[2])


def _gather_backward(grad, x, index, weight, score, groups, of_x, of_weight):
    (_, T, C), K, O = x.shape, index.shape[2], weight.shape[0]
    matrix = _by_output(weight, groups)
    grad_x = torch.zeros_like(widen(x), memory_format=torch.contiguous_format) if of_x else None
    grad_matrix = widen(torch.zeros_like(matrix)) if of_weight else None
    grad_score = None if score is None else torch.empty_like(score, memory_format=torch.contiguous_format)
    piece = max(1, chunk_bytes(x.device) // 2 ** 13)  # queries; all rows of a chunk would leave the cache
    for b, q, rows in _gather(x, index):
        g = grad[b, q].reshape(-1, O)
        s = None if score is None else score[b, q].reshape(-1, K, 1)
        place, to_score = flat_rows(index[b, q], T).view(-1, K), []
        starts = range(0, len(g), piece) if of_x or s is not None else ()
        for part in (slice(i, i + piece) for i in starts):
            grad_rows = _rows_gradient(g[part], matrix, K)
            if s is not None:
                to_score.append((grad_rows * rows[part]).sum(-1))
                grad_rows = grad_rows * s[part]
            if of_x:
                grad_x[b].view(-1, C).index_add_(0, place[part].flatten(), widen(grad_rows).reshape(-1, C))
            del grad_rows  # before the next part's
        if s is not None:
            grad_score[b, q] = torch.cat(to_score).view(index[b, q].shape)
            rows *= s
        if of_weight:
            grad_matrix += _matrix_gradient(g, rows, groups)
    grad_weight = grad_matrix.to(weight.dtype).unflatten(2, (K, -1)).flatten(0, 1) if of_weight else None
    return grad_x, grad_weight, grad_score


def _gather(x: torch.Tensor, index: torch.Tensor) -> Iterator[Tuple[slice, slice, torch.Tensor]]:
    """Chunks of gathered rows (n * q, K, C) with the images and queries they belong to; the next reuses the memory."""
    (B, T, C), (_, Q, K) = x.shape, index.shape
    x = x.contiguous()
    buffer = None
    for b, q in batch_chunks(B, Q, K * C * x.element_size(), x.device):
        rows = flat_rows(index[b, q], T)
        buffer = x.new_empty(len(rows), C) if buffer is None else buffer
        torch.index_select(x[b].view(-1, C), 0, rows, out=buffer[:len(rows)])
        yield b, q, buffer[:len(rows)].view(-1, K, C)


def _by_output(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(O, C / groups, K) -> (groups, O / groups, K * C / groups), each row in the order of gathered rows."""
    return weight.unflatten(0, (groups, -1)).transpose(2, 3).flatten(2)


def _split_groups(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, K, C) -> (groups, N, K * C / groups)."""
    N, K, C = rows.shape
    return rows.reshape(N, K, groups, C // groups).permute(2, 0, 1, 3).reshape(groups, N, -1)


def _grouped_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(N, K, C) rows, which it may overwrite, times (groups, O / groups, K * C / groups) -> (N, O)."""
    if matrix.shape[0] == 1:
        return rows_by_rows(rows.flatten(1), matrix[0])
    if matrix.shape[0] == rows.shape[2] and matrix.shape[1] == 1:  # depthwise
        return rows.mul_(matrix[:, 0].T).sum(1)
    return torch.bmm(_split_groups(rows, matrix.shape[0]), matrix.mT).transpose(0, 1).flatten(1)


def _rows_gradient(grad: torch.Tensor, matrix: torch.Tensor, K: int) -> torch.Tensor:
    """Gradient (N, K, C) of `_grouped_product`, grad (N, O), to its rows."""
    groups, outputs, inputs = matrix.shape
    if groups == 1:
        return rows_by_columns(grad, matrix[0]).unflatten(1, (K, -1))
    if inputs == K and outputs == 1:  # depthwise
        return grad.unsqueeze(1) * matrix[:, 0].T
    grad = grad.unflatten(1, (groups, -1)).transpose(0, 1)
    return torch.bmm(grad, matrix).unflatten(2, (K, -1)).permute(1, 2, 0, 3).flatten(2)


def _matrix_gradient(grad: torch.Tensor, rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradient of `_grouped_product`, grad (N, O), to its matrix."""
    if groups == 1:
        return columns_by_columns(grad, rows.flatten(1))
    if groups == rows.shape[2] == grad.shape[1]:  # depthwise
        return (rows * grad.unsqueeze(1)).sum(0).T.unsqueeze(1)
    return torch.bmm(grad.unflatten(1, (groups, -1)).permute(1, 2, 0), _split_groups(rows, groups))


# Multiply first

def _multiply_and_sum(y, x, index, weight, score, groups) -> None:
    K = index.shape[2]
    for b, tokens, place in _tokens_and_places(x, index, weight):
        products = _products(tokens, weight, groups).flatten(0, 1)
        place = place * K + torch.arange(K, device=x.device)
        weights = None if score is None else score[b].reshape(place.shape)
        y[b] = F.embedding_bag(place, products, mode='sum', per_sample_weights=weights).view_as(y[b])


def _multiply_backward(grad, x, index, weight, score, groups, of_x, of_weight):
    K, O = index.shape[2], weight.shape[0]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
    grad_weight = widen(weight.new_zeros(groups, K, O // groups, weight.shape[1])) if of_weight else None
    grad_score = None if score is None else torch.empty_like(score, memory_format=torch.contiguous_format)
    for b, tokens, place in _tokens_and_places(x, index, weight):
        g, s = grad[b].reshape(-1, O), None
        if score is not None:
            s = score[b].reshape(-1, K)
            products = _products(tokens, weight, groups)
            for rank in range(K):
                to_score = (products[place[:, rank], rank] * g).sum(-1)
                grad_score[b, :, rank] = to_score.view(-1, index.shape[1])
        if not (of_x or of_weight):
            continue
        grad_products = _sum_by_place(g, place, len(tokens), s).to(x.dtype)
        if of_x:
            grad_x[b] = _tokens_gradient(grad_products, weight, groups).view_as(x[b])
        if of_weight:
            grad_weight += _ranks_gradient(grad_products, tokens, groups)
    return grad_x, grad_weight.to(weight.dtype).transpose(1, 2).flatten(0, 1) if of_weight else None, grad_score


def _sum_by_place(rows: torch.Tensor, place: torch.Tensor, places: int, score: Optional[torch.Tensor]) -> torch.Tensor:
    """Sum the rows (N, O), times their score, at their place (N, K) of each rank: (places, K, O).

    They are sorted by place first, which takes a third of the time of index_add_ or less.
    """
    K = place.shape[1]
    bins = torch.arange(places * K, dtype=torch.int32, device=rows.device)
    key, order = (place.int() * K + bins[:K]).flatten().sort(stable=True)
    weights = None if score is None else widen(score).flatten()[order]
    summed = F.embedding_bag(
        order // K, widen(rows), torch.searchsorted(key, bins), mode='sum', per_sample_weights=weights)
    return summed.view(places, K, -1)


def _tokens_and_places(
        x: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
) -> Iterator[Tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunks of images, their tokens (n * T, C), and which of these are the queries' neighbours, (n * Q, K)."""
    for b, _ in batch_chunks(x.shape[0], 1, _bytes_of_products(x, index, weight), x.device):
        yield b, x[b].flatten(0, 1), flat_rows(index[b], x.shape[1]).view(-1, index.shape[2])


def _bytes_of_products(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> int:
    """Memory for one image: its products, their float32 gradient, and the places to sum it by."""
    T, (Q, K), O = x.shape[1], index.shape[1:], weight.shape[0]
    return K * (T * (O * (x.element_size() + 4) + 12) + Q * 32)


def _by_rank(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(O, C / groups, K) -> (groups, K * O / groups, C / groups)."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 1, 2).flatten(1, 2)


def _products(tokens: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, C) times the weight (O, C / groups, K) of every rank: (N, K, O)."""
    O, C, K = weight.shape
    if groups == 1:
        return rows_by_rows(tokens, _by_rank(weight, 1)[0]).view(-1, K, O)
    if C == 1 and groups == O:  # depthwise
        return tokens.unsqueeze(1) * weight[:, 0].T
    tokens = tokens.unflatten(1, (groups, -1)).transpose(0, 1)
    return torch.bmm(tokens, _by_rank(weight, groups).mT).unflatten(2, (K, -1)).permute(1, 2, 0, 3).flatten(2)


def _tokens_gradient(grad: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradient (N, C) of `_products`, grad (N, K, O), to its tokens."""
    if groups == 1:
        return rows_by_columns(grad.flatten(1), _by_rank(weight, 1)[0])
    if groups == len(weight) and weight.shape[1] == 1:  # depthwise
        return (grad * weight[:, 0].T).sum(1)
    grad = grad.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)
    return torch.bmm(grad, _by_rank(weight, groups)).transpose(0, 1).flatten(1)


def _ranks_gradient(grad: torch.Tensor, tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradient of `_products`, grad (N, K, O), to its weight: (groups, K, O / groups, C / groups)."""
    (_, K, O), C = grad.shape, tokens.shape[1]
    if groups == 1:
        return columns_by_columns(grad.flatten(1), tokens).reshape(1, K, O, C)
    if groups == C == O:  # depthwise
        return (grad * tokens.unsqueeze(1)).sum(0).T.reshape(groups, K, 1, 1)
    grad = grad.unflatten(2, (groups, -1)).permute(2, 1, 3, 0).flatten(1, 2)
    tokens = tokens.unflatten(1, (groups, -1)).transpose(0, 1)
    return torch.bmm(grad, tokens).unflatten(1, (K, -1))
