"""The grid of activation sparsity: layers whose inputs or outputs hold zeros, a gated MLP, a stack with thresholds.

All names start with ``activation``, so that ``--only activation`` runs just these.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import Case, cold_matrices, l3_bytes

ZEROS = (0.5, 0.8, 0.9)
LLAMA = (4096, 11008)  # hidden size, intermediate size
QUICK = (1024, 2816)


def down(zeros: float, threads: int, weights: str = "", size: tuple[int, int] = LLAMA) -> Case:
    """relu(z) through a projection to the hidden size: columns of the weight are skipped."""
    return _layer("down", size[0], size[1], zeros, threads, weights)


def up(zeros: float, threads: int, weights: str = "", size: tuple[int, int] = LLAMA) -> Case:
    """relu(z) times a projection to the intermediate size: rows of the weight are skipped."""
    return _layer("up", size[1], size[0], zeros, threads, weights)


def _layer(kind: str, n: int, k: int, zeros: float, threads: int, weights: str) -> Case:
    matrices = cold_matrices(n, k, "bf16", l3_bytes())
    return Case(kind, threads, "bf16", 0.0, n, k, matrices=matrices, weights=weights, zeros=zeros)


def mlp(zeros: float, threads: int, size: tuple[int, int] = LLAMA) -> Case:
    """down(relu(gate(x)) * up(x))."""
    hidden, inner = size
    return Case("mlp", threads, "bf16", 0.0, inner, hidden, zeros=zeros)


def stack(
    zeros: float, threads: int, weights: str = "", sparsity: float = 0.0, size: tuple[int, int] = LLAMA, blocks: int = 8
) -> Case:
    """Decoder blocks that zero what is small in front of every layer, as TEAL does; one token."""
    hidden, inner = size
    return Case("thresholds", threads, "bf16", sparsity, inner, hidden, weights=weights, blocks=blocks, zeros=zeros)


def standard(threads: int) -> Iterator[Case]:
    """Every target; rows without zeros show what looking for them costs."""
    for weights in ("", "int8"):
        yield from (down(zeros, threads, weights) for zeros in ZEROS)
        yield from (up(zeros, threads, weights) for zeros in ZEROS)
    yield down(0.0, threads)
    yield from (mlp(zeros, threads) for zeros in (0.0, 0.9))
    yield stack(0.5, threads)
    yield stack(0.5, threads, "int8", 0.5)


def full(threads: int) -> Iterator[Case]:
    """Also other shares of zeros, and one thread."""
    yield from standard(threads)
    for weights in ("", "int8", "int4g128"):
        yield from (down(zeros, 1, weights) for zeros in (0.0, *ZEROS))
        yield from (up(zeros, 1, weights) for zeros in (0.0, *ZEROS))
    yield from (mlp(zeros, 1) for zeros in (0.0, *ZEROS))


def quick(threads: int) -> Iterator[Case]:
    """One row of each kind."""
    yield from (down(0.9, threads, weights, QUICK) for weights in ("", "int8"))
    yield up(0.9, threads, size=QUICK)
