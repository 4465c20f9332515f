"""Gated products: y = act((x * [|x| > t]) @ W.T + bias), where rows of W.T whose x is dropped are not read.

  weight[K, LD]  W.T, LD = N rounded up to 256, the widest tile                    as dense: 2 bytes a bf16 weight

The gate is part of the call, not of the pack: ``None`` drops exact zeros (ReLU), a number is one threshold for all
channels (TEAL, 2024; CATS, 2024), a tensor [K] one for each. Dropped means ``where(|x| > t, x, 0)``, so a NaN
is dropped by a threshold and kept by the exact gate, as eager PyTorch does.

Two kernels, both deterministic. ``compact`` lists the channels that some row of x keeps, ascending, with the gated x
beside them:

  index[K] int32, value[M, K] fp32, count[1] int32                                 the first ``count`` places hold

Each of its programs counts what is kept before its own block by itself (x is a few KB in cache), so no program waits
for another. ``threshold`` reads the listed rows of W.T in 16-byte loads, the list split in equal shares over programs,
and ends with the ordered reduction of ``epilogue.py``. Rows of x share one list: with M rows that each keep a share p
at random, 1 - (1 - p)^M of the weight is read, so a gate pays for few rows.

Lane instructions for each weight read on sm_90, bf16: 4.7 at M = 1, 6.2 at 2, 9.1 at 4, 14.8 at 8, where an H200 has
15.6 in the time of the weight's two bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton.contract import Call, Config, Gate
from sparsec.codegen.triton.epilogue import finish, reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK = 1024  # channels that one program lists
WIDEST = 256  # columns of a tile
EXACT, SCALAR, CHANNEL = range(3)  # kinds of gate


@triton.jit
def gated(X, GATE, limit, column, row, k, stride_x, KIND: tl.constexpr):
    """x of ``column`` [B] in ``row`` [M, 1], and whether the gate keeps it: both [M, B]."""
    inside = (column < k)[None, :]
    x = tl.load(X + row * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        return x, x != 0
    if KIND == 1:
        return x, tl.abs(x) > limit
    each = tl.load(GATE + column, mask=column < k, other=0.0).to(tl.float32)
    return x, (tl.abs(x) > each[None, :]) & inside


@triton.jit
def placed(X, GATE, limit, first, lane, row, k, stride_x, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """x of the channels ``first + lane`` [B] in ``row`` [M, 1], and whether the gate keeps it, both [M, B]; of each
    channel whether some row keeps it, and its place in the list, both [B]; how long the list is behind them."""
    earlier = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, first, BLOCK):
        _, keep = gated(X, GATE, limit, start + lane, row, k, stride_x, KIND)
        earlier += tl.max(keep.to(tl.int32), 0)
    x, keep = gated(X, GATE, limit, first + lane, row, k, stride_x, KIND)
    listed = tl.max(keep.to(tl.int32), 0)
    before = tl.sum(earlier, 0)
    return x, keep, listed > 0, before + tl.cumsum(listed, 0) - listed, before + tl.sum(listed, 0)


@triton.jit
def compact(
    X, GATE, INDEX, VALUE, COUNT, limit, m, k, stride_x,
    M: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    row = tl.minimum(tl.arange(0, M), m - 1)[:, None]
    x, keep, listed, place, count = placed(X, GATE, limit, first, lane, row, k, stride_x, KIND, BLOCK)
    tl.store(INDEX + place, first + lane, mask=listed)
    real = (tl.arange(0, M) < m)[:, None]
    tl.store(VALUE + row * k + place[None, :], tl.where(keep, x, 0.0), mask=listed[None, :] & real)
    is_last = tl.program_id(0) == tl.num_programs(0) - 1
    tl.store(COUNT, count, mask=is_last)


@triton.jit
def fetch(WEIGHT, INDEX, VALUE, place, row, column, width):
    """Weights [1, ROWS, COLUMNS] and x [M, ROWS, 1] of the listed ``place`` [1, ROWS, 1].

    Everything has three axes from the start: the layout of the weight's load is then that of all else, and nothing is
    moved between threads.
    """
    channel = tl.load(INDEX + place).to(tl.int64)
    return tl.load(WEIGHT + channel * width + column), tl.load(VALUE + row + place)


@triton.jit
def threshold(
    WEIGHT, INDEX, VALUE, COUNT, OUT, BIAS, m, n, k, width, stride_out,
    M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    count = tl.load(COUNT)
    share = tl.cdiv(count, SPLITS * ROWS) * ROWS
    first = tl.minimum(split * share, count)
    end = tl.minimum(first + share, count)
    whole = first + (end - first) // ROWS * ROWS
    lane = tl.arange(0, ROWS)[None, :, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column[None, None, :]
    row = tl.minimum(tl.arange(0, M), m - 1)[:, None, None] * k
    acc = tl.zeros((M, ROWS, COLUMNS), tl.float32)
    if first < end:
        top = end - 1
        # The next step's loads are in flight while this one is added; beyond the end they read the last row again.
        w, x = fetch(WEIGHT, INDEX, VALUE, tl.minimum(first + lane, top), row, wide, width)
        for step in tl.range(first, whole, ROWS):
            w_next, x_next = fetch(WEIGHT, INDEX, VALUE, tl.minimum(step + ROWS + lane, top), row, wide, width)
            acc += x * w.to(tl.float32)
            w, x = w_next, x_next
        acc += tl.where(whole + lane < end, x * w.to(tl.float32), 0.0)
    y = tl.sum(acc, 1)
    column = column[None, :]
    row = tl.arange(0, M)[:, None]
    mask = (column < n) & (row < m)
    if SPLITS == 1:
        y = finish(y, BIAS, column, ACT, HAS_BIAS, column < n)
        tl.store(OUT + row * stride_out + column, y.to(OUT.dtype.element_ty), mask=mask)
    else:
        tl.store(OUT + (split * m + row) * n + column, y, mask=mask)


class Gated:
    """``pack`` keeps every value, so it takes any weight of its dtype."""

    kind = "gated"
    formats = ("panel+bf16", "panel+fp16", "panel+fp32")
    loops: Mapping[str, int] = {"skip": 8}

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        if weight.dtype != DTYPES.get(format.values):
            raise PatternMismatch(format=str(format), detail=f"its values are {weight.dtype}")
        n, k = weight.shape
        turned = torch.nn.functional.pad(weight, (0, 0, 0, -n % WIDEST)).T.contiguous()
        return Packed(format, 1, (turned,), torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.tensors[0][:, : packed.shape[0]].T.contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Four warps read ``rows`` x ``columns`` weights a step; splits so that 1500 warps are in flight.

        A thread has 16 bytes of up to four rows in flight, of fewer where several rows of x take its registers. An x of
        128 values a step or more would be laid out for itself, and then moved between threads.
        The list's length is known on the GPU alone: half of the channels is the guess.
        """
        n, k = packed.shape
        each, rows_of_x = 16 // packed.tensors[0].element_size(), triton.next_power_of_2(m)
        most = {1: 4, 2: 4, 4: 2, 8: 1}[rows_of_x]
        shapes = [(c, loads * 128 * each // c) for loads in (4, 2, 1) for c in (64, 128, 256) if loads <= most]
        made = [
            {"columns": columns, "rows": rows, "splits": splits}
            for columns, rows in shapes
            for splits in (1, 2, 4, 8, 16, 32)
            if rows * rows_of_x < 128 and (splits == 1 or k >= 4 * splits * rows)
        ]
        return sorted(made, key=lambda c: abs(-(-n // c["columns"]) * c["splits"] * 4 - 1500))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        """A gate that is a number is rounded to x's dtype first, as ``x.abs() > gate`` does.

        Raises ValueError for more than 8 rows of x and for a gate of another length.
        """
        (weight,), m, (n, k), gate = packed.tensors, call.m, packed.shape, call.gate
        if m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        if isinstance(gate, torch.Tensor) and gate.shape != (k,):
            raise ValueError(f"a gate by channel has {k} thresholds, not {tuple(gate.shape)}")
        new, splits = call.x.new_empty, config["splits"]
        index, value = new((max(k, 1),), dtype=torch.int32), new((m, max(k, 1)), dtype=torch.float32)
        count = new((1,), dtype=torch.int32) if call.count is None else call.count
        lists = self._compact(call, index, value, count, k, gate)
        out = call.y if splits == 1 else new((splits, m, n), dtype=torch.float32)
        args = {
            "WEIGHT": weight, "INDEX": index, "VALUE": value, "COUNT": count, "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "n": n, "k": k, "width": weight.shape[1], "stride_out": out.stride(-2),
        }  # fmt: skip
        shape = {"M": triton.next_power_of_2(m), "ROWS": config["rows"], "COLUMNS": config["columns"]}
        constants = {
            **shape, "SPLITS": splits,
            "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        budget = 7.8 * weight.element_size()  # an H200 issues 7.8 lane instructions in the time of a byte
        counted = Loop("weight", config["rows"] * config["columns"], budget)
        grid = (triton.cdiv(n, config["columns"]), splits)
        main = Launch(threshold, grid, args, constants, warps=4, loop=counted)
        return [lists, main] if splits == 1 else [lists, main, reduction(out, call.y, call.bias, call.act)]

    def _compact(
        self, call: Call, index: torch.Tensor, value: torch.Tensor, count: torch.Tensor, k: int, gate: Gate
    ) -> Launch:
        limit, kind = 0.0, EXACT
        if isinstance(gate, torch.Tensor):
            kind = CHANNEL
        elif gate is not None:
            limit, kind = float(torch.tensor(gate, dtype=call.x.dtype)), SCALAR
        args = {
            "X": call.x, "GATE": gate if isinstance(gate, torch.Tensor) else call.x,
            "INDEX": index, "VALUE": value, "COUNT": count, "limit": limit, "m": call.m, "k": k,
            "stride_x": call.x.stride(0),
        }  # fmt: skip
        constants = {"M": triton.next_power_of_2(call.m), "KIND": kind, "BLOCK": BLOCK}
        return Launch(compact, (max(triton.cdiv(k, BLOCK), 1),), args, constants, warps=4 if call.m <= 2 else 8)


FAMILY = Gated()
