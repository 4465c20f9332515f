"""C++ kernels for CPUs: one family per pattern, each in its own file, imported when first asked for."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sparsec.codegen.cpp.values import is_coded
from sparsec.codegen.spec import Family, Packed
from sparsec.errors import RoundTripMismatch
from sparsec.formats import Format

if TYPE_CHECKING:
    import torch

FAMILIES = {kind: f"sparsec.codegen.cpp.{kind}:FAMILY" for kind in ("panel", "bitmap", "index", "nm", "block")}

# Those of kernels that round x to int8 (``KernelSpec.x``): other layouts, and so other packs, of the same formats.
INTEGER_FAMILIES = dict.fromkeys(FAMILIES, "sparsec.codegen.cpp.integer:FAMILY")


# Those of loops that read a layout of their own.
_KINDS = ("panel", "bitmap", "nm", "block")
LOOP_FAMILIES = {
    "skip": dict.fromkeys(_KINDS, "sparsec.codegen.cpp.columns:FAMILY"),
    "select": dict.fromkeys(_KINDS, "sparsec.codegen.cpp.rows_of:FAMILY"),
}


@functools.cache
def family(kind: str, x: str = "", loop: str = "") -> Family:
    """The family of a pattern kind, a key of ``FAMILIES``, for activations ``x`` and a loop; KeyError for any other."""
    known = LOOP_FAMILIES.get(loop) or {"": FAMILIES, "int8": INTEGER_FAMILIES}[x]
    module, _, name = known[kind].partition(":")
    return cast(Family, getattr(importlib.import_module(module), name))


def pack_of(loop: str) -> str:
    """The loop in ``LOOP_FAMILIES`` whose packs a loop reads; "" for those that all other loops read."""
    return loop if loop in LOOP_FAMILIES else ""


def loops_of(format: Format, x: str = "") -> tuple[str, ...]:
    """The loops that a format's kernels have. Dense codes have ``outer`` too: decoding costs more than reading."""
    if not x and format.pattern.kind == "panel" and is_coded(format.values):
        return ("dot", "outer")
    return family(format.pattern.kind, x).loops


def pack_verified(
    weight: torch.Tensor, format: Format, source_key: str, cache: Path | None = None, x: str = "", loop: str = ""
) -> Packed:
    """Pack a [N, K] CPU weight and prove it: unpacking must give every bit back, except that -0.0 may become 0.0.

    ``cache``: where the packer is compiled when it is first used; the user's cache directory unless given. ``x``: what
    the kernels that read it do to activations, as in ``KernelSpec``; ``loop``: theirs.
    Raises PatternMismatch, RoundTripMismatch, NoCompiler, CompileFailed; ValueError for a dtype that is not the
    format's.
    """
    import torch

    from sparsec.codegen.cpp import packer
    from sparsec.codegen.cpp.pages import in_large_pages

    packer.load(cache)
    chosen = family(format.pattern.kind, x, loop)
    packed = chosen.pack(weight, format.pattern, format.values, source_key)
    in_large_pages(packed.tensors or [weight])
    if not packed.tensors:  # the kernel reads the weight itself
        return packed
    back = chosen.unpack(packed)
    bits = torch.int32 if weight.element_size() == 4 else torch.int16
    before, after = weight.detach().contiguous().view(bits), back.view(bits)
    if torch.equal(before, after):
        return packed
    lost = (before != after) & ~((weight == 0) & (after == 0))
    if bool(lost.any()):
        row, column = (int(i) for i in lost.nonzero()[0])
        detail = f"{int(lost.sum())} values, the first in row {row}, column {column}"
        raise RoundTripMismatch(format=str(format), detail=detail)
    return packed
