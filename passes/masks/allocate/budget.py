"""Time: sparsity goes where this machine turns it into time."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field

from sparsec.errors import BadRecipe
from sparsec.passes.masks.allocate.contract import Allocation
from sparsec.passes.masks.allocate.spread import Judge, importance

if TYPE_CHECKING:
    from sparsec.passes.masks.allocate.contract import Dense, Measured, Value

GRID = tuple(i / 50 for i in range(51))
_HALVINGS = 40  # of an interval of sparsities: to 1e-12
_ROUNDING = 1e-9  # of a sum of seconds


class Point(NamedTuple):
    """A layer at one sparsity: its expected time, and the importance that is lost."""

    sparsity: float
    seconds: float
    lost: float


class Step(NamedTuple):
    """From one corner of a layer's hull to the next: ``price`` is importance a second. Sorts by it."""

    price: float
    layer: int
    to: Point


@dataclass(frozen=True)
class Curve:
    """One layer: importance lost at each sparsity of ``GRID``, and its time."""

    name: str
    weights: int
    lost: Sequence[float]
    seconds: Callable[[str, float], float]

    def at(self, sparsity: float) -> Point:
        """Between two points of the grid the loss is a straight line, which is never too low: it is convex."""
        right = min(max(bisect.bisect_left(GRID, sparsity), 1), len(GRID) - 1)
        x0, x1 = GRID[right - 1], GRID[right]
        part = (sparsity - x0) / (x1 - x0)
        lost = self.lost[right - 1] * (1.0 - part) + self.lost[right] * part
        return Point(sparsity, self.seconds(self.name, sparsity), lost)

    def loosened(self, point: Point, sparsities: Sequence[float]) -> Point:
        """The least loss that takes no longer than ``point``: a layer that zeros do not make faster stays dense."""
        limit = point.seconds * (1.0 + _ROUNDING)
        no_slower = (at for s in sparsities if (at := self.at(s)).seconds <= limit)
        return min([point, *no_slower], key=lambda p: (p.lost, p.sparsity))

    def hull(self, sparsities: Sequence[float]) -> list[Point]:
        """The corners of the lower convex hull of loss over time, from the least loss to the least time."""
        corners: list[Point] = []
        for point in sorted((self.at(s) for s in sparsities), key=lambda p: (p.lost, p.seconds, p.sparsity)):
            if corners and point.seconds >= corners[-1].seconds:
                continue
            while len(corners) > 1 and _price(*corners[-2:]) >= _price(corners[-1], point):
                corners.pop()
            corners.append(point)
        return corners

    def relaxed(self, point: Point, allowed: float) -> Point:
        """The same layer, as little sparse as ``allowed`` seconds let it be."""
        dense = self.at(0.0)
        if dense.seconds <= allowed:
            return dense
        low, high = 0.0, point.sparsity
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.seconds(self.name, middle) <= allowed else (middle, high)
        return self.at(high)


def _price(a: Point, b: Point) -> float:
    return (b.lost - a.lost) / (a.seconds - b.seconds)


