"""What activation sparsity brought in this process: ``meters()``, at its end too with ``SPARSEC_LOG=activation``.

The op counts at every call that it looks at, so rates are those of the real inputs, which may drift from what was
calibrated. Weights that are gone count no more.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsec.plan import Plan


@dataclass(frozen=True)
class Meter:
    """One weight. ``calls``: that were looked at; ``skipped``: of them, those that read a part of the weight. ``left``:
    mean share of columns of x (or of outputs) that was left in all of them, 0 to 1."""

    name: str
    loops: str
    calls: int
    skipped: int
    left: float

    def __str__(self) -> str:
        return f"{self.name}: {1 - self.left:.1%} zeros, {self.skipped} of {self.calls} calls skipped ({self.loops})"


def meters() -> list[Meter]:
    """Of every weight whose activations were looked at, by name. Empty before anything was compiled."""
    if not hasattr(torch.ops.sparsec, "meters"):
        return []
    plans, numbers = torch.ops.sparsec.meters()
    found = []
    for text, (calls, skipped, left, whole) in zip(plans, _fours(numbers), strict=True):
        plan = Plan.decode(text)
        loops = " and ".join(loop for loop, _ in plan.loops)
        found.append(Meter(plan.name or plan.kind, loops, calls, skipped, left / max(whole, 1)))
    return sorted(found, key=lambda m: m.name)


def _fours(numbers: list[int]) -> Iterator[tuple[int, int, int, int]]:
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
