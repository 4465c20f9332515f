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


def unpack(packed: Packed) -> torch.Tensor:
    masks, values, start = packed.tensors
    n, k = packed.shape
    words = -(-k // 32)
    bits = np.unpackbits(masks.view(torch.uint8).numpy(), bitorder="little")
    kept = torch.from_numpy(bits.view(bool)).view(start.numel() - 1, words, packer.GROUP, 32)
    integers = torch.int32 if values.element_size() == 4 else torch.int16  # moved as bits, so that a NaN stays as it is
    wide = torch.zeros(kept.shape, dtype=integers).masked_scatter_(kept, values.view(integers)[: int(start[-1])])
    rows = wide.permute(0, 2, 1, 3).reshape((start.numel() - 1) * packer.GROUP, 32 * words)
    return rows[:n, :k].contiguous().view(values.dtype)


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
