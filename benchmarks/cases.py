"""What is measured: linear layers and the MiniLM encoder, and the speedups that the project set itself.

Cases of quantised weights are listed in ``benchmarks.quantised_cases``, those of activations that hold zeros in
``benchmarks.activation_cases``.

A ``Case`` is frozen and JSON-able; workers rebuild the same weights and inputs from it, by seed.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quantised_targets import VALUE_BYTES, quantised_target

SHAPES = ((4096, 4096), (11008, 4096))  # [N, K]: out_features, in_features
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
BYTES = {"fp32": 4, "bf16": 2}
HOT_CALLS = 8  # one compiled function holds this many calls, so that calling it weighs little
COLD_TIMES_L3 = 4
QUANTISED_TIMES_L3 = 2  # walking in a circle through twice a cache finds nothing in it, and takes half as long to build
MOST_MATRICES = 24
ENCODER_SHAPES = ((1, 16), (1, 128), (32, 16))

# (dtype, M, sparsity) -> speedup over the best dense peer of the same dtype; cold weights.
TARGETS = {
    **{("bf16", 1, s): r for s, r in ((0.5, 1.4), (0.7, 2.0), (0.8, 2.4), (0.9, 3.0))},
    **{("fp32", 1, s): r for s, r in ((0.5, 1.5), (0.8, 2.7), (0.9, 4.5))},
    **{(dtype, 8, 0.8): 1.8 for dtype in BYTES},
    **{(dtype, 64, s): 0.97 for dtype in BYTES for s in SPARSITIES},
    ("fp32", 64, 0.9): 1.5,
}
ENCODER_TARGETS = {0.8: 1.2, 0.9: 1.2}  # over Inductor, at batch 1 with 16 tokens; everywhere else the floor
ENCODER_FLOOR = 0.98
GATED = ("down", "up", "mlp", "thresholds")
# (kind, share of zeros) -> speedup over the best dense peer of the same weights
GATED_TARGETS = {
    **{(kind, zeros): r for kind in ("down", "up") for zeros, r in ((0.0, 0.97), (0.5, 1.5), (0.8, 3.5), (0.9, 5.0))},
    **{("mlp", zeros): r for zeros, r in ((0.0, 0.97), (0.9, 3.0))},
    ("thresholds", 0.5): 1.35,
}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``kind`` linear: x [m, k] times weight [n, k]. ``kind`` encoder: batch x tokens ids.
    ``kind`` stack: ``blocks`` decoder blocks of hidden size k and intermediate size n, one token.

    ``matrices``: most weights that one call walks through; 1 for hot. ``threads``: of every engine. ``weights``: the
    grid they lie on (``int8`` and ``ternary`` by rows, ``int4g128``), "" for none; ``x8``: x is rounded to int8, too;
    ``pattern``: ``block:16x16`` where zeros come in blocks. ``zeros``: share of the activations that are zero; kinds
    down, up (weight [n, k]), mlp and thresholds (``blocks`` blocks; hidden size k, intermediate size n).
    """

    kind: str
    threads: int
    dtype: str = "fp32"
    sparsity: float = 0.0
    n: int = 0
    k: int = 0
    m: int = 1
    matrices: int = 1
    batch: int = 0
    tokens: int = 0
    weights: str = ""
    x8: bool = False
    pattern: str = ""
    blocks: int = 0
    zeros: float = 0.0

    @property
    def gated(self) -> bool:
        return self.kind in GATED

    @property
    def quantised(self) -> bool:
        return bool(self.weights) and not self.gated

    @property
    def cold(self) -> bool:
        return self.matrices > 1

    @property
    def calls(self) -> int:
        """Layers (or encoders) that one call of the measured function runs."""
        return max(self.matrices, HOT_CALLS) if self.kind in ("linear", "down", "up") else 1

    def distinct(self, bytes_each: float) -> int:
        """Different weights for an engine that reads ``bytes_each`` of one: several caches full, or 1 for hot."""
        if not self.cold:
            return 1
        times = QUANTISED_TIMES_L3 if self.quantised else COLD_TIMES_L3
        return min(max(math.ceil(times * l3_bytes() / bytes_each), 2), self.matrices)

    @property
    def shape(self) -> str:
        if self.kind in ("stack", "thresholds"):
            return f"llama {self.blocks}x{self.k}/{self.n}"
        return f"minilm {self.batch}x{self.tokens}" if self.kind == "encoder" else f"{self.n}x{self.k}"

    @property
    def name(self) -> str:
        """Text for ``--only`` and progress, for example ``4096x4096 bf16 M=1 cold 80% t2``."""
        rows = f" M={self.m} {'cold' if self.cold else 'hot'}" if self.kind == "linear" else ""
        if self.gated:
            grid = f"{self.weights} {self.sparsity:.0%}".strip() if self.weights else self.dtype
            return f"activation {self.kind} {self.shape} {grid} zeros={round(100 * self.zeros)} t{self.threads}"
        if self.quantised:
            grid = f"{self.weights} {self.pattern}".strip()
            x = "int8" if self.x8 else self.dtype
            return f"quantised {self.shape} {grid} x={x}{rows} {self.sparsity:.0%} t{self.threads}"
        return f"{self.shape} {self.dtype}{rows} {self.sparsity:.0%} t{self.threads}"

    @property
    def dense_key(self) -> str:
        """Cases that a dense engine cannot tell apart: it does the same work whatever the zeros."""
        return re.sub(r" \d+%", "", self.name)  # zeros of activations stay: peers are given the same values

    @property
    def target(self) -> float | None:
        """The speedup to reach, where one was set."""
        if self.kind == "encoder":
            small = (self.batch, self.tokens) == (1, 16)
            return ENCODER_TARGETS.get(self.sparsity, ENCODER_FLOOR) if small else ENCODER_FLOOR
        if self.gated:
            if self.kind == "thresholds" and self.sparsity:  # the peer has zeros in its weights, too
                return 1.0
            return GATED_TARGETS.get((self.kind, self.zeros))
        if self.quantised:
            return quantised_target(self.kind, self.weights, self.pattern, self.x8, self.m, self.sparsity, self.cold)
        return TARGETS.get((self.dtype, self.m, self.sparsity)) if self.cold else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def l3_bytes() -> int:
    """Size of the last-level cache that one core sees; 32 MiB where the system does not say."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    except (OSError, ValueError):
        return 32 << 20


def cold_matrices(n: int, k: int, dtype: str, l3: int) -> int:
    """Enough that even the packed weights at the highest sparsity are several times the last-level cache."""
    packed = packed_bytes(n, k, dtype, max(SPARSITIES))
    return min(max(math.ceil(COLD_TIMES_L3 * l3 / packed), 4), MOST_MATRICES)


def packed_bytes(n: int, k: int, values: str, sparsity: float) -> float:
    """The least that is read: a bit a position, or about as much, and the kept values; all of them if they are small.

    ``values``: a dtype of BYTES or a grid of VALUE_BYTES.
    """
    width = {**BYTES, **VALUE_BYTES}[values]
    return n * k * min(1 / 8 + (1 - sparsity) * width, width)


def linear(shape: tuple[int, int], dtype: str, m: int, sparsity: float, cold: bool, threads: int) -> Case:
    n, k = shape
    matrices = cold_matrices(n, k, dtype, l3_bytes()) if cold else 1
    return Case("linear", threads, dtype, sparsity, n, k, m, matrices)


def standard(threads: int) -> Iterator[Case]:
    """The default: every case that has a target, hot weights and one thread for the small shape, the encoder.

    The most telling come first, and cases that a dense engine cannot tell apart stand together, so that it keeps what
    it built.
    """
    pairs = [(shape, dtype) for shape in SHAPES for dtype in BYTES]
    for shape, dtype in pairs:
        yield from (linear(shape, dtype, 1, s, True, threads) for s in SPARSITIES)
    yield from encoders(threads)
    for shape, dtype in pairs:
        yield linear(shape, dtype, 8, 0.8, True, threads)
        yield from (linear(shape, dtype, 64, s, True, threads) for s in (0.5, 0.9))
    yield from (linear(SHAPES[0], dtype, 1, s, False, threads) for dtype in BYTES for s in (0.5, 0.8, 0.9))
    if threads > 1:
        yield from (linear(SHAPES[0], dtype, 1, s, True, 1) for dtype in BYTES for s in (0.5, 0.8, 0.9))


def encoders(threads: int, sparsities: tuple[float, ...] = (0.0, *SPARSITIES)) -> Iterator[Case]:
    for batch, tokens in ENCODER_SHAPES:
        yield from (Case("encoder", threads, "fp32", s, batch=batch, tokens=tokens) for s in sparsities)


def full(threads: int) -> Iterator[Case]:
    """The whole grid: hours on a small machine."""
    for t in sorted({1, threads}):
        for shape in SHAPES:
            for dtype in BYTES:
                for m in (1, 8, 64):
                    for cold in (True, False):
                        yield from (linear(shape, dtype, m, s, cold, t) for s in (0.0, *SPARSITIES))
        yield from encoders(t)


def quick(threads: int) -> Iterator[Case]:
    """A look in about three minutes."""
    for dtype in BYTES:
        yield from (linear(SHAPES[0], dtype, 1, s, True, threads) for s in (0.5, 0.9))
    yield linear(SHAPES[0], "fp32", 64, 0.9, True, threads)
    yield from (Case("encoder", threads, "fp32", s, batch=1, tokens=16) for s in (0.0, 0.8))


def default_threads() -> int:
    """The cores this process may use, at most two unless asked for more: the targets were set for two."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 2)
