"""``reference``: the portable kernels on a made-up machine whose costs are written here, not measured.

Decisions on this target are the same on every machine, which is what goldens, examples and tests of the plan need.
The figures are round numbers of a small AVX2 desktop core (20 GB/s, 40 fp32 GFLOP/s); nothing should be read into them.
"""

from __future__ import annotations

from sparsec.targets.base import DenseRate, KernelRate, Rates, Target

_DENSE_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BANDWIDTH = 20e9
_FLOPS = {"fp32": 40e9, "bf16": 80e9}
_BYTES = {"fp32": 4, "bf16": 2}


def make(variant: str) -> Target:
    return Target(name="reference", isa="portable", bf16_dot=False, cores=1, model="made-up machine")


def rates(threads: int) -> Rates:
    """Fixed costs, whatever the thread count: dense is bound by memory, then by arithmetic."""
    dense = tuple(
        DenseRate(dtype, tuple((m, max(_BYTES[dtype] / _BANDWIDTH, 2 * m / _FLOPS[dtype])) for m in _DENSE_MS))
        for dtype in _FLOPS
    )
    kernels = tuple(
        KernelRate(
            pattern,
            loop,
            dtype,
            tuple((m, 0.0, position + m * slow * position_row, nonzero + m * slow * nonzero_row) for m in (1, 2)),
        )
        for dtype, slow in (("fp32", 1.0), ("bf16", 1.5))
        for pattern, loop, position, position_row, nonzero, nonzero_row in _KERNELS
    )
    return Rates(threads, _BANDWIDTH, 4e-6, dense, kernels, dense_overhead=3e-6)


# pattern, loop, then seconds per position, per position and row of x, per non-zero, per non-zero and row of x
_KERNELS = (
    ("bitmap", "dot", 5e-11, 3e-11, 0.0, 3e-11),
    ("bitmap", "outer", 6e-11, 0.0, 5e-11, 1e-10),
    ("index", "dot", 0.0, 0.0, 5e-11, 2e-10),
    ("index", "outer", 0.0, 0.0, 1e-10, 1e-10),
    ("nm", "dot", 0.0, 0.0, 2e-11, 6e-11),
    ("nm", "outer", 0.0, 0.0, 5e-11, 6e-11),
    ("block", "dot", 0.0, 0.0, 1e-11, 5e-11),
    ("block", "outer", 0.0, 0.0, 1e-11, 5e-11),
)
