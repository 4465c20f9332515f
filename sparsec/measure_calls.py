"""Timing for rates: calls in, their best seconds out, and whether other work on the machine spoiled them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from sparsec.quiet import others_s, short_of_cores
from sparsec.targets.base import Target
from sparsec.timing import interleave

_BATCH = 10  # rounds after which the minima are compared with those of before
_STEADY = 1.05  # minima that fell by less than this have been found
_MOST_COLD_BYTES = 2**28  # enough where the last-level cache is huge, since many share it
_LEAST_COLD_BYTES = 2**26


def best_seconds(
    calls: Mapping[str, Callable[[], object]], budget_s: float, min_call_s: float = 0.0
) -> tuple[dict[str, float], bool]:
    """The smallest seconds of each call over interleaved rounds, and whether other work kept the machine busy.

    Minima are what the machine can do; finding them takes more rounds on a busy one, so rounds go on while minima
    fall, for at most twice ``budget_s``. Busy: minima still fell at the end, or others used the cores all along.
    """
    best: dict[str, float] = {}
    spent, started, taken = 0.0, time.monotonic(), others_s()
    while True:
        samples = interleave(calls, _BATCH, budget_s - spent / 2, warmup=0 if best else 1, min_call_s=min_call_s)
        now = {name: s.best for name, s in samples.items()}
        fell = any(now[name] * _STEADY < best.get(name, float("inf")) for name in now)
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in now.items()}
        spent += sum(sum(s.seconds) for s in samples.values())
        if not fell or spent > 2 * budget_s:
            others = 0.0 if taken is None else (others_s() or taken) - taken
            return best, fell or short_of_cores(others, time.monotonic() - started, torch.get_num_threads())


def best_seconds_alone_too(
    calls: Mapping[str, Callable[[], object]], budget_s: float, min_call_s: float = 0.0
) -> tuple[dict[str, float], dict[str, float], bool]:
    """``best_seconds`` with all threads, but never more than one needs; with one; and whether the machine was busy.

    Where another process holds a core, threads wait for each other for milliseconds and a call looks a hundred times
    slower than it is. One thread is nearly free of that, and bounds what all of them take.
    """
    seconds, busy = best_seconds(calls, budget_s, min_call_s)
    alone = seconds
    if torch.get_num_threads() > 1:
        with thread_count(1):
            alone, _ = best_seconds(calls, 0.7 * budget_s, min_call_s)
    return {name: min(s, alone[name]) for name, s in seconds.items()}, alone, busy


def plausible(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Measured (M, seconds) without spikes: more rows never take less time, nor more than the same rows in parts.

    Only ever lowers a time, so a spike can make dense look better than it is, not sparse.
    """
    falling = list(itertools.accumulate(reversed(points), lambda right, p: (p[0], min(p[1], right[1]))))
    checked: list[tuple[int, float]] = []
    for m, seconds in reversed(falling):
        in_parts = min((s * -(-m // part) for part, s in checked), default=seconds)
        checked.append((m, min(seconds, in_parts)))
    return tuple(checked)


def cold_linear(dtype: torch.dtype, side: int, cold: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """``F.linear`` with weights [side, side] that take turns, ``cold`` bytes in all: each call reads one that the
    caches have forgotten."""
    copies = max(2, -(-cold // (side * side * dtype.itemsize)))
    weights = itertools.cycle(torch.full((copies, side, side), 0.02, dtype=dtype).unbind())
    return lambda x: torch.nn.functional.linear(x, next(weights))


def cold_bytes(target: Target) -> int:
    """How many bytes to use in turn so that none of them is in a cache when it is used again."""
    return min(max(3 * target.l3_bytes, _LEAST_COLD_BYTES), _MOST_COLD_BYTES)


def tune_log() -> logging.Logger:
    """The logger of measuring and tuning; SPARSEC_LOG=tune shows what it says on stderr."""
    log = logging.getLogger("sparsec.tune")
    if "tune" in os.environ.get("SPARSEC_LOG", "").split(",") and not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    return log


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Run with ``threads`` of torch's threads, and put the old number back."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)
