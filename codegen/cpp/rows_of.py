"""Kernels of the loop ``select``: only the rows of a weight whose outputs somebody reads.

``panel`` with values as they are reads the weight as PyTorch stores it, so it has no pack (``row_plain.h``); its codes
lie row by row (``row_words.h``); ``bitmap``, ``nm`` and ``block`` have rows of masks and kept values
(``row_bitmap.h``).
"""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import coded, masked, packer, words
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern

_AT_ONCE = 256  # rows that are packed together


def layout(pattern: Pattern, values: str) -> str:
    if pattern.kind != "panel":
        return "row_bitmap"
    return "row_words" if is_coded(values) else "row_plain"


class Rows:
    kind = "rows"
    loops = ("select",)

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        """``panel`` with values as they are gets a pack without tensors: the kernel is given the weight itself."""
        format, name = Format(pattern, values), layout(pattern, values)
        if name == "row_words":
            return words.pack(weight, format, source_key, together=1)
        if name == "row_plain":
            n, k = packer.checked(weight, values).shape
            return Packed(format, 1, (), _work(n, k + 1), (n, k), source_key)
        whole, kept, tail = masked.stored(weight, format, "bitmap", source_key)
        n, k = whole.shape
        whole, kept = (torch.nn.functional.pad(t, (0, -k % 32)) for t in (whole, kept))
        tensors, _ = masked.pack(zip(torch.split(whole, _AT_ONCE), torch.split(kept, _AT_ONCE), strict=True), format)
        return Packed(format, 1, (*tensors, *tail), _work(n, k + 1), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        (_, k), values = packed.shape, packed.format.values
        if layout(packed.format.pattern, values) == "row_words":
            return words.unpack(packed, together=1)
        whole, kept = (t[:, :k].contiguous() for t in masked.unpack(packed, -(-k // 32) * 32))
        return coded.decoded(whole, kept, packed.tensors[2:], values) if is_coded(values) else whole

    def text(self, spec: KernelSpec) -> str:
        return unit(spec, layout(spec.format.pattern, spec.format.values), {})


def _work(n: int, cost: int) -> torch.Tensor:
    return torch.arange(-(-n // packer.TILE) + 1) * cost


FAMILY = Rows()
