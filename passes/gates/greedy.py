"""How a block spreads a sparsity over its layers, greedily (TEAL, algorithm 1).

In: a block, dense still. Out: a share for each site whose mean over weights is the mean of what was asked. Each move
takes the same number of weights out of use, whatever layer it is made in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sparsec.passes.gates.contract import GateBlock
from sparsec.passes.gates.forms import Threshold
from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.layers import Undo, put, shape_of
from sparsec.passes.gates.thresholds import histograms

MOST = 0.95  # of one layer: what is left decides everything, and no kernel gains from more
TRIED = 4  # batches that the error is taken over


def shares(block: GateBlock, step: float) -> dict[str, float]:
    """Site -> share. Sites that no token reached keep what was asked of them."""
    names = list(block.sites)
    seen = histograms(block, names)
    reached = [name for name in names if seen[name].count]
    found = {name: block.sites[name].share for name in names}
    if len(reached) > 1:
        found.update(_spread(block, {name: seen[name] for name in reached}, step))
    return found


def _spread(block: GateBlock, seen: Mapping[str, Histogram], step: float) -> dict[str, float]:
    sizes = {name: _weights(block, name) for name in seen}
    total = sum(sizes.values())
    wanted = sum(block.sites[name].share * size for name, size in sizes.items()) / total
    trial = _Trial(block, seen)
    try:
        share = dict.fromkeys(seen, 0.0)
        known = dict.fromkeys(seen, -math.inf)  # what a move of each site adds, as it was last tried
        while (left := wanted - sum(share[n] * size for n, size in sizes.items()) / total) > 1e-9:
            move = min(step / len(seen), left) * total  # weights
            raised = {n: min(share[n] + move / sizes[n], MOST) for n in seen if share[n] < MOST - 1e-9}
            if not raised:
                break
            best = _cheapest(trial, share, raised, sizes, known)
            share[best] = raised[best]
    finally:
        trial.end()
    return share


def _cheapest(
    trial: _Trial,
    share: Mapping[str, float],
    raised: Mapping[str, float],
    sizes: Mapping[str, int],
    known: dict[str, float],
) -> str:
    """The site whose next move adds least error a weight; ``known`` is brought up to date.

    What a move adds grows as shares do, so one that added more when it was last tried need not be tried again.
    """
    fresh: set[str] = set()
    now = trial.error(share)
    while True:
        best = min(raised, key=lambda n: (known[n], n))
        if best in fresh:
            return best
        more = trial.error({**share, best: raised[best]}) - now
        known[best] = more / ((raised[best] - share[best]) * sizes[best])
        fresh.add(best)


def _weights(block: GateBlock, name: str) -> int:
    n, k = shape_of(block.sites[name].module)
    return n * k


class _Trial:
    """The block with gates whose thresholds are tried, and its outputs without any."""

    def __init__(self, block: GateBlock, seen: Mapping[str, Histogram]) -> None:
        self.block, self.seen = block, seen
        self.dense = [y.float() for _, y in zip(range(TRIED), block.outputs(), strict=False)]
        self.undo: list[Undo] = []
        self.gates: dict[str, Threshold] = {}
        for name in seen:
            module = block.sites[name].module
            self.gates[name] = Threshold()
            self.undo.append(put(module, "", "input", self.gates[name]))

    def error(self, share: Mapping[str, float]) -> float:
        """Sum of squares of what the block's outputs move by."""
        for name, gate in self.gates.items():
            gate.threshold.fill_(self.seen[name].within(share[name]) if share[name] else 0.0)
        found = zip(self.dense, self.block.outputs(), strict=False)
        return sum(float(torch.linalg.vector_norm(y.float() - dense) ** 2) for dense, y in found)

    def end(self) -> None:
        for one in reversed(self.undo):
            one()
