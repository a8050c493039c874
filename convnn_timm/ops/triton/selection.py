"""Select the k largest scores with the scores kept on chip: no Q x M tensor, one pass over the candidates.

A program holds a tile of queries and walks over tiles of candidates. A score and its candidate are packed in one int64
key whose order is "larger score first, then lower candidate index", so that ties need no care anywhere else.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .._common import has_direction
from . import block, configs, on_device

LOWEST = tl.constexpr(-2 ** 63)
HIGHEST = tl.constexpr(2 ** 63 - 1)
NAN_BITS = tl.constexpr(0x7fc00000)


def knn(
        query: torch.Tensor,
        candidates: torch.Tensor,
        offset: Optional[torch.Tensor],
        exclude: Optional[torch.Tensor],
        k: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest `score[q, m] = query[q] . candidates[m] + offset[m]` of every query, all in float32.

    Equal scores go to the lower index, NaN counts as the largest, the excluded candidate comes last. Without an offset
    a query without direction scores 0.

    Args:
        query: (B, Q, C), float32 or narrower.
        candidates: (B, M, C) float32.
        offset: (B, M) float32.
        exclude: (Q,) int64, -1 for none.
        k: At most M and 64.

    Returns:
        score (B, Q, k) float32 and index (B, Q, k) int64, largest first.
    """
    (B, Q, C), M = query.shape, candidates.shape[1]
    query = query.to(candidates.dtype)
    query = query * has_direction(query) if offset is None else query
    score = query.new_empty((B, Q, k))
    index = query.new_empty((B, Q, k), dtype=torch.int64)
    if index.numel():
        offset, exclude = (None if t is None else t.contiguous() for t in (offset, exclude))
        with on_device(query):
            _knn[lambda meta: (B * triton.cdiv(Q, meta['BQ']),)](
                query.contiguous(), candidates.contiguous(), offset, exclude, score, index,
                Q, M, C, k, KP=max(2, triton.next_power_of_2(k)), BC=block(C, 32))
    return score, index


@triton.jit
def _products(
        query, candidates, row, column, row_ok, column_ok, C,
        BC: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
):
    """(BQ, BM) products of query and candidate rows, in full float32: the ranks depend on every bit."""
    product = tl.zeros((BQ, BM), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        a = tl.load(query + row[:, None] * C + c[None, :], row_ok[:, None] & (c < C)[None, :], 0.)
        b = tl.load(candidates + column[None, :] * C + c[:, None], column_ok[None, :] & (c < C)[:, None], 0.)
        product = tl.dot(a, b, product, input_precision='ieee')
    return product


@triton.jit
def _pack(score, m, M):
    """int64 keys that order by score, then by lower m. A float's bits order like an integer, negative ones reversed."""
    bits = tl.where(score == 0, 0., score).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(bits < 0, bits ^ 0x7fffffff, bits)
    bits = tl.where(score != score, NAN_BITS, bits)
    return (bits.to(tl.int64) << 32) | (M - 1 - m).to(tl.int64)


@triton.jit
def _unpack(key, M):
    bits = (key >> 32).to(tl.int32)
    score = tl.where(bits < 0, bits ^ 0x7fffffff, bits).to(tl.float32, bitcast=True)
    return score, M - 1 - (key & 0xffffffff)


@triton.autotune(
    configs(
        triton.Config({'BQ': 64, 'BM': 64}, num_warps=8),
        triton.Config({'BQ': 32, 'BM': 128}, num_warps=8),
        triton.Config({'BQ': 32, 'BM': 64}, num_warps=8),
        triton.Config({'BQ': 32, 'BM': 32}, num_warps=4),
        triton.Config({'BQ': 16, 'BM': 64}, num_warps=4),
    ),
    key=['Q', 'M', 'C', 'k'],
)
@triton.jit
def _knn(
        query, candidates, offset, exclude, score, index, Q, M, C, k,
        KP: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
):
    tiles = tl.cdiv(Q, BQ)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    q = (tl.program_id(0) % tiles) * BQ + tl.arange(0, BQ)
    query += b * Q * C
    candidates += b * M * C
    row = q.to(tl.int64)
    if exclude is not None:
        excluded = tl.load(exclude + q, q < Q, -1)

    # The k best keys so far, in no order. Unused slots are higher than any key and so never give way.
    slot = tl.arange(0, KP).to(tl.int64)
    best = tl.where(slot < k, LOWEST + slot, HIGHEST - slot)[None, :].broadcast_to(BQ, KP)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        s = _products(query, candidates, row, m.to(tl.int64), q < Q, m < M, C, BC, BQ, BM)
        if offset is not None:
            s += tl.load(offset + b * M + m, m < M, 0.)[None, :]
        if exclude is not None:
            s = tl.where(m[None, :] == excluded[:, None], float('-inf'), s)
        key = tl.where((m < M)[None, :], _pack(s, m[None, :], M), LOWEST)
        # Each round puts the tile's best key of every row in the place of the worst kept one. A tile that holds
        # nothing better costs no round, and after the first tiles few rounds are left.
        top, worst = tl.max(key, 1), tl.min(best, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            replace = (top > worst)[:, None] & (best == worst[:, None])
            best = tl.where(replace, top[:, None], best)
            key = tl.where(key == top[:, None], LOWEST, key)
            top, worst = tl.max(key, 1), tl.min(best, 1)

    value, place = _unpack(tl.sort(best, descending=True), M)
    if exclude is not None:  # its true score, if it had to be taken
        own = tl.zeros((BQ,), tl.float32)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            ok = (q < Q)[:, None] & (c < C)[None, :]
            a = tl.load(query + row[:, None] * C + c[None, :], ok, 0.)
            own += tl.sum(a * tl.load(candidates + tl.maximum(excluded, 0)[:, None] * C + c[None, :], ok, 0.), 1)
        if offset is not None:
            own += tl.load(offset + b * M + tl.maximum(excluded, 0), q < Q, 0.)
        value = tl.where(place == excluded[:, None], own[:, None], value)
    unused = KP - k  # they sort first
    ok = (q < Q)[:, None] & (slot >= unused)[None, :]
    out = (b * Q + row)[:, None] * k + (slot - unused)[None, :]
    tl.store(score + out, value, ok)
    tl.store(index + out, place, ok)
