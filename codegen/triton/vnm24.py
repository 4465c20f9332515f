"""``vnm24``: V:2:M for up to 8 rows of x, on sparse tensor cores, as VENOM (Castro et al., SC 2023) has it.

The columns that a block of V rows keeps, 4 of M, are a weight of 2:4, packed and multiplied as ``nm24`` does it; a
small kernel before brings the block's columns of x into register order, for each block anew.

  tensors of ``nm24`` for the kept columns [N, K / M * 4]     table[block, group] int32: four bytes, the columns

4.6 bits a weight at 64:2:8 in bf16. Lane instructions a kept column: 0.5 of the 8.8 that an H200 can issue while it
arrives, and M (of x) * 15 / V for x, each of which is written and read once (2 M / V bytes a kept column, of 1.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import LOOPS, nm24, nm24_pack, vnm
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.launch import Launch
from sparsec.codegen.triton.nm24_pack import COLUMNS, ROWS
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, Pattern


@triton.jit
def arrange(
    X, TABLE, OUT, m, k, groups, steps, stride_x, SPAN: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The kept columns of x [m, k] in the order of registers b: [block, step, k-tile 8, row COLS, t 4, r 4, 2]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair, r, t, row = at % 2, at // 2 % 4, at // 8 % 4, at // 32 % COLS
    rest = at // (32 * COLS)
    step, block = rest // 8 % steps, rest // 8 // steps
    kept = step * 256 + rest % 8 * 32 + r * 8 + t * 2 + pair
    group = kept // 4
    four = tl.load(TABLE + block * groups + group, mask=group < groups, other=0)
    column = group * SPAN + ((four >> (kept % 4 * 8)) & 255)
    inside = (row < m) & (column < k) & (group < groups)
    x = tl.load(X + tl.cast(row, tl.int64) * stride_x + column, mask=inside, other=0.0)
    tl.store(OUT + at, x)


class VNM24:
    kind = "vnm24"
    formats = ("vnm:64:2:8+bf16", "vnm:64:2:8+fp16")
    loops = LOOPS["vnm24"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        v, keep, _ = format.pattern.params
        if keep != 2 or v % ROWS:
            raise PatternMismatch(format=str(format), detail=f"taken are V:2:M with V a multiple of {ROWS}")
        compressed, table = vnm.compressed(weight, format)
        packed = nm24_pack.pack(compressed, _inner(format), source_key)
        tensors = (*packed.tensors, table)
        return Packed(format, 1, tensors, packed.work, (*weight.shape,), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return vnm.expanded(nm24_pack.unpack(_kept(packed)), packed.tensors[4], packed.format, packed.shape)

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Those of ``nm24`` that do not need x in place."""
        return [c for c in nm24.FAMILY.configs(_kept(packed), loop, max(m, 8), capability) if c["each"] == 1]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        if call.m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {call.m}")
        kept, table, (v, _, m) = _kept(packed), packed.tensors[4], packed.format.pattern.params
        cols, steps = nm24.tiling(call.m)[1], -(-kept.shape[1] // COLUMNS)
        out = call.x.new_empty((len(table) * steps, cols * COLUMNS))
        args = {
            "X": call.x, "TABLE": table, "OUT": out, "m": call.m, "k": packed.shape[1], "groups": table.shape[1],
            "steps": steps, "stride_x": call.x.stride(0),
        }  # fmt: skip
        block = min(1024, cols * COLUMNS)
        before = [Launch(arrange, (out.numel() // block,), args, {"SPAN": m, "COLS": cols, "BLOCK": block})]
        config = {**config, "direct": 0}
        return nm24.product(kept, call, config, before, out.view(torch.int32), v // ROWS)


def _inner(format: Format) -> Format:
    return replace(format, pattern=Pattern("nm", (2, 4)))


def _kept(packed: Packed) -> Packed:
    """The kept columns as a pack of 2:4."""
    n, columns = packed.shape[0], packed.tensors[4].shape[1] * vnm.KEPT
    return replace(packed, format=_inner(packed.format), tensors=packed.tensors[:4], shape=(n, columns))


FAMILY = VNM24()
