"""What activation sparsity brought in this process: ``meters()``, at its end too with ``SPARSEC_LOG=activation``.

The ops count, on CPUs at every call that may skip, on GPUs at some of those that do, so rates are those of the real
inputs, which may drift from what was calibrated. Weights that are gone count no more.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from sparsec.plan import Plan


@dataclass(frozen=True)
class Meter:
    """One weight. ``calls``: that might have read a part of it; ``skipped``: those that did. ``left``: mean share of
    columns of x (or of outputs) that was left where it was counted, 0 to 1."""

    name: str
    loops: str
    calls: int
    skipped: int
    left: float

    def __str__(self) -> str:
        return f"{self.name}: {1 - self.left:.1%} zeros, {self.skipped} of {self.calls} calls skipped ({self.loops})"


def meters() -> list[Meter]:
    """Of every weight whose activations were looked at, by name. Empty before anything was compiled."""
    found = []
    for text, (calls, skipped, left, whole) in (*_on_cpu(), *_on_gpu()):
        plan = Plan.decode(text)
        loops = " and ".join(loop for loop, _ in plan.loops)
        found.append(Meter(plan.name or plan.kind, loops, calls, skipped, left / max(whole, 1)))
    return sorted(found, key=lambda m: m.name)


Counts: TypeAlias = "tuple[int, int, int, int]"  # calls, skipped, left, and whole: columns that were looked at


def _on_cpu() -> Iterator[tuple[str, Counts]]:
    if hasattr(torch.ops.sparsec, "meters"):
        plans, numbers = torch.ops.sparsec.meters()
        yield from zip(plans, _fours(numbers), strict=True)


def _on_gpu() -> Iterator[tuple[str, Counts]]:
    module = sys.modules.get("sparsec.runtime.gpu")  # only where it was used
    for (_, text), entry in list(module.TABLE.entries.items()) if module else ():
        watches = [route.watch for route in entry.routes if route.watch and route.watch.calls]
        for watch in watches:
            watch.collect()
        if any(watch.looked for watch in watches):
            sums = [sum(values) for values in zip(*((w.calls, w.skipped, w.left) for w in watches), strict=True)]
            yield text, (sums[0], sums[1], sums[2], sum(w.looked * w.whole for w in watches))


def _fours(numbers: list[int]) -> Iterator[Counts]:
    it = iter(numbers)
    return zip(it, it, it, it, strict=True)


@functools.cache
def say_at_the_end() -> None:
    """Print the meters when the process ends, where ``SPARSEC_LOG`` says ``activation``."""
    if "activation" in os.environ.get("SPARSEC_LOG", "").split(","):
        atexit.register(_say)


def _say() -> None:
    for meter in meters():
        print(f"sparsec: {meter}", file=sys.stderr)
