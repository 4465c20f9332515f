"""Which relations hold. In: costs of rows, window by window and draw by draw. Out: verdicts with their numbers.

"A costs less than B" holds when the paired 95 % interval of A - B over windows lies below 0 in every calibration draw
that both were measured on, and when the mean gap is more than four times the spread of Wanda between draws (gate g4).
It does not hold when the interval lies above 0 in every draw. Everything else is not separable. "No more than" allows
5 % of B's cost, "as much as" 5 % either way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsec.evaluate import paired

Kind = Literal["less", "no more", "same"]
Costs = Mapping[tuple[str, int], Sequence[float]]  # (row, draw) -> a cost a window; rows without draws have draw 0

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not separable", "not measured"
MARGIN = 0.05
SPREADS = 4  # a gap has to be so many times the spread over draws
SIGNS: dict[Kind, str] = {"less": "<", "no more": "≤", "same": "="}


@dataclass(frozen=True)
class Pair:
    """Row ``a`` against row ``b``."""

    a: str
    b: str
    kind: Kind = "less"

    def __str__(self) -> str:
        return f"{self.a} {SIGNS[self.kind]} {self.b}"


@dataclass(frozen=True)
class Relation:
    """A claim about rows of one kind of model, all pairs of which have to hold. ``said``: who says it.

    ``hard``: where it does not hold, something is broken, and the command says so by its exit code.
    """

    text: str
    said: str
    pairs: tuple[Pair, ...]
    model: str = "causal"
    hard: bool = False


@dataclass(frozen=True)
class Found:
    """``gap``: a - b, mean over draws; ``low``, ``high``: the outermost bounds of the draws' intervals."""

    pair: Pair
    verdict: str
    draws: int = 0
    gap: float = 0.0
    low: float = 0.0
    high: float = 0.0
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        numbers = {"gap": round(self.gap, 5), "low": round(self.low, 5), "high": round(self.high, 5)}
        return {"pair": str(self.pair), "verdict": self.verdict, "draws": self.draws, **numbers, "why": self.why}


def common_draws(costs: Costs, a: str, b: str, fixed: frozenset[str]) -> list[tuple[int, int]]:
    """Numbers of the draws to pair. Rows in ``fixed`` are the same in every draw: theirs is 0."""

    def of(name: str) -> set[int]:
        return {draw for row, draw in costs if row == name}

    if a in fixed and b in fixed:
        return [(0, 0)] if 0 in of(a) & of(b) else []
    if a in fixed:
        return [(0, draw) for draw in sorted(of(b))] if of(a) else []
    if b in fixed:
        return [(draw, 0) for draw in sorted(of(a))] if of(b) else []
    return [(draw, draw) for draw in sorted(of(a) & of(b))]


def spread(costs: Costs, name: str) -> float | None:
    """Standard deviation of a row's mean cost over draws; None with fewer than two."""
    means = [statistics.fmean(values) for (row, _), values in sorted(costs.items()) if row == name]
    return statistics.stdev(means) if len(means) > 1 else None


def judge(pair: Pair, costs: Costs, fixed: frozenset[str] = frozenset()) -> Found:
    """One pair's verdict. ``fixed``: rows that no calibration draw changes."""
    draws = common_draws(costs, pair.a, pair.b, fixed)
    if not draws:
        return Found(pair, MISSING)
    gaps, bounds, said = [], [], []
    for i, j in draws:
        a, b = costs[pair.a, i], costs[pair.b, j]
        gap, interval = paired([x - y for x, y in zip(a, b, strict=True)])
        interval = interval or (float("-inf"), float("inf"))
        gaps.append(gap)
        bounds.append(interval)
        said.append(_one(pair.kind, interval, MARGIN * abs(statistics.fmean(b))))
    verdict = said[0] if len(set(said)) == 1 else OPEN
    why = "" if len(set(said)) == 1 else "draws differ"
    gap = statistics.fmean(gaps)
    if verdict in (HOLDS, FAILS) and pair.kind == "less":
        wanda = spread(costs, f"wanda {pair.b.rsplit(' ', 1)[-1]}")
        if wanda is not None and abs(gap) < SPREADS * wanda:
            verdict, why = OPEN, f"gap under {SPREADS} spreads of Wanda ({wanda:.4f})"
    return Found(pair, verdict, len(draws), gap, min(low for low, _ in bounds), max(high for _, high in bounds), why)


def _one(kind: Kind, interval: tuple[float, float], margin: float) -> str:
    low, high = interval
    if kind == "less":
        return HOLDS if high < 0 else FAILS if low > 0 else OPEN
    if kind == "no more":
        return HOLDS if high <= margin else FAILS if low > margin else OPEN
    return HOLDS if -margin <= low and high <= margin else FAILS if low > margin or high < -margin else OPEN


def together(found: Sequence[Found]) -> str:
    """A relation's verdict from its pairs': it fails with one, and holds when all do."""
    verdicts = {f.verdict for f in found}
    for verdict in (FAILS, OPEN, MISSING):
        if verdict in verdicts:
            return verdict if verdict != MISSING or verdicts == {MISSING} else "holds where measured"
    return HOLDS
