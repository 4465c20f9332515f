"""Which coded values the kernels of CPUs take, where they can lie, and what a kernel's text has to know of them."""

from __future__ import annotations

from sparsec.codegen.cpp.codes import BITS
from sparsec.formats import BOOKS, VALUE_BITS, value_kind

GROUPS = (0, 32, 64, 128)
CODED = tuple(BITS)


def is_coded(values: str) -> bool:
    return value_kind(values)[0] in CODED


def bits(values: str) -> int:
    """Bits of a stored code: 2, 3, 4 or 8."""
    return BITS[value_kind(values)[0]]


def width(values: str) -> int:
    """Bits of a stored value, of codes or of numbers as they are."""
    return bits(values) if is_coded(values) else VALUE_BITS[values]


def refusal(layout: str, values: str) -> str:
    """Why values cannot lie in a layout, in a few words; "" where they can.

    The layout "sliced" has 16 rows in its lanes and one slice of 128 columns at a time. Smaller groups would need a
    scale looked up for each value, codebooks a table for each lane. That would buy little: where a tenth is kept,
    bitmap+int4g32 has 0.33 bytes a weight and index+int4g32 would have 0.31, half of either its scales and zero points.
    """
    kind, group = value_kind(values)
    if group not in GROUPS:
        return f"groups of {group} are none of 32, 64 and 128"
    if layout == "sliced" and kind in BOOKS:
        return f"a {kind} would be looked up by a gather for each value; bitmap takes it"
    if layout.startswith("columns") and kind in BOOKS:
        return "its lanes are rows, and each row of a codebook has levels of its own"
    if layout == "sliced" and group not in (0, 128):
        return f"its slices of 128 columns have one scale a row, not one for {group} columns; bitmap takes them"
    return ""


def constants(values: str, layout_tensors: int) -> dict[str, int]:
    """What coded.h asks for."""
    kind, group = value_kind(values)
    return {"kBits": BITS[kind], "kBook": int(kind in BOOKS), "kTail": layout_tensors, "kGroupColumns": group}
