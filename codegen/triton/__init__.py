"""Triton kernels for NVIDIA GPUs: one family a pattern, each in its own file, imported when first asked for.

Importing this package imports no triton; asking for a family does. Raises NoTriton where it is missing.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, cast

from sparsec.errors import NoTriton, RoundTripMismatch
from sparsec.formats import Format, Pattern

if TYPE_CHECKING:
    import torch

    from sparsec.codegen.spec import Packed
    from sparsec.codegen.triton.contract import Family

FAMILIES = {
    kind: f"sparsec.codegen.triton.{kind}:FAMILY"
    for kind in ("bitmap", "block", "dense", "fragment", "groups", "index", "nm", "nm24", "vnm", "vnm24")
}
# For any weight: what the zeros of activations leave of it is read, columns or rows.
GATES = {kind: f"sparsec.codegen.triton.{kind}:FAMILY" for kind in ("gated", "chosen")}
# family -> its loops and the most rows of x each takes (0: any), so that a plan can be made without triton
LOOPS: dict[str, dict[str, int]] = {
    "bitmap": {"tile": 0},
    "block": {"mma": 0},
    "dense": {"gemv": 8, "mma": 0},
    "fragment": {"skinny": 32},
    "groups": {"mma": 0, "gemv": 8},
    "index": {"gather": 8},
    "nm": {"gather": 8, "tile": 0},
    "nm24": {"skinny": 64},
    "vnm": {"gather": 8, "tile": 0},
    "vnm24": {"skinny": 8},
    "gated": {"skip": 8},
    "chosen": {"select": 8},
    "prefill24": {"prefill": 0},
    "cslt": {"cusparselt": 0},
}
OTHERS = {  # families that are not Triton's: CUDA C++ text, and a library
    "prefill24": "sparsec.codegen.cuda.families:PREFILL",
    "cslt": "sparsec.codegen.cuda.families:CSLT",
}
_TENSOR_CORES = {  # families of a pattern, or of all of a kind, besides that of its own kind
    "nm:2:4": ("nm24", "prefill24", "cslt"),
    "nm:4:8": ("fragment",),
    "nm:8:16": ("fragment",),
    "dense": ("fragment",),
    "vnm": ("vnm24",),
    "panel": tuple(GATES),
}
KNOWN = ("3.6", "3.9")  # versions of Triton that the kernels were compiled with, first and last


@functools.cache
def family(kind: str) -> Family:
    """The family of a pattern kind, a key of ``FAMILIES`` or ``GATES``. Raises KeyError for any other, and NoTriton."""
    module, _, name = {**FAMILIES, **GATES, **OTHERS}[kind].partition(":")
    if kind not in OTHERS:
        need_triton()
    return cast("Family", getattr(importlib.import_module(module), name))


def kinds_of(format: Format) -> tuple[str, ...]:
    """The families that pack a format, by kind; some are for tensor cores, besides that of the pattern."""
    kind = _own_kind(format.pattern)
    return tuple(k for k in (*_TENSOR_CORES.get(str(format.pattern), _TENSOR_CORES.get(kind, ())), kind) if k in LOOPS)


def _own_kind(pattern: Pattern) -> str:
    """The family that is for a pattern; blocks of one row are groups."""
    return "groups" if pattern.kind == "block" and pattern.params[0] == 1 else pattern.kind


def kind_of(format: Format, loop: str) -> str:
    """The family that has this loop for the format. Raises KeyError where none has."""
    for kind in kinds_of(format):
        if loop in LOOPS[kind]:
            return kind
    raise KeyError(f"{format} has no loop {loop}")


def loops_of(format: Format) -> list[tuple[str, str]]:
    """(family, loop) of everything that computes with the format."""
    return [(k, loop) for k in kinds_of(format) for loop in LOOPS[k] if _takes(format.pattern, loop)]


def _takes(pattern: Pattern, loop: str) -> bool:
    """A tile of N:M is put together from halves, so its groups have 1, 2, 4, ... or 32 columns; blocks are tiles of
    tensor cores, or groups of 16 columns."""
    if pattern.kind == "block":
        return all(size in (16, 32, 64, 128) for size in pattern.params) or pattern.params == (1, 16)
    if pattern.kind not in ("nm", "vnm") or loop != "tile":
        return True
    m = pattern.params[-1] if pattern.kind == "nm" else 4
    return m <= 32 and m & (m - 1) == 0


def family_of(format: Format, loop: str) -> Family:
    return family(kind_of(format, loop))


def need_triton() -> str:
    """Triton's version. Raises NoTriton."""
    try:
        import triton
    except ImportError as error:
        raise NoTriton(needs=f"triton {KNOWN[0]} or newer", found=f"it cannot be imported ({error})") from None
    version = str(triton.__version__)
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, KNOWN[0].split("."))):
        raise NoTriton(needs=f"triton {KNOWN[0]} or newer", found=f"{version} is installed")
    return version


def pack_verified(weight: torch.Tensor, format: Format, source_key: str, loop: str = "") -> Packed:
    """Pack a [N, K] weight on its device and prove it: unpacking must give every bit back, but -0.0 may become 0.0.

    ``loop``: where several families pack the format, the one that has this loop.
    Raises PatternMismatch, RoundTripMismatch, NoTriton; torch.OutOfMemoryError where the GPU has no room for it.
    """
    import torch

    chosen = family_of(format, loop) if loop else family(_own_kind(format.pattern))
    packed = chosen.pack(weight.detach(), format, source_key)
    if not packed.tensors:  # the kernel is given the weight itself
        return packed
    back = chosen.unpack(packed)
    same = (back == weight) | (back.isnan() & weight.isnan())
    if back.dtype == weight.dtype and bool(same.all()):
        return packed
    lost = int((~same).sum())
    row, column = (int(i) for i in (~same).nonzero()[0]) if lost else (0, 0)
    assert isinstance(back, torch.Tensor)
    detail = f"{lost} values, the first in row {row}, column {column}; {back.dtype} for {weight.dtype}"
    raise RoundTripMismatch(format=str(format), detail=detail)
