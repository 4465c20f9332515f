"""What a kernel is to the rest of sparsec: a spec in, C functions and packed tensors out.

The C interface (``codegen/cpp/abi.h`` holds the same struct) has no torch header in it::

    struct Call { const void *x; int64_t x_stride; void *y; int64_t y_stride; const void *bias;
                  const void *const *pack; void *scratch; int64_t m, n, k; int32_t act; float x_scale;
                  const int32_t *active; int64_t active_count; };
    int64_t sparsec_scratch(int64_t m, int64_t k);                           // bytes of scratch for a call, may be 0
    int64_t sparsec_prepare_units(int64_t m, int64_t k);                     // units of work of prepare, may be 0
    void    sparsec_prepare(const Call *, int64_t begin, int64_t end);       // e.g. transpose x into scratch
    void    sparsec_run(const Call *, int64_t tile_begin, int64_t tile_end); // tiles of output columns

``x`` is [m, k] with unit inner stride and ``x_stride`` elements between rows, ``y`` is [m, n] likewise, both of the
spec's dtype; ``bias`` has n elements of the same dtype or is null; ``pack`` points to the data of ``Packed.tensors``
in order. Kernels hold no state and start no thread: the caller splits tiles over torch's own pool, by the prefix sums
in ``Packed.work``. Accumulation is fp32; products of int8 are summed in int32, exactly, and the sums of groups that
have a scale of their own in fp32. ``x_scale`` is for kernels that round x (``KernelSpec.x``): 0 means a scale for each
row of x, a positive number is the one scale of all, a negative one the least that a row's may be. ``active`` is for the
loops of activation sparsity: ascending columns of x that have a value other than zero in some row (``skip``), or rows
of the weight whose outputs are wanted (``select``, which writes no others).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparsec.formats import Format, Pattern

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from sparsec.targets.base import Target

ISAS = ("avx512", "avx2", "portable")
ACTS = ("", "relu", "gelu", "gelu_tanh", "silu")  # the C interface uses the position in this tuple


@dataclass(frozen=True)
class KernelSpec:
    """Everything that shapes a kernel's text.

    ``loop``: ``dot`` (rows of x against rows of W; small M) or ``outer`` (x transposed, M in the vector; larger M);
    ``skip`` reads only the columns of W that meet a value of x, ``select`` only the rows whose outputs are wanted;
    ``unpack`` writes the dense weight and reads no x (``cpp/unpack.h``); every layout with an outer loop has it.
    ``dtype``: of x, y and bias, ``fp32`` or ``bf16``. ``bf16_dot``: the machine has bf16 dot products.
    ``x``: "" takes x as it is, ``int8`` quantises it first (``reference.quantised``). ``int_dot``: what its kernels use
    beyond the ISA, "vnni" on AVX2 and "amx" on AVX-512.
    """

    format: Format
    loop: str
    dtype: str
    isa: str
    bf16_dot: bool = False
    x: str = ""
    int_dot: str = ""

    @classmethod
    def on(cls, target: Target, format: Format, loop: str, dtype: str, x: str = "") -> KernelSpec:
        """The spec of a kernel on a machine, with what the machine has. ``loop``: also with x, as ``way`` spells it."""
        loop, _, rounds = loop.partition("/")
        x = x or rounds
        if not x:
            return cls(format, loop, dtype, target.isa, target.bf16_dot and dtype == "bf16")
        isa = "avx2" if target.isa == "avx512" and not target.int_dot else target.isa
        beyond = target.int_dot if (isa, target.int_dot) in (("avx512", "amx"), ("avx2", "vnni")) else ""
        return cls(format, loop, dtype, isa, x=x, int_dot=beyond)

    @property
    def way(self) -> str:
        """The loop, and what is done to x: ``dot``, ``dot/int8``. Plans and records call a kernel by it."""
        return f"{self.loop}/{self.x}" if self.x else self.loop

    @property
    def name(self) -> str:
        suffix = ("_bf16dot" if self.bf16_dot else "") + ("_x8" if self.x else "") + self.int_dot
        text = f"linear_{self.format}_{self.loop}_{self.dtype}_{self.isa}{suffix}"
        return text.replace(":", "_").replace("+", "_")


@dataclass(frozen=True)
class Packed:
    """A weight in one format. ``tensors`` are contiguous CPU tensors, in the order the kernel reads them.

    ``work``: int64 [tiles + 1], prefix sums of the cost of the tiles (any unit), to split them over threads.
    ``shape`` is [N, K]; ``source_key`` the content hash of the weight it was made from.
    """

    format: Format
    version: int
    tensors: tuple[torch.Tensor, ...]
    work: torch.Tensor
    shape: tuple[int, int]
    source_key: str
    x: str = ""  # of the kernels that read it, as in KernelSpec

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True)
class Kernel:
    """A compiled spec: addresses of the four C functions, valid while the process lives."""

    spec: KernelSpec
    source: Path
    run: int
    prepare: int
    prepare_units: int
    scratch: int


class Family(Protocol):
    """One pattern's file in ``codegen/cpp``: how it packs, unpacks, and what its loops are."""

    kind: str
    loops: tuple[str, ...]

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        """Pack a [N, K] weight; raises PatternMismatch where the weight does not hold the pattern."""
        ...

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The [N, K] weight back, computed by plain torch and independent of the kernels."""
        ...

    def text(self, spec: KernelSpec) -> str:
        """The C++ translation unit."""
        ...
