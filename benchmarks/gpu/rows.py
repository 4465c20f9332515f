"""What is measured on a GPU: kinds of sparsity, shapes, rows of x, the speedups asked for, and in which order.

A ``Row`` is frozen and rebuilds its weight from its fields. Rows are ordered so that a run which is stopped early has
measured what says most: large layers, one row of x and sixteen and a prefill, every kind of sparsity, before the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHAPES = ((11008, 4096), (28672, 8192), (14336, 4096), (6144, 4096), (28672, 4096), (4096, 4096))  # [N, K]
FUSED = {(6144, 4096): "fused QKV", (28672, 4096): "fused gate-up"}
MS = (1, 16, 2048, 8, 32, 64, 4, 2, 256, 8192)
PREFILL = 1024
DECODE = 64  # most rows of x for kinds that have nothing to win beyond


@dataclass(frozen=True)
class Regime:
    """One kind of sparsity. ``weight``: the format whose sample the weight is, of ``density``.

    ``formats``: those whose kernels are tried on it. ``peers``: others to compare with, by name: a format of ours, or
    ``cuSPARSELt`` and ``torch BSR``. ``most``: rows of x beyond which it is not measured (0: any); ``least``: below.
    ``kind``: the one family that is tried, where it is for zeros of x (``gated``) or for outputs that nobody reads.
    fp8: x is on the grid of e4m3 too, and dense products of fp8 and of bf16 are both tried.
    """

    name: str
    weight: str
    density: float
    formats: tuple[str, ...]
    peers: tuple[str, ...] = ()
    most: int = 0
    least: int = 0
    kind: str = ""


def _unstructured(percent: int) -> Regime:
    return Regime(f"{percent} %", "index+bf16", 1 - percent / 100, ("index+bf16", "bitmap+bf16"))


REGIMES = {
    r.name: r
    for r in (
        Regime("2:4", "nm:2:4+bf16", 0.5, ("nm:2:4+bf16",), ("cuSPARSELt",)),
        *(_unstructured(percent) for percent in (50, 70, 90)),
        Regime("int4 2:4", "nm:2:4+int4g128", 0.5, ("nm:2:4+int4g128",), ("dense+int4g128",), DECODE),
        Regime("int4", "dense+int4g128", 1.0, ("dense+int4g128",), (), DECODE),
        Regime("8:16", "nm:8:16+bf16", 0.5, ("nm:8:16+bf16",), (), DECODE),
        Regime("64:2:8", "vnm:64:2:8+bf16", 0.25, ("vnm:64:2:8+bf16",)),
        Regime("ternary", "dense+ternary", 1.0, ("dense+ternary",), (), DECODE),
        Regime("block 64", "block:64x64+bf16", 0.2, ("block:64x64+bf16",), ("torch BSR",)),
        _unstructured(80),
        Regime("x 50 %", "panel+bf16", 1.0, ("panel+bf16",), (), 8, kind="gated"),
        Regime("y 50 %", "panel+bf16", 1.0, ("panel+bf16",), (), 8, kind="chosen"),
        Regime("fp8 2:4", "nm:2:4+fp8", 0.5, ("nm:2:4+fp8",), ("cuSPARSELt fp8",), least=PREFILL),
    )
}


@dataclass(frozen=True)
class Target:
    """How many times faster than ``than`` a row should be: ``must``, and ``stretch`` (0: not stated).

    ``than``: ``dense`` (the best of the run), a peer, or a published time of ``fixed_us``. ``shape``: only there;
    ``least``: only for as many weights.
    """

    regime: str
    rows: tuple[int, int]
    than: str
    must: float
    stretch: float = 0.0
    shape: tuple[int, int] | None = None
    least: int = 0
    fixed_us: float = 0.0


ONE, SOME, MANY = (1, 1), (8, 32), (PREFILL, 1 << 30)
LARGE = 11008 * 4096
BLOCKS = 1 / REGIMES["block 64"].density
TARGETS = (
    Target("2:4", ONE, "dense", 1.4, 1.6),
    Target("2:4", ONE, "cuSPARSELt", 1.5, 2.0, least=LARGE),
    Target("50 %", ONE, "dense", 1.15, 1.4),
    Target("70 %", ONE, "dense", 1.7, 2.2),
    Target("90 %", ONE, "dense", 3.5, 5.0),
    Target("8:16", ONE, "dense", 1.35, 1.5),
    Target("64:2:8", ONE, "dense", 2.0, 2.8),
    Target("int4", ONE, "dense", 1.6),
    Target("int4", ONE, "Marlin as published", 1.0, 1.45, shape=(8192, 8192), fixed_us=20.3),
    Target("int4 2:4", ONE, "dense+int4g128", 1.15),
    Target("int4 2:4", ONE, "dense", 0.0, 3.5),
    Target("ternary", ONE, "dense", 3.0, 5.0),
    Target("x 50 %", ONE, "dense", 1.4),
    Target("y 50 %", ONE, "dense", 1.4),
    Target("2:4", SOME, "dense", 1.4, 1.6),
    Target("2:4", SOME, "cuSPARSELt", 1.5, least=LARGE),
    Target("50 %", SOME, "dense", 1.0, 1.3),
    Target("80 %", SOME, "dense", 1.4),
    Target("90 %", SOME, "dense", 1.4, 2.0),
    Target("int4 2:4", SOME, "dense", 2.0, 3.0),
    Target("block 64", SOME, "torch BSR", 1.2),
    Target("block 64", SOME, "dense", 0.0, 0.8 * BLOCKS),
    Target("2:4", MANY, "cuSPARSELt", 0.95, 1.05),
    Target("2:4", MANY, "dense", 1.15),
    Target("fp8 2:4", MANY, "cuSPARSELt fp8", 0.95),
    Target("fp8 2:4", MANY, "dense", 0.0, 1.3),
    Target("50 %", MANY, "dense", 0.9),
    Target("70 %", MANY, "dense", 0.9),
    Target("80 %", MANY, "dense", 0.9),
    Target("block 64", MANY, "dense", 0.7 * BLOCKS),
)


@dataclass(frozen=True)
class Row:
    """x [m, k] times a weight [n, k] of one regime."""

    regime: str
    n: int
    k: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.regime} {self.n}x{self.k} M={self.m}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(
            t
            for t in TARGETS
            if t.regime == self.regime and t.rows[0] <= self.m <= t.rows[1]
            and t.shape in (None, self.shape) and self.n * self.k >= t.least
        )  # fmt: skip


def quick() -> list[Row]:
    """What fits four minutes: one large layer at three numbers of rows, and decode of the largest."""
    first, largest = SHAPES[:2]
    rows = [Row(regime, *first, m) for m in (1, 16) for regime in REGIMES if _takes(regime, m)]
    rows += [Row(regime, *first, 2048) for regime in REGIMES if Row(regime, *first, 2048).targets]
    rows += [Row(regime, *largest, 1) for regime in ("2:4", "50 %", "70 %", "90 %", "int4 2:4", "int4")]
    return [*rows, Row("int4", 8192, 8192, 1)]


def everything() -> list[Row]:
    """The quick rows, then all others: those with a target first, larger layers and usual row counts before others."""
    first = quick()
    rest = [row for row in _grid() if row not in first]
    return first + sorted(rest, key=lambda row: not row.targets)  # stable: within each half the order of the grid


def _grid() -> Iterator[Row]:
    for m in MS:
        for shape in SHAPES:
            yield from (Row(regime, *shape, m) for regime in REGIMES if _takes(regime, m))


def _takes(regime: str, m: int) -> bool:
    most, least = REGIMES[regime].most, REGIMES[regime].least
    return m >= least and (not most or m <= most)


def verdict(target: Target, ratio: float | None) -> str:
    """``stretch``, ``reached``, ``missed``, or ``not measured``; a stretch goal alone is never missed."""
    if ratio is None:
        return "not measured"
    if target.stretch and ratio >= target.stretch:
        return "stretch"
    if not target.must:
        return "below stretch"
    return "reached" if ratio >= target.must else "missed"


def pending(rows: Sequence[Row], done: Sequence[str]) -> list[Row]:
    """Rows whose name is not among ``done``, in their order."""
    known = set(done)
    return [row for row in rows if row.name not in known]