@dataclass(frozen=True)
class Time:
    """Keep the most importance in the time of the asked sparsity on this target.

    Minimises the sum over layers of the importance lost, subject to the sum of their expected seconds on the target.
    The time is the constraint and not the mean sparsity: a layer that no sparse kernel serves, or not at its share,
    stays dense, and others go further. The budget is the time of the asked sparsity in every layer, or with
    ``speedup`` the dense time divided by it (then the sparsity is not read). Only the layers of the step are counted.

    A weight's importance is its score squared over the mean of those of its layer. Wanda's squares, summed over what
    is pruned, estimate ||X (W - W')||^2 for uncorrelated inputs, so a layer counts by its relative output error times
    its weights. Scores that are not scaled prune early layers away, whose inputs are small, and without the factor
    large layers go: on a small Llama both were worse than uniform sparsity.

    Solved on the lower convex hull of loss over time of each layer, cheapest importance a second first (Everett,
    "Generalized Lagrange Multiplier Method", 1963); what the last step leaves of the budget goes to the layers that
    paid the most. Source: sparsec's own; the budgeted form follows AMC (He et al., 2018) and SPDY (Frantar and
    Alistarh, 2022), which search instead.
    """

    speedup: Annotated[float, Field(gt=1)] | None = field(
        default=None, metadata={"doc": "of all layers of the step together over dense; null: the time of the sparsity"}
    )
    most: Annotated[float, Field(gt=0, lt=1)] = field(
        default=0.9, metadata={"doc": "no layer gets sparser, unless a higher sparsity is asked"}
    )
    judge: Judge = field(default="wanda", metadata={"doc": "the importance that is kept: wanda or magnitude scores"})
    target: str = field(default="auto", metadata={"doc": "whose time: see sparsec targets"})
    rows: Annotated[int, Field(ge=1)] = field(
        default=1, metadata={"doc": "rows of x a call: 1 for decoding, else batch times tokens"}
    )

    role: ClassVar[str] = "allocate"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    keeps: ClassVar[str] = "time"
    source: ClassVar[str] = "sparsec; budgets as in SPDY, 2022"
    cost: ClassVar[str] = "one pass over the calibration data"

    def measure(self, layers: Sequence[Dense]) -> Value:
        """Layer name -> importance lost at each sparsity of ``GRID``: from 0 at 0 to the number of weights at 1."""
        return {layer.name: self._curve(layer) for layer in layers}

    def _curve(self, layer: Dense) -> list[float]:
        score = importance(self.judge, layer.weight, layer.stats)
        if self.judge == "magnitude":
            score = score.reshape(1, -1)  # one quota a layer; Wanda's is one a row
        ends = [math.floor(s * score.shape[1] + 0.5) for s in GRID[1:-1]]
        parts = score.square().sort(dim=1).values.tensor_split(ends, dim=1)
        sums = [0.0, *itertools.accumulate(float(part.sum(dtype=torch.float64)) for part in parts)]
        return [value / sums[-1] * score.numel() for value in sums] if sums[-1] else sums

    def allocate(self, blocks: Sequence[Measured], sparsity: float) -> Allocation:
        """Sparsities whose expected seconds are at most the budget, and all of it where the layers' times let them.

        Raises BadRecipe where no times are known, or where there is no time to gain, or not enough.
        """
        curves = list(_curves(blocks))
        dense = math.fsum(curve.at(0.0).seconds for curve in curves)
        uniform = [curve.at(sparsity) for curve in curves]
        budget = dense / self.speedup if self.speedup else math.fsum(point.seconds for point in uniform)
        if not self.speedup and budget >= dense:
            raise BadRecipe(
                detail=f"no layer is expected to be faster than dense at sparsity {sparsity:g} on this target, so "
                "there is no time to spread; ask for more sparsity, or use owl"
            )
        most = self.most if self.speedup else max(self.most, sparsity)
        sparsities = sorted({*(s for s in GRID if s <= most), most, min(sparsity, most)})
        chosen = _within(curves, budget, sparsities)
        if chosen is None:
            fastest = math.fsum(curve.hull(sparsities)[-1].seconds for curve in curves)
            raise BadRecipe(
                detail=f"speedup {self.speedup:g} is out of reach: {dense / fastest:.3g} is expected where every layer "
                f"has sparsity {most:g}; ask for less, or raise most"
            )
        if not self.speedup:
            loosened = [curve.loosened(point, sparsities) for curve, point in zip(curves, uniform, strict=True)]
            chosen = min(chosen, loosened, key=_lost)
        shares = {curve.name: point.sparsity for curve, point in zip(curves, chosen, strict=True)}
        return Allocation(shares, (self._note(curves, chosen, uniform, dense),))

    def _note(self, curves: Sequence[Curve], chosen: Sequence[Point], uniform: Sequence[Point], dense: float) -> str:
        total = sum(curve.weights for curve in curves)
        mean = math.fsum(c.weights * p.sparsity for c, p in zip(curves, chosen, strict=True)) / total
        faster = dense / math.fsum(point.seconds for point in chosen)
        said = f"time: mean sparsity {mean:.3f}, expected {faster:.3g} times as fast as dense"
        if self.speedup or not _lost(uniform):
            return said
        saved = 1.0 - _lost(chosen) / _lost(uniform)
        return f"{said}, {100 * saved:.3g} % less importance lost than uniformly in that time"


def _curves(blocks: Sequence[Measured]) -> Iterator[Curve]:
    for block in blocks:
        if block.seconds is None:
            raise BadRecipe(
                detail="method time spreads sparsity by expected seconds, and none are known here; name a target "
                "whose speed was measured, or use owl"
            )
        for name, weights in block.layers:
            lost = block.value[name]
            assert isinstance(lost, Sequence)
            yield Curve(name, weights, lost, block.seconds)


def _lost(points: Sequence[Point]) -> float:
    return math.fsum(point.lost for point in points)


def _within(curves: Sequence[Curve], budget: float, sparsities: Sequence[float]) -> list[Point] | None:
    """A point for each curve, all together in ``budget`` seconds; None where even the fastest are too slow."""
    hulls = [curve.hull(sparsities) for curve in curves]
    chosen = [hull[0] for hull in hulls]
    total = math.fsum(point.seconds for point in chosen)
    steps = sorted(Step(_price(a, b), i, b) for i, hull in enumerate(hulls) for a, b in itertools.pairwise(hull))
    paid: dict[int, float] = {}
    for step in steps:
        if total <= budget:
            break
        total -= chosen[step.layer].seconds - step.to.seconds
        chosen[step.layer] = step.to
        paid[step.layer] = step.price
    if total > budget * (1.0 + _ROUNDING):
        return None
    for i in sorted(paid, key=lambda i: -paid[i]):
        looser = curves[i].relaxed(chosen[i], budget - (total - chosen[i].seconds))
        if looser.lost < chosen[i].lost:
            total -= chosen[i].seconds - looser.seconds
            chosen[i] = looser
    return chosen
