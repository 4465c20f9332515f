"""Kernels of the loop ``skip``: weights in the order of their columns, so that those that meet no value of x are skipped.

Formats are those of other loops; the pack is another one. ``panel`` stores every position (``columns.h``); ``bitmap``,
``nm`` and ``block`` store the kept values of each column behind a mask (``columns_bitmap.h``), so zeros of the weight
and of x are both left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparsec.codegen.cpp import coded, masked, packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import bits, is_coded
from sparsec.codegen.cpp.words import elements, from_elements
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import VALUE_BYTES, Format, Pattern

SPAN = packer.CHUNK  # rows of W in a tile
MOST_ROWS = 8  # of x


def layout(pattern: Pattern) -> str:
    return "columns" if pattern.kind == "panel" else "columns_bitmap"


class Columns:
    kind = "columns"
    loops = ("skip",)

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        format = Format(pattern, values)
        if is_coded(values):
            found = coded.coded(weight, format, layout(pattern))
            whole, kept, tail = found.stored, found.main != 0, found.tail
        else:
            whole = packer.checked(weight, values)
            kept, tail = whole != 0, ()
        n, k = whole.shape
        if pattern.kind == "panel":
            tensors: tuple[torch.Tensor, ...] = (_dense(whole, values),)
            work = torch.full((-(-n // SPAN),), SPAN * k + 1)
        else:
            tensors, sizes = masked.pack(zip(_tiles(whole), _tiles(kept), strict=True), format)
            work = sizes + 1
        return Packed(format, 1, (*tensors, *tail), packer.prefix(work), (n, k), source_key, loop="skip")

    def unpack(self, packed: Packed) -> torch.Tensor:
        (n, k), values = packed.shape, packed.format.values
        dense = packed.format.pattern.kind == "panel"
        whole, kept = (_dense_back(packed), None) if dense else _kept_back(packed)
        if not is_coded(values):
            return whole.view(packer.VALUE_DTYPES[values])
        return coded.decoded(whole, kept, packed.tensors[1 if dense else 2 :], values)

    def text(self, spec: KernelSpec) -> str:
        return unit(spec, layout(spec.format.pattern), {"kSpan": SPAN})


FAMILY = Columns()


def _tiles(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """[N, K] as pieces [K, SPAN], the last padded with zeros."""
    for rows in whole.split(SPAN) if len(whole) else ():
        yield torch.nn.functional.pad(rows, (0, 0, 0, SPAN - len(rows))).t().contiguous()


def _dense(whole: torch.Tensor, values: str) -> torch.Tensor:
    n, k = whole.shape
    width = bits(values) if is_coded(values) else 8 * VALUE_BYTES[values]
    size = k * SPAN * width // 8
    out = packer.padded(-(-n // SPAN) * size, torch.uint8)
    for t, piece in enumerate(_tiles(whole)):
        stored = coded.to_bytes(elements(piece, width), width) if is_coded(values) else piece.view(torch.uint8)
        out[t * size : (t + 1) * size] = stored.flatten()
    return out


def _dense_back(packed: Packed) -> torch.Tensor:
    (n, k), values = packed.shape, packed.format.values
    width = bits(values) if is_coded(values) else 8 * VALUE_BYTES[values]
    tiles, size = packed.work.numel() - 1, k * SPAN * width // 8
    data = packed.tensors[0][: tiles * size].view(tiles, k, SPAN * width // 8)
    if is_coded(values):
        data = from_elements(coded.from_bytes(data, width), width)
    else:
        data = data.contiguous().view(packer.VALUE_DTYPES[values])
    return data.transpose(1, 2).reshape(tiles * SPAN, k)[:n].contiguous()


def _kept_back(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    (n, k), tiles = packed.shape, packed.work.numel() - 1

    def rows(ordered: torch.Tensor) -> torch.Tensor:
        return ordered.view(tiles, k, SPAN).transpose(1, 2).reshape(tiles * SPAN, k)[:n].contiguous()

    whole, kept = masked.unpack(packed, SPAN)
    return rows(whole), rows(kept)
