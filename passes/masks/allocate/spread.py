"""What allocators share: the scores they judge by, and ways to meet a mean exactly.

In: values that say which layer should be sparser. Out: the same, moved as little as it takes so that bounds and the
mean hold, as shares (``shift_to_mean``), as counts of weights (``counts_of``) or as N of M (``keep_of_m``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from sparsec.passes.masks.wanda import Wanda

if TYPE_CHECKING:
    from sparsec.passes.masks.contract import Statistics

Judge = Literal["wanda", "magnitude"]
LOW, HIGH = 0.01, 0.99  # no layer goes or stays as a whole, as in OWL's reference code


def importance(judge: Judge, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
    """Scores [N, K] fp32: Wanda's |W_ij| ||X_j||_2 or |W_ij|. Raises NonFinite."""
    return Wanda().score(weight, stats) if judge == "wanda" else weight.abs()


def shift_to_mean(
    values: torch.Tensor, weights: torch.Tensor, mean: float, low: float = LOW, high: float = HIGH
) -> torch.Tensor:
    """``values + c``, clipped to [low, high], with the one c that makes their mean weighted by ``weights`` ``mean``.

    All 1-D; gives fp64. Bounds that ``mean`` itself is outside of are widened to it.
    """
    values, weights = values.double(), weights.double()
    low, high = min(low, mean), max(high, mean)
    shifted = values + (mean - float(values @ weights / weights.sum()))
    if bool((shifted >= low).all() and (shifted <= high).all()):
        return shifted
    wanted = mean * float(weights.sum())
    down, up = low - float(values.max()), high - float(values.min())
    while down < (middle := (down + up) / 2) < up:
        below = float((values + middle).clamp(low, high) @ weights) < wanted
        down, up = (middle, up) if below else (down, middle)
    return (values + up).clamp(low, high)


def counts_of(shares: torch.Tensor, sizes: torch.Tensor, mean: float) -> torch.Tensor:
    """Whole numbers near ``shares * sizes`` that add up to ``mean * sum(sizes)``, rounded: the largest parts go up.

    All 1-D; ``shares`` have that mean already. Equal parts go up in order.
    """
    exact = shares.double() * sizes.double()
    counts = exact.floor()
    missing = math.floor(mean * int(sizes.sum()) + 0.5) - int(counts.sum())
    first = (exact - counts).sort(descending=True, stable=True).indices[: max(missing, 0)]
    counts[first] += 1
    return counts.long()


def keep_of_m(sparsity: Mapping[str, float], weights: Mapping[str, int], m: int) -> dict[str, int]:
    """Layer name -> N of N:M in 1..m (m is dense), such that all together keep what ``sparsity`` asks of them.

    Each N is the nearest to m * (1 - sparsity); then those that are furthest off move by one as long as that brings
    the number of kept weights nearer. What remains is at most half a step of one layer. With a small m all layers may
    get the same N: 2:4 leaves 0.42 to 0.58 no choice.
    """
    ideal = {name: m * (1.0 - share) for name, share in sparsity.items()}
    kept = {name: min(max(math.floor(n + 0.5), 1), m) for name, n in ideal.items()}
    over = math.fsum(weights[name] * (kept[name] - n) for name, n in ideal.items())
    while True:
        step = -1 if over > 0 else 1
        nearer = [n for n in kept if 1 <= kept[n] + step <= m and abs(over + step * weights[n]) < abs(over)]
        if not nearer:
            return kept
        best = min(nearer, key=lambda name: abs(kept[name] + step - ideal[name]))
        kept[best] += step
        over += step * weights[best]
