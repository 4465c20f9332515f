"""What a GPU is expected to do before anything was measured on it: a target in, ``Rates`` for the cost model out.

Three ceilings, each from data: memory (bytes of the pack over what a copy reaches), instructions (those counted in the
machine code of the kernel, over what the SMs issue) and tensor cores (of kernels that multiply dense tiles). The
sources are ``targets/cuda.py`` and ``codegen/triton/sass.json``. Dense is taken to reach its own roofline, which real
libraries seldom do for few rows, so the comparison leans towards dense; ``tune`` replaces it by measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

from sparsec.codegen.triton import LOOPS, kind_of, loops_of
from sparsec.codegen.triton.census import Count, stored
from sparsec.facts import WeightFact
from sparsec.formats import VALUE_BYTES, Format, Pattern
from sparsec.passes.decide.candidates import PARTS_OF_WEIGHT, allowed, formats_of
from sparsec.passes.decide.candidates import patterns as patterns_of
from sparsec.targets.base import DenseRate, KernelRate, Rates
from sparsec.targets.cuda import GpuTarget

MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
CALL_S = 3e-6  # a kernel from launch to end with next to no work, inside a CUDA graph
ISSUE = 0.8  # of the instruction slots that a well-filled SM uses
HIDING = 0.25  # share of the bandwidth that a kernel loses whose instructions just keep up with memory
HALVES = ("bf16", "fp16")  # of x, where values are codes: the kernels of tensor cores take no other
TENSOR = 0.75  # of the data sheet's rate that dense products reach, by power and clock


@functools.lru_cache(maxsize=256)
def rates(target: GpuTarget, patterns: tuple[Pattern, ...], codes: tuple[Format, ...] = ()) -> Rates:
    """Expected rates on ``target`` of dense and of every kernel for these patterns, and for formats of codes."""
    return Rates(
        threads=target.cores,
        bandwidth=target.bandwidth * target.copy,
        overhead=CALL_S,
        dense=tuple(DenseRate(dtype, _dense(target, dtype)) for dtype in VALUE_BYTES),
        kernels=(
            *(rate for p in patterns for dtype in VALUE_BYTES for rate in _kernels(target, Format(p, dtype), dtype)),
            *(rate for format in codes for dtype in HALVES for rate in _kernels(target, format, dtype)),
        ),
        dense_overhead=CALL_S,
    )


def rates_for(target: GpuTarget, fact: WeightFact, formats: tuple[str, ...] = ()) -> Rates:
    """Those that deciding one weight needs: of the patterns and codes that it holds and the policy allows."""
    usual = (Pattern("bitmap"), Pattern("index"), Pattern("nm", (2, 4)))  # asked about even where they do not hold
    held = dict.fromkeys((*usual, *patterns_of(fact)))
    codes = tuple(f for f in formats_of(fact, "") if f.values and allowed(f, formats))
    return rates(target, tuple(p for p in held if allowed(p, formats)), codes)


def _dense(target: GpuTarget, dtype: str) -> tuple[tuple[int, float], ...]:
    """Seconds for each weight at M rows: memory or tensor cores, whichever takes longer."""
    memory = VALUE_BYTES[dtype] / (target.bandwidth * target.copy)
    return tuple((m, max(memory, 2 * m / (TENSOR * target.flops(dtype)))) for m in MS)


def _kernels(target: GpuTarget, format: Format, dtype: str) -> Iterator[KernelRate]:
    pattern, values = format.pattern, "" if format.values == dtype else format.values
    for kind, loop in loops_of(format):
        most = LOOPS[kind][loop]
        if loop in PREFILL:
            yield from () if values else _prefill(target, loop, dtype)
        elif counts := _counts(format, kind, loop):
            points = tuple(_points(target, dtype, counts))
            first = counts[0]
            busy = min(first.per_unit / first.budget, 1.0)  # a kernel that issues all the time hides less of memory
            part = loop in PARTS_OF_WEIGHT
            yield KernelRate(
                str(pattern), loop, dtype, points, bandwidth=target.bandwidth * target.copy * (1 - HIDING * busy),
                stored=(first.bytes_position, first.bytes_value), most=most, values=values,
                call=CALL_S * (first.launches - 1) if part else 0.0,
            )  # fmt: skip


def _counts(format: Format, kind: str, loop: str) -> list[Count]:
    """Those of the format, M ascending; of a pattern that was not counted, of the nearest that its family has."""
    mine: dict[Format, list[Count]] = {}
    for one in stored():
        counted = Format.parse(one.format)
        same = counted.values == format.values and counted.pattern.kind == format.pattern.kind and one.loop == loop
        if same and kind_of(counted, loop) == kind:
            mine.setdefault(counted, []).append(one)
    if not mine:
        return []
    near = min(mine, key=lambda f: (f != format, abs(_kept(f.pattern) - _kept(format.pattern)), str(f)))
    return sorted(mine[near], key=lambda c: c.m)


def _kept(pattern: Pattern) -> float:
    """Of N:M and V:N:M the share that is kept, of blocks their size: what kernels differ by within a family."""
    if pattern.kind in ("nm", "vnm"):
        return pattern.params[-2] / pattern.params[-1]
    return float(math.prod(pattern.params))


def _points(target: GpuTarget, dtype: str, counts: list[Count]) -> Iterator[tuple[int, float, float, float]]:
    """(M, column, position, nonzero) seconds, from the instructions of one pass and how often the weight is read."""
    issue = target.cores * 4 * 32 * target.clock * ISSUE  # lane instructions a second
    for one in counts:
        seconds = one.per_unit * one.repeats / issue
        tensor = 2 * one.m / (TENSOR * target.flops(dtype))
        if one.unit == "nonzero":
            yield one.m, 0.0, 0.0, seconds
        else:
            yield one.m, 0.0, max(seconds, tensor), 0.0


# Kernels whose code has no count of its own: how many times faster than dense they are expected to be where tensor
# cores are the ceiling. The hardware's 2 is seldom seen (1.2 to 1.6 on Hopper); tuning finds out.
MANY = 256  # rows
PREFILL = {"prefill": 1.2, "cusparselt": 1.25}


def _prefill(target: GpuTarget, loop: str, dtype: str) -> Iterator[KernelRate]:
    """2:4 for many rows: 9 bits, so 1.125 bytes, a weight. With fewer rows their blocks of 128 x 128 do not fill a GPU,
    so no cost is claimed there."""
    if dtype != "fp32" and (loop != "cusparselt" or target.here):
        few = [(m, 0.0, 1.0, 0.0) for m in (1, MANY - 1)]
        points = [(m, 0.0, 2 * m / (TENSOR * target.flops(dtype) * PREFILL[loop]), 0.0) for m in MS if m >= MANY]
        yield KernelRate("nm:2:4", loop, dtype, (*few, *points), stored=(1.125, 0.0))
