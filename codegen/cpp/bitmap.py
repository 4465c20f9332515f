"""Pattern ``bitmap``: unstructured zeros, one bit a position. Best from about 50 to 70 % zeros.

Tensors: masks int32 and values, both in the order (4 rows, 32 columns, row), and where each 4 rows start in values.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsec.codegen.cpp import coded, packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import bits, is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern


def pack(
    weight: torch.Tensor, pattern: Pattern, values: str, source_key: str, fill: tuple[int, int] = (0, 0)
) -> Packed:
    if is_coded(values):
        return _pack_coded(weight, Format(pattern, values), source_key, fill)
    weight = packer.checked(weight, values)
    masks, kept, start = packer.pack_bitmap(weight, fill)
    per_tile = packer.TILE // packer.GROUP
    n, k = weight.shape
    work = start[::per_tile] + torch.arange(start[::per_tile].numel()) * (packer.TILE * k // 4 + 1)
    return Packed(Format(pattern, values), 1, (masks, kept, start), work, (n, k), source_key)


def _pack_coded(weight: torch.Tensor, format: Format, source_key: str, fill: tuple[int, int]) -> Packed:
    """As ``pack``, but values are a byte stream in which the codes of each word start in a new byte."""
    found = coded.coded(weight, format, "bitmap", source_key)
    (n, k), width = weight.shape, bits(format.values)
    masks, _, start = packer.pack_bitmap(found.main, fill)
    kept = _kept(masks)
    wide = torch.nn.functional.pad(found.stored, (0, -k % 32, 0, -n % packer.TILE))
    stream, sizes = coded.ragged(_ordered(wide)[kept], kept.sum(1), 32, width)
    words = -(-k // 32) * packer.GROUP
    begin = packer.prefix(sizes.view(-1, words).sum(1) if words else torch.zeros(start.numel() - 1))
    per_tile = packer.TILE // packer.GROUP
    work = start[::per_tile] + torch.arange(start[::per_tile].numel()) * (packer.TILE * k // 4 + 1)
    return Packed(format, 1, (masks, stream, begin, *found.tail), work, (n, k), source_key)


def _kept(masks: torch.Tensor) -> torch.Tensor:
    """bool [words, 32] of masks, in their order."""
    return torch.from_numpy(np.unpackbits(masks.numpy().view(np.uint8), bitorder="little").view(bool)).view(-1, 32)


def _ordered(wide: torch.Tensor) -> torch.Tensor:
    """[rows, columns] in whole tiles and words as [words, 32], in the order of the layout."""
    rows, columns = wide.shape
    grouped = wide.view(rows // packer.GROUP, packer.GROUP, columns // 32, 32)
    return grouped.transpose(1, 2).reshape(-1, 32)


def _unpack_coded(packed: Packed) -> torch.Tensor:
    masks, stream, _, *tail = packed.tensors
    n, k = packed.shape
    kept = _kept(masks)
    wide = torch.zeros(kept.shape, dtype=torch.uint8)
    wide[kept] = coded.unragged(stream, kept.sum(1), 32, bits(packed.format.values))

    def rows(ordered: torch.Tensor) -> torch.Tensor:
        grouped = ordered.view(-(-n // packer.TILE) * packer.TILE // packer.GROUP, -(-k // 32), packer.GROUP, 32)
        return grouped.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k]

    return coded.decoded(rows(wide).contiguous(), rows(kept), tuple(tail), packed.format.values)


_GROUPS_AT_ONCE = 64  # a piece fits the cache


def unpack(packed: Packed) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone; on one thread."""
    if is_coded(packed.format.values):
        return _unpack_coded(packed)
    n, k = packed.shape
    words = -(-k // 32)
    dtype = (
        torch.int32 if packed.tensors[1].element_size() == 4 else torch.int16
    )  # as bits, so that a NaN stays as it is
    masks, values, start = (t.numpy() for t in (packed.tensors[0], packed.tensors[1].view(dtype), packed.tensors[2]))
    out = torch.zeros(n, k, dtype=dtype)
    masks = masks.reshape(-1, words * packer.GROUP) if k else masks
    for begin in range(0, -(-n // packer.GROUP) if k else 0, _GROUPS_AT_ONCE):
        end = min(begin + _GROUPS_AT_ONCE, len(start) - 1)
        kept = np.unpackbits(masks[begin:end].view(np.uint8), bitorder="little").view(bool)
        wide = np.zeros(kept.size, dtype=values.dtype)
        wide[kept] = values[start[begin] : start[end]]
        rows = wide.reshape(end - begin, words, packer.GROUP, 32).transpose(0, 2, 1, 3).reshape(-1, 32 * words)
        height = min(end * packer.GROUP, n) - begin * packer.GROUP
        out.numpy()[begin * packer.GROUP :][:height] = rows[:height, :k]
    return out.view(packed.tensors[1].dtype)


class Bitmap:
    kind = "bitmap"
    loops = ("dot", "outer")

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        return pack(weight, pattern, values, source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return unpack(packed)

    def text(self, spec: KernelSpec) -> str:
        return unit(spec, "bitmap", {"kFixed": 0})


FAMILY = Bitmap()
