"""Seconds of one call as a function of M, the rows of x: linear pieces in, crossovers and sympy text out.

Dense is a line through its measured points; a sparse kernel waits for memory or for arithmetic,
``overhead + Max(bytes / bandwidth, a + b*M)`` and a share of the shorter of the two, with a line of its own between
each two of its points. Everything is linear in M between a few known M, so where two costs cross is solved from pairs
of lines; no M is sampled.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparsec.targets.base import DenseRate, KernelRate, Rates

NEVER_S = 1e9  # what a kernel costs for more rows than it takes
FURTHEST = 2**31  # a crossover beyond this many rows is none


@dataclass(frozen=True)
class Line:
    """``a + b*M`` seconds."""

    a: float
    b: float

    def at(self, m: float) -> float:
        return self.a + self.b * m

    def meets(self, other: Line) -> float | None:
        """The M where both are equal, or None for parallels: the solution of a1 + b1*M = a2 + b2*M."""
        return None if self.b == other.b else (other.a - self.a) / (self.b - other.b)

    def times(self, factor: float) -> Line:
        return Line(self.a * factor, self.b * factor)


@dataclass(frozen=True)
class Piece:
    """The largest of ``lines``, for ``lo <= M <= hi``."""

    lo: float
    hi: float
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Cost:
    """Pieces that cover 1 <= M < infinity, ascending."""

    pieces: tuple[Piece, ...]

    def at(self, m: float) -> float:
        """Seconds at M = ``m``."""
        piece = next(p for p in self.pieces if m <= p.hi)
        return max(line.at(m) for line in piece.lines)

    def times(self, factor: float) -> Cost:
        return Cost(tuple(Piece(p.lo, p.hi, tuple(line.times(factor) for line in p.lines)) for p in self.pieces))

    def mixed(self, share: float, start: float) -> Cost:
        """With ``share`` of what waits for the other added: of lines a and b, which begin at ``start`` seconds, the
        larger of a + share*b and b + share*a. Pieces of other than two lines stay as they are.
        """
        return Cost(tuple(replace(p, lines=_mixed(p.lines, share, start)) for p in self.pieces))

    def knots(self) -> Iterator[float]:
        """Where one piece hands over to the next."""
        yield from (p.hi for p in self.pieces if p.hi < math.inf)

    def meets(self, other: Cost) -> Iterator[float]:
        """Every M at which a line of this cost meets one of the other inside the pieces of both."""
        for mine in self.pieces:
            for theirs in other.pieces:
                lo, hi = max(mine.lo, theirs.lo), min(mine.hi, theirs.hi)
                if lo > hi:
                    continue
                solved = (a.meets(b) for a in mine.lines for b in theirs.lines)
                yield from (m for m in solved if m is not None and lo <= m <= hi and m < FURTHEST)

    def text(self) -> str:
        """The cost as text of a sympy expression in ``M``."""
        return _text(self)


def _mixed(lines: tuple[Line, ...], share: float, start: float) -> tuple[Line, ...]:
    if len(lines) != 2:
        return lines
    pairs = (lines, lines[::-1])
    return tuple(Line(one.a + share * (other.a - start), one.b + share * other.b) for one, other in pairs)


@functools.lru_cache(maxsize=4096)
def _text(cost: Cost) -> str:
    import sympy

    m = sympy.Symbol("M", positive=True)
    parts = [(_expression(p, m, sympy), m <= p.hi) for p in cost.pieces[:-1]]
    last = _expression(cost.pieces[-1], m, sympy)
    return str(sympy.Piecewise(*parts, (last, True), evaluate=False) if parts else last)


def _expression(piece: Piece, m: Any, sympy: Any) -> Any:
    """Max of the lines; those under another for every M are left out here, since sympy takes 10 ms to see it."""
    lines = [x for x in piece.lines if not any(y != x and y.a >= x.a and y.b >= x.b for y in piece.lines)]
    terms = [line.a + line.b * m for line in dict.fromkeys(lines)]
    return terms[0] if len(terms) == 1 else sympy.Max(*terms, evaluate=False)


def dense_cost(rate: DenseRate, weights: int, overhead: float) -> Cost:
    """Dense linear of ``weights`` = N*K: straight lines between the measured M."""
    points = [(m, overhead + weights * seconds) for m, seconds in rate.points]
    return Cost(tuple(Piece(lo, hi, (line,)) for lo, hi, line in through(points, overhead)))


def kernel_cost(rate: KernelRate, rates: Rates, n: int, k: int, stored: int, read: int) -> Cost:
    """A sparse kernel on a weight [n, k] that stores ``stored`` values in ``read`` bytes.

    It either waits for memory or follows straight lines between the measured M, up to the rows it takes; of the shorter
    of the two a share is added.
    """
    start = rates.overhead + rate.call
    memory = Line(start + read / (rate.bandwidth or rates.bandwidth), 0.0)
    points = [(m, start + c * k + p * n * k + nonzero * stored) for m, c, p, nonzero in rate.points]
    pieces = [Piece(lo, hi, (memory, line)) for lo, hi, line in through(points, start)]
    if rate.most:
        pieces = [Piece(p.lo, min(p.hi, rate.most), p.lines) for p in pieces if p.lo <= rate.most]
        pieces.append(Piece(float(rate.most), math.inf, (Line(NEVER_S, 0.0),)))
    return Cost(tuple(pieces)).mixed(rate.exposed_at(stored / max(n * k, 1)), start)


def through(points: list[tuple[int, float]], start: float) -> Iterator[tuple[float, float, Line]]:
    """Straight lines through (M, seconds): (from M, to M, line), covering 1 to infinity.

    Below the first point time stays as it is there, since such kernels work on whole vectors of rows. Beyond the last,
    its line goes on; where there is one point only, from ``start`` seconds at M = 0.
    """
    first, seconds = points[0]
    if len(points) == 1:
        slope = max(seconds - start, 0.0) / first
        points = [*points, (first + 1, seconds + slope)]
    if first > 1:
        yield 1.0, float(first), Line(seconds, 0.0)
    for (m0, s0), (m1, s1) in itertools.pairwise(points):
        last = m1 == points[-1][0]
        slope = (s1 - s0) / (m1 - m0)
        slope = max(slope, 0.0) if last else slope  # two noisy points must not make large M free
        yield float(m0), math.inf if last else float(m1), Line(s0 - slope * m0, slope)


def turning_points(costs: list[Cost]) -> list[int]:
    """Ascending M, from 1, such that the order of the costs is the same from each up to the next."""
    starts = {1}
    exact = [m for cost in costs for m in cost.knots()]
    exact += [m for i, cost in enumerate(costs) for other in costs[i + 1 :] for m in cost.meets(other)]
    for m in exact:
        starts |= {math.floor(m), math.floor(m) + 1}
    return sorted(m for m in starts if m >= 1)
