"""A target is frozen data: what the machine is, and what was measured on it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Identity of a machine as kernels see it. ``fingerprint`` keys everything measured on it."""

    name: str  # "cpu"
    isa: str  # "avx512", "avx2", "portable"
    bf16_dot: bool
    cores: int
    model: str  # "AMD EPYC", for people
    l2_bytes: int = 0
    l3_bytes: int = 0
    int_dot: str = ""  # "vnni": dot products of int8 (with avx512 also VBMI); "amx": tiles of them too

    @property
    def device(self) -> str:
        """Where weights must be for its kernels: ``cpu`` or ``cuda``."""
        return "cpu"

    @property
    def gpu(self) -> bool:
        """Whether its kernels are those of GPUs; in Triton's interpreter they take weights on the CPU."""
        return self.name == "cuda"

    @property
    def whole_graphs(self) -> bool:
        """Whether graphs are handed to another runtime, which replaces their layers itself."""
        return False

    @property
    def fingerprint(self) -> str:
        flags = "+bf16" if self.bf16_dot else ""
        return f"{self.name}/{self.model}/{self.isa}{flags}/{self.cores}c"


@dataclass(frozen=True)
class DenseRate:
    """Dense linear of one dtype: seconds per weight (N*K = 1) at measured row counts, weights cold in memory."""

    dtype: str
    points: tuple[tuple[int, float], ...]  # ((M, seconds per weight), ...), M ascending


@dataclass(frozen=True)
class KernelRate:
    """One sparse kernel at measured row counts: seconds of arithmetic = column * K + position * N*K + nonzero * nnz.

    ``column`` is for what is done to x before any weight is read. nnz counts stored values: the padding of N:M groups
    and of blocks is computed with.
    """

    pattern: str  # "bitmap", "index", "nm", "block"; or one with its parameters, "nm:2:4", which goes first
    loop: str  # "dot", or "dot/int8" where the kernel rounds x itself
    dtype: str
    points: tuple[tuple[int, float, float, float], ...]  # ((M, column, position, nonzero), ...), M ascending
    bandwidth: float = 0.0  # bytes/s at which this kernel streams weights that are in no cache; 0: as memory does
    stored: tuple[float, float] = (0.0, 0.0)  # bytes of a position and of a kept value; 0, 0: as ``storage_bytes`` says
    most: int = 0  # rows that the kernel takes at most; 0: any number
    values: str = ""  # how kept values are stored, ``int8``; empty: in ``dtype``, that of x
    call: float = 0.0  # seconds that a call takes longer than others, whatever the weight: further launches on a GPU
    # Of waiting for memory and arithmetic, the share of the shorter that the longer does not hide: (share of the values
    # that is kept, that share), the former ascending.
    exposed: tuple[tuple[float, float], ...] = ()

    def exposed_at(self, kept: float) -> float:
        """On straight lines between what was measured; 0 where nothing was."""
        if not self.exposed:
            return 0.0
        for (a, low), (b, high) in itertools.pairwise(self.exposed):
            if kept <= b:
                return low + (high - low) * max(kept - a, 0.0) / (b - a)
        return self.exposed[-1][1]


@dataclass(frozen=True)
class Rates:
    """Measured once per machine and thread count. Bandwidth in bytes/s, all threads; overheads in s per call."""

    threads: int
    bandwidth: float
    overhead: float
    dense: tuple[DenseRate, ...]
    kernels: tuple[KernelRate, ...]
    dense_overhead: float = 0.0
    scaling: float = 1.0  # arithmetic of all threads over that of one
    conv: tuple[DenseRate, ...] = ()  # as ``dense``, of a convolution of some size; M: pixels of its result
    gather: float = 0.0  # seconds, with all threads, for each value of a patch that a convolution's kernel gathers

    @property
    def dense_bandwidth(self) -> float:
        """Bytes of weight per second that a dense fp32 linear of one row reads from memory."""
        return 4 / next(d for d in self.dense if d.dtype == "fp32").points[0][1]
