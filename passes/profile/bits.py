"""Counting on a packed mask: one bit a weight in, counts of groups and blocks out.

The mask is a uint8 array [N, ceil(K / 64) * 8], least significant bit first, zero in the padding. A matrix of 45 M
weights is 5.6 MB of bits, so every pattern below is counted exactly, on every group, in a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]
_CHUNK_BYTES = 1 << 20  # of mask looked at in one step: bounds the memory of the counts


def row_bytes(k: int) -> int:
    """Bytes of one padded row: whole 64-bit words, so that groups of up to 64 never cross a word."""
    return -(-k // 64) * 8


def chunks(mask: Mask, rows: int = 1) -> Iterator[Mask]:
    """Bands of whole rows, a multiple of ``rows`` each but for the last."""
    step = max(_CHUNK_BYTES // max(mask.shape[1], 1) // rows, 1) * rows
    for begin in range(0, mask.shape[0], step):
        yield mask[begin : begin + step]


def row_counts(mask: Mask) -> npt.NDArray[np.int64]:
    """Ones in each row, int64 [N]."""
    return np.concatenate(
        [np.bitwise_count(part).sum(1, dtype=np.int64) for part in chunks(mask)] or [np.zeros(0, int)]
    )


def column_union(mask: Mask) -> Mask:
    """OR of all rows: the columns that hold anything."""
    return np.bitwise_or.reduce(mask, axis=0) if mask.shape[0] else np.zeros(mask.shape[1], np.uint8)


def _words(part: Mask, m: int) -> npt.NDArray[Any]:
    return part.view(f"u{max(m, 8) // 8}")


def _ones(value: int, m: int) -> list[int]:
    """Ones in each group of ``m`` bits of a byte."""
    return [(value >> shift & (1 << m) - 1).bit_count() for shift in range(0, 8, m)]


def group_histogram(mask: Mask, k: int, m: int) -> list[int]:
    """Groups of ``m`` (2 to 32, a power of two) along K that hold 0, 1, ... m ones; a row's last may be shorter."""
    counts = np.zeros(m + 1, np.int64)
    bytes_seen = np.zeros(256, np.int64)
    for part in chunks(mask):
        if m <= 8:
            bytes_seen += np.bincount(part.ravel(), minlength=256)
        else:
            counts += np.bincount(np.bitwise_count(_words(part, m)).ravel(), minlength=m + 1)
    if m <= 8:
        for value, times in enumerate(bytes_seen.tolist()):
            for ones in _ones(value, m):
                counts[ones] += times
    padding = mask.shape[0] * (mask.shape[1] * 8 // m - -(-k // m))
    counts[0] -= padding
    return [int(c) for c in counts]


def vnm_violations(mask: Mask, v: int, n: int, m: int) -> int:
    """Blocks of ``v`` rows x ``m`` columns (8, 16, 32) that use more than four columns, or more than ``n`` in a row."""
    broken = 0
    for part in chunks(mask, v):
        words = _strips(_words(part, m), v)
        columns = np.bitwise_count(np.bitwise_or.reduce(words, axis=1))
        fullest = np.bitwise_count(words).max(axis=1)
        broken += int(np.count_nonzero((columns > 4) | (fullest > n)))
    return broken


def block_counts(mask: Mask, n: int, k: int, rows: int, cols: int) -> tuple[int, int]:
    """(blocks that hold anything, real positions inside those) for blocks of ``rows`` x ``cols``, ``cols`` <= 64."""
    last_begin = (k - 1) // cols * cols
    last_column = _column_range(last_begin, k, mask.shape[1])
    used = area = seen = 0
    for part in chunks(mask, rows):
        seen += part.shape[0]
        union = np.bitwise_or.reduce(_strips(part, rows), axis=1)
        widths = _groups_used(union, cols) * cols
        used += int(widths.sum()) // cols
        widths -= (union & last_column).any(axis=1) * (cols - (k - last_begin))
        area += int(widths.sum()) * rows
        if seen == n:
            area -= int(widths[-1]) * (-n % rows)
    return used, area


def _strips(part: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """[R, W] as [ceil(R / rows), rows, W]; rows of zeros fill the last strip."""
    missing = -part.shape[0] % rows
    if missing:
        part = np.concatenate([part, np.zeros((missing, part.shape[1]), part.dtype)])
    return part.reshape(-1, rows, part.shape[1])


def _groups_used(union: Mask, cols: int) -> npt.NDArray[np.int64]:
    """How many groups of ``cols`` (a power of two up to 64) hold anything in each row: int64 [rows]."""
    if cols == 1:
        used: npt.NDArray[Any] = np.bitwise_count(union)
    elif cols < 8:
        table = np.array([sum(c > 0 for c in _ones(value, cols)) for value in range(256)], np.uint8)
        used = table[union]
    else:
        used = _words(union, cols) != 0
    total: npt.NDArray[np.int64] = used.sum(1, dtype=np.int64)
    return total


def thumbnail(mask: Mask, n: int, k: int, side: int = 16) -> tuple[int, ...]:
    """``side`` x ``side`` mean density in percent, row-major; a matrix smaller than that repeats rows or columns."""
    if n == 0 or k == 0:
        return (0,) * side * side
    edges = [(i * k // side, max((i + 1) * k // side, i * k // side + 1)) for i in range(side)]
    picks = np.stack([_column_range(a, b, mask.shape[1]) for a, b in edges])
    cells = []
    for i in range(side):
        top = i * n // side
        band = mask[top : max((i + 1) * n // side, top + 1)]
        for (a, b), pick in zip(edges, picks, strict=True):
            lo, hi = a // 8, -(-b // 8)
            ones = int(np.bitwise_count(band[:, lo:hi] & pick[lo:hi]).sum(dtype=np.int64))
            cells.append(round(100 * ones / (band.shape[0] * (b - a))))
    return tuple(cells)


def _column_range(begin: int, end: int, width: int) -> Mask:
    bits = np.zeros(width * 8, np.uint8)
    bits[begin:end] = 1
    return np.packbits(bits, bitorder="little")


def chance_over(m: int, limit: int, p: float) -> float:
    """Probability that more than ``limit`` of ``m`` independent positions of density ``p`` are set."""
    return sum(math.comb(m, i) * p**i * (1 - p) ** (m - i) for i in range(limit + 1, m + 1))
