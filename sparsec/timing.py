"""Timing on a noisy machine: only ratios of interleaved runs mean anything.

Every function is warmed, then rounds call each once in a rotating order, so that drift (frequency, neighbours, memory
bandwidth) hits all alike. Ratios are taken round by round and their median is given with an order-statistic
confidence interval; absolute times are minima and quantiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)]

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the base: median over rounds, with a 95 % interval [low, high]."""

    value: float
    low: float
    high: float


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    budget_s: float = float("inf"),
    warmup: int = 2,
    min_call_s: float = 2e-4,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Samples]:
    """Time each function once a round; short ones are repeated inside a round up to ``min_call_s``.

    Stops after ``rounds`` or when ``budget_s`` is used up, but never before five rounds.
    """
    started = time.perf_counter()
    repeats = {}
    for name, function in functions.items():
        for _ in range(max(warmup, 1)):
            before = time.perf_counter()
            function()
            once = time.perf_counter() - before
        repeats[name] = max(1, math.ceil(min_call_s / max(once, 1e-7)))
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - started > budget_s:
            break
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            function, n = functions[name], repeats[name]
            before = time.perf_counter()
            for _ in range(n):
                function()
            taken[name].append((time.perf_counter() - before) / n)
        if on_round:
            on_round(i + 1, rounds)
    return {name: Samples(tuple(values)) for name, values in taken.items()}


def speedup(base: Samples, ours: Samples) -> Ratio:
    """base / ours, round by round."""
    ratios = sorted(b / o for b, o in zip(base.seconds, ours.seconds, strict=True))
    n = len(ratios)
    half = 0.98 * math.sqrt(n)  # 1.96 * sqrt(n) / 2: binomial interval of the median's rank
    low = ratios[max(0, math.floor(n / 2 - half))]
    high = ratios[min(n - 1, math.ceil(n / 2 + half) - 1 if n > 1 else 0)]
    return Ratio(ratios[n // 2], low, high)


def certain(base: Samples, ours: Samples) -> Ratio:
    """``speedup``, but no surer of a gain than the quietest moments are.

    Other work may slow dense for many rounds on end and ours less, as one thread that waits holds up a barrier but not
    a queue; then every round agrees on a gain that is not there. The best of each, in rounds that both had, must
    agree as well.
    """
    ratio = speedup(base, ours)
    return Ratio(ratio.value, min(ratio.low, base.best / ours.best), ratio.high)
