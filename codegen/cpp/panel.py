"""Pattern ``panel``: no zeros are skipped, but the weight is stored in the order the kernel reads it.

What it is for: a weight that stays dense on a machine whose library is slow at it. Tensors: values, see ``panel.h``.
Codes lie in an order of their own, ``words.h``, because lanes that are rows could not look them up; they also have the
loop ``outer``.
"""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import packer, words
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import VALUE_BYTES, Format, Pattern


class Panel:
    kind = "panel"
    loops = ("dot",)

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        if is_coded(values):
            return words.pack(weight, Format(pattern, values), source_key)
        weight = packer.checked(weight, values)
        (n, k), wide = weight.shape, 4 // VALUE_BYTES[values]
        tiles, steps = -(-n // packer.TILE), -(-k // wide)
        flat = packer.padded(tiles * steps * packer.TILE * wide, weight.dtype)
        panels = flat[: tiles * steps * packer.TILE * wide].view(tiles, steps, packer.TILE, wide)
        whole = weight.new_zeros(tiles * packer.TILE, steps * wide) if (n % packer.TILE or k % wide) else weight
        if whole is not weight:
            whole[:n, :k] = weight
        panels.copy_(whole.view(tiles, packer.TILE, steps, wide).permute(0, 2, 1, 3))
        work = torch.arange(tiles + 1) * (steps * packer.TILE * wide)
        return Packed(Format(pattern, values), 1, (flat,), work, (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        if is_coded(packed.format.values):
            return words.unpack(packed)
        n, k = packed.shape
        wide = 4 // VALUE_BYTES[packed.format.values]
        tiles, steps = packed.work.numel() - 1, -(-k // wide)
        panels = packed.tensors[0][: tiles * steps * packer.TILE * wide].view(tiles, steps, packer.TILE, wide)
        rows = panels.permute(0, 2, 1, 3).reshape(tiles * packer.TILE, steps * wide)
        return rows[:n, :k].contiguous()

    def text(self, spec: KernelSpec) -> str:
        return unit(spec, "words" if is_coded(spec.format.values) else "panel", {})


FAMILY = Panel()
