"""Kernels of the loop ``skip``: weights in the order of their columns, so that what meets no value of x is skipped.

Formats are those of other loops; the pack is another one. ``panel`` stores every position (``columns.h``); ``bitmap``,
``nm`` and ``block`` store the kept values of each column behind a mask (``columns_bitmap.h``), so zeros of the weight
and of x are both left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparsec.codegen.cpp import coded, masked, packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import is_coded, width
from sparsec.codegen.cpp.words import elements, from_elements
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern

CHUNK = packer.CHUNK  # rows of W that are worked on together
MOST_CHUNKS = 16  # of rows in a tile of kept values: shorter pieces of a column cost as much as what is between them


def layout(pattern: Pattern) -> str:
    return "columns" if pattern.kind == "panel" else "columns_bitmap"


class Columns:
    kind = "columns"
    loops = ("skip",)

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        format = Format(pattern, values)
        whole, kept, tail = masked.stored(weight, format, layout(pattern), source_key)
        n, k = whole.shape
        if pattern.kind == "panel":
            tensors: tuple[torch.Tensor, ...] = (_dense(whole, values),)
            work = torch.full((-(-n // CHUNK),), CHUNK * k + 1)
        else:
            tensors, sizes = masked.pack(zip(_tiles(whole), _tiles(kept), strict=True), format)
            work = sizes + 1
        return Packed(format, 1, (*tensors, *tail), packer.prefix(work), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        values = packed.format.values
        dense = packed.format.pattern.kind == "panel"
        whole, kept = (_dense_back(packed), None) if dense else _kept_back(packed)
        if not is_coded(values):
            return whole.view(packer.VALUE_DTYPES[values])
        return coded.decoded(whole, kept, packed.tensors[1 if dense else 2 :], values)

    def text(self, spec: KernelSpec) -> str:
        return unit(spec, layout(spec.format.pattern), {})


FAMILY = Columns()
_AT_ONCE = 1024  # columns that are turned together


def _span(n: int) -> int:
    """Rows of a tile of kept values."""
    return min(-(-n // CHUNK), MOST_CHUNKS) * CHUNK


def _tiles(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """[N, K] as tiles [K, span], the last padded with zeros."""
    span = _span(len(whole))
    for rows in torch.split(whole, span) if span else ():
        yield torch.nn.functional.pad(rows, (0, 0, 0, span - len(rows))).t().contiguous()


def _dense(whole: torch.Tensor, values: str) -> torch.Tensor:
    n, k = whole.shape
    size = width(values)
    rows = -(-n // CHUNK) * CHUNK
    out = packer.padded(k * rows * size // 8, torch.uint8)
    data = out[: k * rows * size // 8].view(k, rows * size // 8)
    for at, columns in zip(range(0, k, _AT_ONCE), torch.split(whole, _AT_ONCE, 1), strict=False) if n else ():
        piece = torch.nn.functional.pad(columns.t(), (0, rows - n)).contiguous()
        if is_coded(values):
            chunks = elements(piece.view(len(piece), rows // CHUNK, CHUNK), size)
            data[at : at + len(piece)] = coded.to_bytes(chunks, size).flatten(1)
        else:
            data[at : at + len(piece)] = piece.view(torch.uint8)
    return out


def _dense_back(packed: Packed) -> torch.Tensor:
    (n, k), values = packed.shape, packed.format.values
    size = width(values)
    rows = -(-n // CHUNK) * CHUNK
    data = packed.tensors[0][: k * rows * size // 8].view(k, rows * size // 8)
    if is_coded(values):
        codes = coded.from_bytes(data.view(k, rows // CHUNK, CHUNK * size // 8), size)
        whole = from_elements(codes, size).reshape(k, rows)
    else:
        whole = data.reshape(-1).view(packer.VALUE_DTYPES[values]).view(k, rows)
    return whole[:, :n].t().contiguous()


def _kept_back(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    (n, k), tiles = packed.shape, packed.work.numel() - 1

    def rows(ordered: torch.Tensor) -> torch.Tensor:
        return ordered.view(tiles, k, span).transpose(1, 2).reshape(tiles * span, k)[:n].contiguous()

    span = _span(n)
    whole, kept = masked.unpack(packed, span)
    return rows(whole), rows(kept)
