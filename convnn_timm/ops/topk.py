"""The k largest of a row, in order and exactly: of equal values the first come first, and win the last place.

torch.topk leaves equal values to chance. `topk_of_rows` mends that; `topk_of_columns` takes about half its time on a
CPU where there are few values to choose from. NaN counts as the largest, as in torch.topk.
"""
from typing import Tuple

import torch
import torch.nn.functional as F

__all__ = ['can_sort_columns', 'topk_of_columns', 'topk_of_rows']


def topk_of_rows(score: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (N, k) of the k largest of each row, (N, M).

    Ties show as equal neighbours among the k + 1 largest values; only rows that have some are done again (on a GPU all
    rows, for the question would wait for the device).
    """
    if score.device.type != 'cpu':
        return _resolve_ties(score, score.topk(k).values, k)
    value, index = score.topk(min(k + 1, score.shape[1]))
    rows = _equal(value[:, 1:], value[:, :-1]).any(1).nonzero().squeeze(1)
    value, index = value[:, :k], index[:, :k]
    if rows.numel() == 0:
        return value, index
    tied_value, tied_index = _resolve_ties(score[rows], value[rows], k)
    return value.index_copy(0, rows, tied_value), index.index_copy(0, rows, tied_index)


def _resolve_ties(score: torch.Tensor, value: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Exact top k of rows whose k largest values are known: all above the k-th value, then the first that equal it."""
    M = score.shape[-1]
    last = value[:, -1:]
    order = torch.arange(M, 0, -1, device=score.device, dtype=torch.float32)  # exact to 2^24 candidates
    above = (score > last) | score.isnan()
    place = torch.where(_equal(score, last), order, torch.where(above, M + 1, 0))
    index = place.topk(k).indices.sort(dim=-1).values
    value, by_value = score.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    return value, index.gather(-1, by_value)


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


# Few values: a sorting network

def can_sort_columns(dtype: torch.dtype, device: torch.device, M: int, k: int) -> bool:
    """Whether `topk_of_columns` takes such scores, and is the faster one."""
    return dtype == torch.float32 and device.type == 'cpu' and M <= 96 and k <= 16


def topk_of_columns(score: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (k, N) of the k largest of each column, (M, N) float32.

    Runs of the smallest power of two that holds k are sorted, then merged in pairs of which the larger half is kept, by
    exchanges that work on all columns at once (Batcher's bitonic sort). What is exchanged is a value with its index in
    one integer, so that no two are equal.
    """
    M, length = len(score), 1 << (k - 1).bit_length()
    keys = F.pad(_pack(score), (0, 0, 0, -M % length), value=torch.iinfo(torch.int64).min)
    runs = _sort(keys.unflatten(0, (-1, length)))
    while len(runs) > 1:
        half = len(runs) // 2
        larger = torch.maximum(runs[:half], runs[half:2 * half].flip(1))
        runs = torch.cat([_sort_bitonic(larger), runs[2 * half:]])
    return _unpack(runs[0, :k], M)


def _pack(score: torch.Tensor) -> torch.Tensor:
    """int64 ordered like (score, -index). A float's bits are ordered like an integer, negative ones reversed."""
    score = score + 0.  # -0. becomes 0.
    if score.sum().isnan():
        score.masked_fill_(score.isnan(), torch.nan)  # one of its many
    bits = score.view(torch.int32)
    bits = bits ^ (bits >> 31 & 0x7fffffff)
    last = len(score) - 1
    return (bits.long() << 32).add_(torch.arange(last, -1, -1).unsqueeze(1))


def _unpack(keys: torch.Tensor, M: int) -> Tuple[torch.Tensor, torch.Tensor]:
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7fffffff)).view(torch.float32), M - 1 - (keys & 0xffffffff)


def _sort(runs: torch.Tensor) -> torch.Tensor:
    """Sort each of the runs (G, length, N), largest first; the length is a power of two."""
    length, whole = 1, runs.shape[1]
    runs = runs.flatten(0, 1).unsqueeze(1)
    while length < whole:
        runs = runs.unflatten(0, (-1, 2))
        runs = _sort_bitonic(_exchange(runs[:, 0], runs[:, 1].flip(1)).flatten(0, 1))
        runs = runs.unflatten(0, (-1, 2)).flatten(1, 2)
        length *= 2
    return runs


def _sort_bitonic(runs: torch.Tensor) -> torch.Tensor:
    """The same of runs that rise and then fall, or fall and then rise."""
    shape, step = runs.shape, runs.shape[1] // 2
    while step:
        runs = runs.reshape(-1, 2, step, shape[2])
        runs = _exchange(runs[:, 0], runs[:, 1])
        step //= 2
    return runs.reshape(shape)


def _exchange(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger and the smaller of each pair, (G, 2, length, N)."""
    pairs = a.new_empty((len(a), 2, *a.shape[1:]))
    torch.maximum(a, b, out=pairs[:, 0])
    torch.minimum(a, b, out=pairs[:, 1])
    return pairs
