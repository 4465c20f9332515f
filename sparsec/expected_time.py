"""How long layers take: weights, or a share of zeros that they do not have yet, in; seconds of the plan out.

What the ``time`` allocator asks of an imagined weight whose zeros lie anywhere, and a search of the weights as they
are: the same facts, rates and decision as the backend's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from sparsec import targets
from sparsec.cache import cache_dir
from sparsec.measure import rates, rates_for
from sparsec.options import Policy
from sparsec.passes.decide import cheapest, decide
from sparsec.passes.decide.candidates import dense_way, ways_for
from sparsec.passes.graph import DTYPES
from sparsec.passes.profile.weights import profile
from sparsec.report_data import Cost, expected
from sparsec.targets.base import Rates

_PATTERNS = ("panel", "bitmap", "index")
_STEP = 2  # percent


def seconds_of(
    layers: Mapping[str, torch.Tensor], target: str = "auto", rows: int = 1, cache_folder: str = ""
) -> Callable[[str, float], float]:
    """``seconds(name, sparsity)`` of one call of a layer with ``rows`` rows of x on ``target``.

    ``layers``: name -> weight [N, K]. Never rises with sparsity, and at 0 it is what the dense weight takes. Weights of
    a dtype without kernels cost the same at any sparsity.
    """
    machine, folder = targets.resolve(target), cache_dir(cache_folder)
    known = {name: (*weight.shape, DTYPES.get(weight.dtype, "")) for name, weight in layers.items()}

    @cache
    def measured(dtype: str) -> Rates:
        return rates(machine, torch.get_num_threads(), Path(folder), (dtype,), _PATTERNS)

    @cache
    def imagined(n: int, k: int, dtype: str, zeros: int) -> float:
        return _decided(n, k, dtype, zeros, measured(dtype), rows)

    def seconds(name: str, sparsity: float) -> float:
        n, k, dtype = known[name]
        if not dtype:
            return 1.0
        if sparsity <= 0.0:
            return imagined(n, k, dtype, 0)
        # Margins make a staircase of it, whose steps must not go up.
        whole = math.floor(round(100 * sparsity, 6))  # 100 * 0.58 is below 58 in floating point
        return min(imagined(n, k, dtype, percent) for percent in range(0, whole + 1, _STEP))

    return seconds


def cost_now(layers: Mapping[str, torch.Tensor], target: str = "auto", rows: int = 1, cache_folder: str = "") -> Cost:
    """Seconds of one call of each layer as its weight [N, K] is now, summed, with ``rows`` rows of x on ``target``.

    Layers of a dtype without kernels are left out: both sums are 0 where all are.
    """
    machine, folder = targets.resolve(target), cache_dir(cache_folder)
    dense = ours = 0.0
    for weight in layers.values():
        dtype = DTYPES.get(weight.dtype, "")
        if not dtype:
            continue
        fact = profile(weight)
        known = rates_for(fact, dtype, machine, torch.get_num_threads(), Path(folder))
        if cost := expected(decide(fact, dtype, machine, known, Policy()), rows):
            dense, ours = dense + cost.dense_s, ours + cost.ours_s
    return Cost(dense, ours)


def _decided(n: int, k: int, dtype: str, percent: int, known: Rates, rows: int) -> float:
    """As ``decide`` would choose, but without its words, which take longer than the choice."""
    fact = replace(profile(torch.ones(1, 1)), n=n, k=k, nnz=n * k - n * k * percent // 100, nm=(), blocks=())
    dense, ways = dense_way(fact, dtype, known), ways_for(fact, dtype, known, Policy())
    if dense is None:
        return 1.0
    ranges = cheapest(dense, ways, Policy().min_speedup) if ways else ()
    ran = next((r for r in ranges if r.holds(rows)), None)
    chosen = next((w for w in ways if ran and (w.format, w.kernel) == (ran.format, ran.kernel)), dense)
    return chosen.cost.at(rows)
