"""The grid of quantised weights: int8 by rows, int4 in groups of 128, ternary, blocks, and stacks of decoder blocks.

All names start with ``quantised``, so that ``--only quantised`` runs just these. Cases that a dense engine cannot tell
apart stand together, so that it keeps what it built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from benchmarks.cases import QUANTISED_TIMES_L3, SHAPES, Case, l3_bytes, packed_bytes

SPARSITIES = {"int8": (0.0, 0.5, 0.8, 0.9), "int4g128": (0.0, 0.5, 0.8), "ternary": (0.5,)}
MOST_MATRICES = 16
LLAMA = (8, 11008, 4096)  # blocks, intermediate size, hidden size
SMALL_LLAMA = (2, 2816, 1024)


def linear(
    shape: tuple[int, int],
    weights: str,
    m: int,
    sparsity: float,
    cold: bool,
    threads: int,
    x: str = "int8",
    pattern: str = "",
) -> Case:
    """``x``: ``int8`` for fp32 that is rounded token by token, else the dtype in which it is read."""
    n, k = shape
    matrices = cold_matrices(n, k, weights) if cold else 1
    dtype = "fp32" if x == "int8" else x
    return Case("linear", threads, dtype, sparsity, n, k, m, matrices, weights=weights, x8=x == "int8", pattern=pattern)


def cold_matrices(n: int, k: int, weights: str) -> int:
    """Enough that the smallest pack of any sparsity does not stay in the last-level cache, within MOST_MATRICES."""
    packed = packed_bytes(n, k, weights, max(SPARSITIES[weights]))
    return min(max(math.ceil(QUANTISED_TIMES_L3 * l3_bytes() / packed), 4), MOST_MATRICES)


def stack(weights: str, sparsity: float, threads: int, size: tuple[int, int, int] = LLAMA) -> Case:
    blocks, n, k = size
    return Case("stack", threads, "fp32", sparsity, n, k, weights=weights, x8=True, blocks=blocks)


def standard(threads: int) -> Iterator[Case]:
    """About forty rows: every target, and the neighbours that show where it stops to pay."""
    small, large = SHAPES
    yield from (linear(small, "int8", 1, s, True, threads) for s in SPARSITIES["int8"])
    yield from (linear(small, "int8", 1, s, False, threads) for s in SPARSITIES["int8"])
    yield from (linear(small, "int4g128", 1, s, True, threads) for s in SPARSITIES["int4g128"])
    yield from (linear(small, "int4g128", 1, s, False, threads) for s in (0.5, 0.8))
    yield from (linear(small, "ternary", 1, 0.5, cold, threads) for cold in (True, False))
    yield from (stack(weights, 0.5, threads) for weights in ("int8", "int4g128"))
    yield from (linear(small, "int8", 64, s, False, threads) for s in SPARSITIES["int8"])
    yield linear(small, "int8", 64, 0.9, False, threads, pattern="block:16x16")
    yield linear(small, "int8", 8, 0.8, True, threads)
    yield from (linear(small, "int4g128", m, 0.8, False, threads) for m in (8, 64))
    yield from (linear(large, "int8", 1, s, True, threads) for s in (0.5, 0.8, 0.9))
    yield linear(large, "int4g128", 1, 0.8, True, threads)
    yield linear(large, "int8", 64, 0.9, False, threads)
    yield from (linear(small, "int4g128", 1, s, True, threads, "fp32") for s in (0.5, 0.8))
    yield from (linear(small, "int8", 1, s, True, threads, x) for x in ("fp32", "bf16") for s in (0.5, 0.8))
    if threads > 1:
        yield from (linear(small, "int8", 1, s, cold, 1) for cold in (False, True) for s in (0.5, 0.9))
        yield from (linear(small, weights, 1, SPARSITIES[weights][-1], False, 1) for weights in ("int4g128", "ternary"))


def full(threads: int) -> Iterator[Case]:
    """The whole grid."""
    for t, shape, m, cold in product(sorted({1, threads}), SHAPES, (1, 8, 64), (True, False)):
        for weights, x in product(SPARSITIES, ("int8", "fp32", "bf16")):
            yield from (linear(shape, weights, m, s, cold, t, x) for s in SPARSITIES[weights])
        yield linear(shape, "int8", m, 0.9, cold, t, pattern="block:16x16")
    for t in sorted({1, threads}):
        yield from (stack(weights, s, t) for weights in SPARSITIES for s in SPARSITIES[weights])


def quick(threads: int) -> Iterator[Case]:
    """One row of each kind, about a minute."""
    small = SHAPES[0]
    yield from (linear(small, "int8", 1, s, False, threads) for s in (0.5, 0.8))
    yield linear(small, "int4g128", 1, 0.8, False, threads)
    yield linear(small, "ternary", 1, 0.5, False, threads)
    yield stack("int8", 0.5, threads, SMALL_LLAMA)
