"""``nm``: at most N of every M neighbours along K are kept (8:16, 4:8, 1:4, 3:32; 2:4 where mma.sp cannot be had).

Positions have 2 bits (M <= 4), 4 (<= 16) or 8 (<= 256), in the layout of ``fixed.py`` without its table. Bytes a kept
value: 2.25, 2.5 or 3; 8:16 in bf16 takes 10 bits of weight where a bitmap would take 9.9, with its starts.

Loop ``gather`` (M of x <= 8) reads x at the kept columns; loop ``tile`` (any) makes dense tiles for tensor cores. 4:8
and 8:16 have a layout in register order besides, ``fragment``, for up to 32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.fixed import Fixed
from sparsec.codegen.triton.launch import Launch
from sparsec.codegen.triton.positions import checked
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

WIDEST = 256  # positions of 8 bits


def check(weight: torch.Tensor, format: Format, n: int, m: int) -> None:
    """Raises PatternMismatch, naming the first bad group, where M neighbours of a weight [N, K] keep more than n."""
    if n > m or m > WIDEST or format.values not in ("bf16", "fp16"):
        raise PatternMismatch(format=str(format), detail=f"taken are bf16 and fp16, N <= M <= {WIDEST}")
    kept = torch.nn.functional.pad(checked(weight, format.values) != 0, (0, -weight.shape[1] % m))
    bad = kept.view(len(weight), kept.shape[1] // m, m).sum(2) > n
    if not bool(bad.any()):
        return
    row, group = (int(i) for i in bad.nonzero()[0])
    where = f"{int(bad.sum())} of {bad.numel()} groups keep more than {n}, the first in row {row}"
    raise PatternMismatch(format=str(format), detail=f"{where} from column {group * m}")


class NM:
    kind = "nm"
    formats = ("nm:8:16+bf16", "nm:4:8+bf16", "nm:3:32+bf16", "nm:2:4+bf16", "nm:8:16+fp16")
    loops = LOOPS["nm"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        check(weight, format, *format.pattern.params)
        tensors = _fixed(format).pack(weight)
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (*weight.shape,), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        position, value = packed.tensors
        return _fixed(packed.format).unpack(position, value, packed.format.values, packed.shape[1])

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        return _fixed(packed.format).configs(packed, loop, m, capability)

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        return _fixed(packed.format).launches(packed, loop, self.loops[loop], call, config)


def _fixed(format: Format) -> Fixed:
    n, m = format.pattern.params
    return Fixed(n, m, m)


FAMILY = NM()
