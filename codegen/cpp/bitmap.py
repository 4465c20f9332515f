"""Pattern ``bitmap``: unstructured zeros, one bit a position. Best from about 50 to 70 % zeros.

Tensors: masks int32 and values, both in the order (4 rows, 32 columns, row), and where each 4 rows start in values.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsec.codegen.cpp import packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern


def pack(
    weight: torch.Tensor, pattern: Pattern, values: str, source_key: str, fill: tuple[int, int] = (0, 0)
) -> Packed:
    weight = packer.checked(weight, values)
    masks, kept, start = packer.pack_bitmap(weight, fill)
    per_tile = packer.TILE // packer.GROUP
    n, k = weight.shape
    work = start[::per_tile] + torch.arange(start[::per_tile].numel()) * (packer.TILE * k // 4 + 1)
    return Packed(Format(pattern, values), 1, (masks, kept, start), work, (n, k), source_key)


_GROUPS_AT_ONCE = 64  # a piece fits the cache


def unpack(packed: Packed) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone; on one thread."""
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
