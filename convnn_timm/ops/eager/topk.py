"""The k largest of a row, in order and exactly: of equal values the first come first, and win the last place.

torch.topk takes equal values in no particular order. `topk_of_rows` orders them afterwards. `topk_of_columns` sorts in
about two thirds of its time, on a CPU where many queries choose from few candidates. NaN counts as the largest, as in
torch.topk.
"""
from math import ceil, isqrt
from typing import Iterator, List, Tuple

import torch

__all__ = ['can_sort_columns', 'column_scratch', 'topk_of_columns', 'topk_of_rows', 'topk_of_tied_rows']


def topk_of_rows(score: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (N, k) of the k largest of each row, (N, M).

    Ties show as equal neighbours among the k + 1 largest values. On a CPU only rows with ties are done again.
    """
    if score.device.type != 'cpu':
        return topk_of_tied_rows(score, k)
    value, index = _topk(score, min(k + 1, score.shape[1]))
    equal = _equal(value[:, 1:], value[:, :-1])
    rows, contested = (x.any(1).nonzero().squeeze(1) for x in (equal, equal[:, k - 1:]))
    value, index = value[:, :k], index[:, :k]
    if len(contested):  # for the last place
        index = index.index_copy(0, contested, _first_of_equals(score[contested], value[contested], index[contested]))
    if len(rows):
        tied = index[rows]
        tied_value, tied = _in_order(score[rows.unsqueeze(1), tied], tied)
        value, index = value.index_copy(0, rows, tied_value), index.index_copy(0, rows, tied)
    return value, index


def topk_of_tied_rows(score: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of `topk_of_rows`. Ties are always resolved: testing for them would synchronise a GPU."""
    index = _first_of_equals(score, *score.topk(k))
    return _in_order(score.gather(1, index), index)


def _first_of_equals(score: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """torch.topk's indices (N, k) of rows (N, M); where values equal the k-th, the first of them are taken."""
    M, k, last = score.shape[1], value.shape[1], value[:, -1:]
    order = torch.arange(M, 0, -1, device=score.device, dtype=torch.float32)  # exact to 2^24 candidates
    first = torch.where(_equal(score, last), order, 0).topk(k).indices
    equal = _equal(value, last)
    above = (~equal).sum(1, keepdim=True)
    place = torch.arange(k, device=score.device) - above
    return torch.where(equal, first.gather(1, place.clamp_min(0)), index)


def _in_order(value: torch.Tensor, index: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values with their indices, largest first; equal values by their index."""
    index, by_index = index.sort(dim=1)
    value, by_value = value.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, by_value)


def _topk(score: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """torch.topk, faster on a CPU: of a long row, folded into columns, it searches those with the k largest maxima.

    What the fold leaves over is searched with them.

    torch.topk is fast on rows of 64 k and more, which take one pass, and slow on shorter ones. So a long row is folded
    to 64 k maxima. A shorter row is folded to balance its maxima (M / height) with the final search (height * k).
    """
    M = score.shape[1]
    height = M // (64 * k) or isqrt(M // k)
    if height < 4:
        return score.topk(k)
    width = M // height
    folded = score[:, :height * width].unflatten(1, (height, width))
    columns = folded.amax(1).topk(k, sorted=False).indices
    few = folded.gather(2, columns.unsqueeze(1).expand(-1, height, -1)).flatten(1)
    value, place = torch.cat([few, score[:, height * width:]], dim=1).topk(k)
    index = place // k * width + columns.gather(1, place % k)
    return value, torch.where(place < height * k, index, place + height * (width - k))


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


# Few values: a sorting network

# From so many columns on it is faster: its many small steps take as long for a single one. (Measured: 800 to 2000.)
LEAST_COLUMNS = 1024


def can_sort_columns(dtype: torch.dtype, device: torch.device, columns: int, M: int, k: int) -> bool:
    """Whether `topk_of_columns` takes such scores, and is the faster one."""
    return dtype == torch.float32 and device.type == 'cpu' and columns >= LEAST_COLUMNS and M <= 96 and k <= 16


def column_scratch(M: int, k: int) -> int:
    """How many integers of scratch memory `topk_of_columns` needs for each column."""
    length = _run_length(k)
    return (length + 1) * ceil(M / length)


def topk_of_columns(score: torch.Tensor, k: int, scratch: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (k, B * N) of the k largest of each column of B matrices (B, M, N), which it overwrites.

    Runs of the smallest power of two that holds k are sorted, then merged in pairs of which the larger half is kept, by
    exchanges that work on all columns at once (Batcher's odd-even and bitonic sorts). What is exchanged is a value with
    its index in one integer, so that no two are equal.

    Args:
        score: float32.
        k: At most M.
        scratch: int64 memory, of `column_scratch` for each column. (To find fresh memory takes longer than to sort.)
    """
    (B, M, N), length = score.shape, _run_length(k)
    runs, columns = ceil(M / length), B * N
    keys, spare = scratch[:column_scratch(M, k) * columns].view(length + 1, runs, columns).split([length, 1])
    _pack(score, keys.flatten(0, 1))
    rows, spare = list(keys), spare[0]  # rows[i] holds what stands i-th in each run, (runs, columns)
    for i, j in _odd_even_exchanges(length):
        spare = _exchange(rows, i, j, spare)
    while runs > 1:
        runs, merged = ceil(runs / 2), runs // 2
        for row, other in zip(rows, rows[::-1]):
            torch.maximum(row[:merged], other[runs:runs + merged], out=row[:merged])
        rows, spare = [row[:runs] for row in rows], spare[:runs]
        for i, j in _bitonic_exchanges(length):
            spare = _exchange(rows, i, j, spare)
    return _unpack(torch.cat(rows[:k]), M)


def _run_length(k: int) -> int:
    return 1 << (k - 1).bit_length()


def _pack(score: torch.Tensor, keys: torch.Tensor) -> None:
    """Fill keys (at least M, B * N) with integers ordered like (score, -index), the rest with the smallest.

    A float's bits are ordered like an integer, negative ones reversed.
    """
    B, M, N = score.shape
    score += 0.  # -0. becomes 0.
    if score.sum().isnan():
        score.masked_fill_(score.isnan(), torch.nan)  # one of its many
    bits = score.view(torch.int32)
    negative = keys.view(-1).view(torch.int32)[:bits.numel()].view_as(bits)
    bits ^= torch.bitwise_right_shift(bits, 31, out=negative).bitwise_and_(0x7fffffff)
    keys[:M].view(M, B, N).copy_(bits.transpose(0, 1))
    keys[:M].bitwise_left_shift_(32).add_(torch.arange(M - 1, -1, -1).unsqueeze(1))
    keys[M:] = torch.iinfo(torch.int64).min


def _unpack(keys: torch.Tensor, M: int) -> Tuple[torch.Tensor, torch.Tensor]:
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7fffffff)).view(torch.float32), M - 1 - (keys & 0xffffffff)


def _odd_even_exchanges(length: int) -> Iterator[Tuple[int, int]]:
    """Pairs of places to exchange, the larger to the first, that sort anything; the length is a power of two."""
    merged = 1
    while merged < length:
        step = merged
        while step:
            first = step % merged
            for i in range(first, length - step):
                if (i - first) // step % 2 == 0 and i // (2 * merged) == (i + step) // (2 * merged):
                    yield i, i + step
            step //= 2
        merged *= 2


def _bitonic_exchanges(length: int) -> Iterator[Tuple[int, int]]:
    """Pairs of places to exchange that sort what rises and then falls, or falls and then rises."""
    step = length // 2
    while step:
        yield from ((i, i + step) for i in range(length) if not i & step)
        step //= 2


def _exchange(rows: List[torch.Tensor], i: int, j: int, spare: torch.Tensor) -> torch.Tensor:
    """Put the larger of each pair in rows[i], the smaller in rows[j]; return the memory that it leaves over."""
    larger, smaller = torch.maximum(rows[i], rows[j], out=spare), torch.minimum(rows[i], rows[j], out=rows[i])
    spare, rows[i], rows[j] = rows[j], larger, smaller
    return spare
