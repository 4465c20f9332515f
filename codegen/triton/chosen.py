"""Products of which some outputs are read: y = act(x @ W.T + bias), where rows of W that nobody needs stay unread.

The up projection of a gated MLP, h * (x @ W.T), matters only where h is not zero. The weight is read as PyTorch stores
it, [N, K], so there is no pack: a call brings the weight, and ``needed``, whose zeros are outputs that nobody reads.

Two kernels, both deterministic. ``wanted`` lists the outputs that some row of ``needed`` wants, ascending, and writes
zeros to all of y:

  index[N] int32, count[1] int32                                                   the first ``count`` places hold

``select`` gives each program a few listed outputs and all of K, so no sum is split; programs beyond the list end at
once. Rows of x share one list.

Lane instructions for each weight read on sm_90, bf16: 3.7 at M = 1, 5.2 at 2, 9.1 at 4, 15.4 at 8, where an H200 has
15.6 in the time of the weight's two bytes. From M = 4 on what is loaded of x is moved between threads once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.epilogue import finish
from sparsec.codegen.triton.gated import BLOCK, DTYPES, placed
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.errors import PatternMismatch
from sparsec.formats import Format


@triton.jit
def wanted(
    NEEDED, INDEX, COUNT, Y, m, n, rows, stride_needed, stride_y,
    ROWS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    row = tl.minimum(tl.arange(0, ROWS), rows - 1)[:, None]
    _, _, listed, place, count = placed(NEEDED, NEEDED, 0.0, first, lane, row, n, stride_needed, 0, BLOCK)
    tl.store(INDEX + place, first + lane, mask=listed)
    row = tl.arange(0, M)[:, None]
    column = (first + lane)[None, :]
    nothing = tl.zeros((M, BLOCK), Y.dtype.element_ty)
    tl.store(Y + row * stride_y + column, nothing, mask=(row < m) & (column < n))
    is_last = tl.program_id(0) == tl.num_programs(0) - 1
    tl.store(COUNT, count, mask=is_last)


@triton.jit
def select(
    WEIGHT, X, INDEX, COUNT, Y, BIAS, m, k, stride_x, stride_w, stride_y,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    count = tl.load(COUNT)
    first = tl.program_id(0) * ROWS
    if first < count:
        place = first + tl.arange(0, ROWS)
        output = tl.load(INDEX + tl.minimum(place, count - 1))
        line = output.to(tl.int64)[None, :, None] * stride_w
        row = tl.minimum(tl.arange(0, M), m - 1)[:, None, None] * stride_x
        lane = tl.arange(0, COLUMNS)[None, None, :]
        acc = tl.zeros((M, ROWS, COLUMNS), tl.float32)
        for start in tl.range(0, k, COLUMNS):
            inside = start + lane < k
            w = tl.load(WEIGHT + line + start + lane, mask=inside, other=0.0)
            x = tl.load(X + row + start + lane, mask=inside, other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)
        listed = (place < count)[None, :]
        y = finish(tl.sum(acc, 2), BIAS, output[None, :], ACT, HAS_BIAS, listed)
        row = tl.arange(0, M)[:, None]
        mask = listed & (row < m)
        tl.store(Y + row * stride_y + output[None, :], y.to(Y.dtype.element_ty), mask=mask)


class Chosen:
    """``pack`` stores nothing: the calls bring the weight."""

    kind = "chosen"
    formats = ("panel+bf16", "panel+fp16", "panel+fp32")
    loops: Mapping[str, int] = {"select": 8}

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        if weight.dtype != DTYPES.get(format.values):
            raise PatternMismatch(format=str(format), detail=f"its values are {weight.dtype}")
        n, k = weight.shape
        return Packed(format, 1, (), torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        raise NotImplementedError("there is nothing to unpack: the weight itself is read")

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Four warps read ``rows`` x ``columns`` weights a step, 16 bytes of up to four rows a thread.

        Fewer outputs a program make more programs, so few wanted outputs still fill the GPU; with more rows of x, which
        take registers, what is loaded of them serves more outputs.
        """
        each, rows_of_x = 16 // _size(packed), triton.next_power_of_2(m)
        most = {1: 4, 2: 4, 4: 2, 8: 1}[rows_of_x]
        order = (4, 2, 8, 1) if rows_of_x < 4 else (8, 4, 2, 1)
        shapes = [(rows, loads * 128 * each // rows) for loads in (4, 2, 1) for rows in order if loads <= most]
        return [{"rows": rows, "columns": columns} for rows, columns in shapes if columns >= 16 * each]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        """Raises ValueError for more than 8 rows of x, and for a call that does not bring what is read and needed."""
        (n, k), m, weight, needed = packed.shape, call.m, call.weight, call.needed
        if m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        if weight is None or needed is None or weight.shape != (n, k) or needed.shape[1:] != (n,):
            raise ValueError(f"{loop} needs the weight [{n}, {k}] and what says which of {n} outputs are needed")
        needed = needed.view(torch.uint8) if needed.dtype == torch.bool else needed
        new = call.x.new_empty
        index = new((max(n, 1),), dtype=torch.int32)
        count = new((1,), dtype=torch.int32) if call.count is None else call.count
        rows, rounded = needed.shape[0], triton.next_power_of_2(m)
        listing = {
            "NEEDED": needed, "INDEX": index, "COUNT": count, "Y": call.y, "m": m, "n": n, "rows": rows,
            "stride_needed": needed.stride(0), "stride_y": call.y.stride(0),
        }  # fmt: skip
        constants = {"ROWS": triton.next_power_of_2(rows), "M": rounded, "BLOCK": BLOCK}
        lists = Launch(wanted, (max(triton.cdiv(n, BLOCK), 1),), listing, constants)
        args = {
            "WEIGHT": weight, "X": call.x, "INDEX": index, "COUNT": count, "Y": call.y,
            "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "k": k, "stride_x": call.x.stride(0), "stride_w": weight.stride(0), "stride_y": call.y.stride(0),
        }  # fmt: skip
        tile = {"M": rounded, "ROWS": config["rows"], "COLUMNS": config["columns"]}
        tile |= {"ACT": ACTS.index(call.act), "HAS_BIAS": int(call.bias is not None)}
        budget = 7.8 * weight.element_size()  # an H200 issues 7.8 lane instructions in the time of a byte
        counted = Loop("weight", config["rows"] * config["columns"], budget)
        return [lists, Launch(select, (triton.cdiv(n, config["rows"]),), args, tile, loop=counted)]


def _size(packed: Packed) -> int:
    return DTYPES[packed.format.values].itemsize


FAMILY = Chosen()
