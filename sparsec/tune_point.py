"""What the CPU and the GPU each bring to the one tuner: ways to try at one M, and a clock for them.

The tuner (``tune.py``) chooses efforts, budgets, statistics and records; a ``Point`` knows how a kernel is called and
timed on its machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparsec.efforts import Effort
from sparsec.facts import WeightFact
from sparsec.formats import Format
from sparsec.options import Policy
from sparsec.passes.decide import Gates
from sparsec.passes.decide.candidates import Way, dense_way, ways_for
from sparsec.passes.decide.gates import MARGIN, MOST_ROWS, expected_share, skippers
from sparsec.targets.base import Rates
from sparsec.timing import Samples
from sparsec.tune_record import Key


@dataclass(frozen=True)
class Trial:
    """One way to try: what runs, and the seconds that the cost model expects of it and of dense.

    ``margin``: how many times faster than asked the model must expect it to be, where it decides alone. ``left``: the
    share of columns (or outputs) that is left by the zeros of activations.
    """

    run: Any
    model_s: float
    model_dense_s: float
    margin: float = 1.0
    left: float = 1.0

    @property
    def promised(self) -> float:
        """Times faster than dense, as far as the model alone would be believed."""
        return self.model_dense_s / self.model_s / self.margin


@dataclass(frozen=True)
class Timed:
    """Seconds of dense and of each way in the same rounds.

    ``busy``: others used what the clock needs. ``late``: ways that the budget left no time to prepare.
    """

    dense: Samples
    ways: Mapping[Key, Samples]
    busy: bool = False
    late: tuple[Key, ...] = ()


class Point(Protocol):
    """One weight [N, K] on one machine."""

    def trials(self, m: int, effort: Effort) -> dict[Key, Trial]:
        """The ways worth measuring for ``m`` rows of x, cheapest by the model first."""
        ...

    def measure(self, trials: Mapping[Key, Trial], m: int, effort: Effort, budget_s: float) -> Timed | None:
        """Time the ways beside dense. One that cannot be made or run is missing; None where nothing can be timed."""
        ...


def promising(
    fact: WeightFact, dtype: str, rates: Rates, policy: Policy, m: int, effort: Effort, x: str = ""
) -> Iterable[tuple[Way, Trial]]:
    """The sparse ways that the model does not call hopeless at ``m`` rows, cheapest first, with trials to fill in.

    ``x``: "int8" where the graph rounds x to it.
    """
    dense = dense_way(fact, dtype, rates)
    if dense is None:
        return []
    ways = ways_for(fact, dtype, rates, policy, x)
    limit = float("inf") if policy.min_speedup == 0 else effort.hopeless * dense.cost.at(m)
    ways = sorted((w for w in ways if w.cost.at(m) <= limit), key=lambda w: w.cost.at(m))
    dense_s = dense.cost.at(m)
    return [(way, Trial(None, way.cost.at(m), dense_s, way.margin)) for way in ways[: effort.candidates]]


def promising_parts(
    fact: WeightFact, dtype: str, rates: Rates, policy: Policy, m: int, effort: Effort, gates: Gates
) -> Iterable[tuple[Format, str, Trial]]:
    """(format, loop, trial) of kernels that read what the zeros of activations leave, likewise.

    ``gates``: loops with the share that is left of the weight; None: not known.
    """
    dense = dense_way(fact, dtype, rates)
    if dense is None or m > MOST_ROWS:
        return
    limit = float("inf") if policy.min_speedup == 0 else effort.hopeless * dense.cost.at(m)
    for loop, left in gates:
        share = expected_share(left)
        found = [(s.seconds(share, m, rates, fact.n, fact.k), s) for s in skippers(fact, dtype, rates, policy, loop)]
        kept = sorted((pair for pair in found if pair[0] <= limit), key=lambda pair: pair[0])
        for seconds, skipper in kept[: effort.candidates]:
            yield skipper.format, loop, Trial(None, seconds, dense.cost.at(m), MARGIN, share)


def left_at_random(left: float, size: int) -> torch.Tensor:
    """Which of ``size`` columns or outputs are left, a share of them and at least one: ascending, int32."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[: max(round(left * size), 1)].sort().values.to(torch.int32)


def part_name(loop: str, left: float) -> str:
    """The loop of a ``Key`` of a kernel that reads a share of the weight."""
    return f"{loop}@left={left:.2f}"
