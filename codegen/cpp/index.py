"""Pattern ``index``: unstructured zeros, one byte a kept value. Best from about 75 % zeros; K may be any size."""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import sliced
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Pattern


class Index:
    kind = "index"
    loops = ("dot", "outer")

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        return sliced.pack(weight, pattern, values, source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return sliced.unpack(packed)

    def text(self, spec: KernelSpec) -> str:
        return sliced.text(spec)


FAMILY = Index()
