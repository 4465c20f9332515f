"""What a GPU is expected to do before anything was measured on it: a target in, ``Rates`` for the cost model out.

Three ceilings, each from data: memory (bytes of the pack over what a copy reaches), instructions (those counted in the
machine code of the kernel, over what the SMs issue) and tensor cores (of kernels that multiply dense tiles). The
sources are ``targets/cuda.py`` and ``codegen/triton/sass.json``. Dense is taken to reach its own roofline, which real
libraries seldom do for few rows, so the comparison leans towards dense; ``tune`` replaces it by measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from sparsec.codegen.triton import LOOPS, kind_of
from sparsec.codegen.triton.census import Count, stored
from sparsec.formats import VALUE_BYTES, Format
from sparsec.targets.base import DenseRate, KernelRate, Rates
from sparsec.targets.cuda import GpuTarget

MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
CALL_S = 3e-6  # a kernel from launch to end with next to no work, inside a CUDA graph
ISSUE = 0.8  # of the instruction slots that a well-filled SM uses
TENSOR = 0.75  # of the data sheet's rate that dense products reach, by power and clock


@functools.lru_cache(maxsize=16)
def rates(target: GpuTarget) -> Rates:
    """Expected rates of every kernel of ``sass.json`` and of dense, on ``target``."""
    copy = target.bandwidth * target.copy
    return Rates(
        threads=target.cores,
        bandwidth=copy,
        overhead=CALL_S,
        dense=tuple(DenseRate(dtype, _dense(target, dtype)) for dtype in VALUE_BYTES),
        kernels=(*_kernels(target), *_prefill(target)),
        dense_overhead=CALL_S,
    )


def _dense(target: GpuTarget, dtype: str) -> tuple[tuple[int, float], ...]:
    """Seconds for each weight at M rows: memory or tensor cores, whichever takes longer."""
    memory = VALUE_BYTES[dtype] / (target.bandwidth * target.copy)
    return tuple((m, max(memory, 2 * m / (TENSOR * target.flops(dtype)))) for m in MS)


def _kernels(target: GpuTarget) -> Iterator[KernelRate]:
    groups: dict[tuple[str, str], list[Count]] = {}
    for one in stored():
        groups.setdefault((one.format, one.loop), []).append(one)
    for (name, loop), counts in groups.items():
        format = Format.parse(name)
        if format.values in VALUE_BYTES:  # of real values; grids of integers are not looked for in plain weights yet
            counts.sort(key=lambda c: c.m)
            yield KernelRate(
                str(format.pattern), loop, format.values, tuple(_points(target, format.values, counts)),
                stored=(0.0, counts[0].bytes_kept), most=_most(name, loop),
            )  # fmt: skip


# Kernels whose code has no count of its own: how many times faster than dense they are expected to be where tensor
# cores are the ceiling. The hardware's 2 is seldom seen (gpu-kernels: 1.2 to 1.6 on Hopper); tuning finds the rest.
PREFILL = {"prefill": 1.2, "cusparselt": 1.25}


def _prefill(target: GpuTarget) -> Iterator[KernelRate]:
    """2:4 for many rows. What has 9 bits a weight reads 1.125 bytes of it; below 64 rows they work as for 64."""
    for loop, gain in PREFILL.items():
        if loop == "cusparselt" and not target.here:
            continue
        for dtype in ("bf16", "fp16"):
            points = ((m, 0.0, 2 * m / (TENSOR * target.flops(dtype) * gain), 0.0) for m in MS if m >= 64)
            yield KernelRate("nm:2:4", loop, dtype, tuple(points), stored=(1.125, 0.0))


def _most(name: str, loop: str) -> int:
    return LOOPS[kind_of(Format.parse(name), loop)][loop]


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
