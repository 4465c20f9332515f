"""``vnm``: V:N:M, as VENOM (Castro et al., SC 2023): blocks of V rows keep 4 of M columns, and each row N of those 4.

The layout is that of ``fixed.py``: a table of four column numbers (bytes) for each block and group, and N of 4 with
positions of 2 bits beside the values. 64:2:8 in bf16 takes 4.6 bits of weight.

Loop ``gather`` (M of x <= 8): two bits choose a byte of the table, which is the column. Loop ``tile`` (any): columns
of x are gathered once for all rows of a block, then the weight is a tile of 4 / M as many columns. V:2:M for up to 8
rows of x goes to sparse tensor cores (``vnm24``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.fixed import Fixed
from sparsec.codegen.triton.launch import Launch
from sparsec.codegen.triton.nm import WIDEST, check
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

KEPT = 4  # columns of a block's group


class VNM:
    kind = "vnm"
    formats = ("vnm:64:2:8+bf16", "vnm:64:2:8+fp16")
    loops = LOOPS["vnm"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        kept, table = compressed(weight, format)
        tensors = (*_fixed(format).pack(kept), table)
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (*weight.shape,), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        position, value, table = packed.tensors
        kept = _fixed(packed.format).unpack(position, value, packed.format.values, table.shape[1] * KEPT)
        return expanded(kept, table, packed.format, packed.shape)

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        return _fixed(packed.format).configs(packed, loop, m, capability)

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        table = packed.tensors[2]
        return _fixed(packed.format).launches(packed, loop, self.loops[loop], call, config, table)


def compressed(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept columns [N, groups * 4] and the table. Raises PatternMismatch."""
    v, n, m = format.pattern.params
    if not n <= KEPT <= m <= WIDEST:
        raise PatternMismatch(format=str(format), detail=f"taken are N <= {KEPT} <= M <= {WIDEST}")
    columns = _columns(weight, format, v, m)
    kept = _compressed(weight, columns, v, m)
    check(kept, format, n, KEPT)
    shift = 8 * torch.arange(KEPT, device=weight.device)
    return kept, (columns << shift).sum(2).to(torch.int32)


def expanded(kept: torch.Tensor, table: torch.Tensor, format: Format, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of ``shape`` back."""
    (rows, k), (v, _, m), groups = shape, format.pattern.params, table.shape[1]
    columns = table.view(torch.uint8).view(-1, groups, KEPT).long().repeat_interleave(v, 0)[:rows]
    dense = kept.new_zeros(rows, groups, m)
    return dense.scatter_(2, columns, kept.view(rows, groups, KEPT)).flatten(1)[:, :k].contiguous()


def _fixed(format: Format) -> Fixed:
    v, n, m = format.pattern.params
    return Fixed(n, KEPT, m, v)


def _columns(weight: torch.Tensor, format: Format, v: int, m: int) -> torch.Tensor:
    """[blocks, groups, 4]: the columns that a block uses, ascending, filled up with others. Raises PatternMismatch."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight != 0, (0, -k % m, 0, -n % v))
    used = padded.view(-(-n // v), v, -(-k // m), m).any(1)
    bad = used.sum(2) > KEPT
    if bool(bad.any()):
        block, group = (int(i) for i in bad.nonzero()[0])
        where = f"{int(bad.sum())} of {bad.numel()} blocks use more than {KEPT} columns, the first in row {block * v}"
        raise PatternMismatch(format=str(format), detail=f"{where} from column {group * m}")
    number = torch.arange(m, device=weight.device)
    chosen = torch.where(used, number, number + m).sort(2).values[:, :, :KEPT] % m
    return chosen.sort(2).values


def _compressed(weight: torch.Tensor, columns: torch.Tensor, v: int, m: int) -> torch.Tensor:
    """The kept columns of a weight [N, K], [N, groups * 4]."""
    n, k = weight.shape
    grouped = torch.nn.functional.pad(weight, (0, -k % m)).view(n, -(-k // m), m)
    return grouped.gather(2, columns.repeat_interleave(v, 0)[:n]).flatten(1)


FAMILY = VNM()
