"""Device times of calls that a launch would drown: CUDA graphs of many calls on cold weights, replayed in turn.

A call is given its number and chooses its copy of the weight by it; copies are so many that no cache holds them from
one use to the next. Statistics are those of ``sparsec.timing``: one sample a round, order rotating, ratios by round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from sparsec.timing import Samples

Call = Callable[[int], object]
Once = Callable[[], float]  # runs, and gives the seconds of one call

CALLS = 20  # of one graph, at least
COPIES = 4  # of a weight, at least
TIMES_L2 = 3  # what all copies together exceed
SAMPLE_S = 5e-4  # of one sample, at least: the resolution of events is half a microsecond


def copies_of(size: int, l2: int) -> int:
    """Copies of ``size`` bytes that together are more than three times the L2 cache."""
    return max(COPIES, TIMES_L2 * l2 // max(size, 1) + 1)


def calls_of(copies: int) -> int:
    """At least CALLS, and every copy equally often, so that replays are cold as well."""
    return copies * math.ceil(CALLS / copies)


class Timer(Protocol):
    def prepare(self, call: Call, calls: int) -> Once: ...


class GraphTimer:
    """CUDA graphs between events. Raises what a call raises; warm-up compiles what is not compiled."""

    def prepare(self, call: Call, calls: int) -> Once:
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):  # results are freed at once, so the graph's pool holds one of them
                call(i)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def replay(times: int) -> float:
            first.record()
            for _ in range(times):
                graph.replay()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3

        replay(1)
        times = max(1, math.ceil(SAMPLE_S / max(replay(1), 1e-7)))
        return lambda: replay(times) / times / calls


class HostTimer:
    """Without a GPU: the host's clock around one call. Its times mean nothing; all else can be tried."""

    def prepare(self, call: Call, calls: int) -> Once:
        call(0)

        def once() -> float:
            before = time.perf_counter()
            call(0)
            return time.perf_counter() - before

        return once


def alternate(
    ready: Mapping[str, Once], rounds: int, budget_s: float, now: Callable[[], float] = time.perf_counter
) -> dict[str, Samples]:
    """One sample of each a round, in rotating order; at least five rounds, then until the budget is used up."""
    names = list(ready)
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = now()
    for i in range(rounds):
        if i >= 5 and now() - started > budget_s:
            break
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            taken[name].append(ready[name]())
    return {name: Samples(tuple(values)) for name, values in taken.items()}
