"""Patterns that keep a fixed count: ``keep`` of every ``width`` neighbours, with or without a table of columns.

  slot s of a row: group s // keep, and a position in it; ascending and distinct in a group, so that zeros fill up
    position[r, e]  of four slots, 2, 4 or 8 bits each (one u8, int16 or int32)     value[r, e]  element of positions.py
    table[v, g]     int32, of four bytes: the columns of group g, of M, that block v of V rows may keep (``vnm``)

Nothing is counted or looked up, since the group follows from the slot. Elements of a row are padded to whole runs.

Loop ``gather`` reads x at the kept columns. Lane instructions a kept value on sm_90, one row of x: 10.6 (4:8), 11.1
(8:16), 10.9 (2:4), 12.1 (3:32, where the group needs a division), 15.4 with a table. An H200 waits for memory below
19.5, 19.5, 17.6, 23.4 and 17.6. Every further row adds three, so some three rows still wait for memory, and eight are
issue-bound (32).

Loop ``tile`` turns positions into a bit each, ranks them and loads by rank: 12.3 (4:8), 14.5 (8:16), 15.2 (2:4) and
10.4 (3:32) a position, where memory allows 9.8, 9.8, 8.8 and 2.2. So it is for rows of x that ``fragment`` (4:8, 8:16:
32 rows, in 3.3 and 4.6) and ``nm24`` (2:4, 64) do not take, whose products take as long as the weight from memory.
At 3:32 nothing that expands can keep to 2.2: a position's rank, load and select are three. Selecting among values in
registers instead of shared memory takes N (M - N + 1) / M compares and selects, 9 a position at 8:16, and Triton moves
its conversions in between (42). A thread must not share a run with another, or the tile is converted piece by piece
(52).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.dot import dot
from sparsec.codegen.triton.epilogue import reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.positions import (
    KINDS,
    LANE_INSTRUCTIONS,
    add_rows,
    joined,
    load_values,
    load_x,
    value,
    value_words,
    values_back,
    write_rows,
    write_tile,
    zeros,
)

ROWS = 16  # of a program of ``gather``
GATHERED = "each further row of x costs a load, a conversion and a product; `skinny` takes them on tensor cores"
TILED = "for more rows of x than `skinny` takes: ranks, loads and selects cost the same for any number of rows"
SPARSE = "every position of a tile takes a rank, a load and a select, kept or not; `gather` is for few rows of x"
TILE = 128  # columns of a tile, or one run where that is wider


@triton.jit
def gather(
    X, POSITION, TABLE, VALUE, OUT, BIAS, n, k, elements, groups, stride_out,
    M: tl.constexpr, STRIDE: tl.constexpr, KEEP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    V: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
    VALUES: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, ROWS * LANES * 2)
    piece = i % (LANES * 2)
    row = tl.minimum(block * ROWS + i // (LANES * 2), n - 1)
    at = row.to(tl.int64) * elements + piece
    sums = zeros(M, ROWS * LANES * 2)
    for step in tl.range(split * LANES * 2, elements, SPLITS * LANES * 2):
        inside = piece < elements - step
        position = tl.load(POSITION + at + step, mask=inside, other=0).to(tl.int32)
        words = load_values(VALUE, at + step, inside, 0, VALUES)
        element = tl.minimum(piece + step, elements - 1)
        for j in tl.static_range(4):
            if KEEP % 4 == 0:
                group = element // (KEEP // 4)
            elif 4 % KEEP == 0:
                group = element * (4 // KEEP) + j // KEEP
            else:
                group = (element * 4 + j) // KEEP
            if CLAMP:
                group = tl.minimum(group, groups - 1)
            kept = (position >> (BITS * j)) & (2**BITS - 1)
            if V > 0:
                kept = (tl.load(TABLE + row // V * groups + group) >> (8 * kept)) & 255
            if CLAMP:
                place = X + tl.minimum(group * WIDTH + kept, k - 1)
            else:
                place = X + group * WIDTH + kept
            sums = add_rows(sums, place, value(words, j, VALUES), M, STRIDE)
    column = block * ROWS + tl.arange(0, ROWS)
    write_rows(sums, OUT, BIAS, BIAS, column, n, stride_out, split, M, ROWS, SPLITS, VALUES, ACT, HAS_BIAS)


@triton.jit
def ranked(
    POSITION, at, first, inside, SIZE: tl.constexpr,
    KEEP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """For the ``GROUPS * WIDTH`` columns of each run: which are kept, and where in ``SIZE`` places the value lies.

    ``at``: the run's first element; ``first``: the place of its first value. Positions become one bit each, then a
    running sum ranks them. After its last kept column a group points to the next one's value, which is not used.
    """
    bits = ()
    for e in tl.static_range(GROUPS * KEEP // 4):
        four = tl.load(POSITION + at + e, mask=inside, other=0).to(tl.int32)
        for j in tl.static_range(4):
            bits = bits + (1 << ((four >> (BITS * j)) & (2**BITS - 1)),)  # type: ignore[assignment]
    ranks, kept = (), ()
    for group in tl.static_range(GROUPS):
        word = bits[group * KEEP]  # type: ignore[var-annotated]
        for slot in tl.static_range(1, KEEP):
            word |= bits[group * KEEP + slot]
        rank = first + group * KEEP
        for column in tl.static_range(WIDTH):
            bit = (word >> column) & 1
            kept = kept + (bit != 0,)  # type: ignore[assignment]
            if group == GROUPS - 1 and column >= KEEP:
                ranks = ranks + (rank & (SIZE - 1),)  # type: ignore[assignment]
            else:
                ranks = ranks + (rank,)  # type: ignore[assignment]
            rank += bit
    return ranks, kept


@triton.jit
def tile(
    X, POSITION, TABLE, VALUE, OUT, BIAS, m, n, k, elements, runs, columns, stride_x, stride_out,
    KEEP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, V: tl.constexpr,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` is of the compressed columns and ``SPAN`` of the real ones of a group; they differ with a table."""
    block, rows, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BN * RUNS)
    row = tl.minimum(block * BN + i // RUNS, n - 1)
    run = i % RUNS
    at = row.to(tl.int64) * elements + run * (GROUPS * KEEP // 4)
    first = i // RUNS * SLOTS + run * (GROUPS * KEEP)
    slot = tl.arange(0, SLOTS)[None, :]
    source = VALUE + tl.minimum(block * BN + tl.arange(0, BN), n - 1).to(tl.int64)[:, None] * elements * 4 + slot
    sums = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(split * RUNS, runs, SPLITS * RUNS):
        here = at + step * (GROUPS * KEEP // 4)
        inside = run < runs - step
        ranks, kept = ranked(POSITION, here, first, inside, BN * SLOTS, KEEP, WIDTH, BITS, GROUPS)
        left = (runs - step) * (GROUPS * KEEP)
        values = tl.load(source + step * (GROUPS * KEEP), mask=(slot < left) & (slot < RUNS * GROUPS * KEEP), other=0)
        ranks = tl.reshape(joined(ranks, GROUPS * WIDTH), (BN * RUNS * GROUPS * WIDTH,))
        weight = tl.reshape(tl.gather(tl.reshape(values, (BN * SLOTS,)), ranks, 0), (BN, RUNS * GROUPS * WIDTH))
        weight = tl.where(tl.reshape(joined(kept, GROUPS * WIDTH), weight.shape), weight, 0).to(tl.int16)
        column = step * (GROUPS * WIDTH) + tl.arange(0, RUNS * GROUPS * WIDTH)
        if V > 0:
            byte = tl.load(TABLE + block * BN // V * columns + column, mask=column < columns, other=0).to(tl.int32)
            column = tl.where(column < columns, column // WIDTH * SPAN + byte, k)
        x = load_x(X, column, rows * BM + tl.arange(0, BM), m, k, stride_x, EVEN)
        sums = dot(weight.to(X.dtype.element_ty, bitcast=True), x, sums)
    column, row = block * BN + tl.arange(0, BN), rows * BM + tl.arange(0, BM)
    write_tile(sums, OUT, BIAS, column, row, m, n, stride_out, split, SPLITS == 1, ACT, HAS_BIAS)


@dataclass(frozen=True)
class Fixed:
    """``keep`` of ``width`` (compressed) columns, that span ``span`` real ones; ``v``: rows of a table, 0 for none."""

    keep: int
    width: int
    span: int
    v: int = 0

    @property
    def bits(self) -> int:
        return 2 if self.width <= 4 else 4 if self.width <= 16 else 8

    @property
    def run_groups(self) -> int:
        """Groups of a run: the fewest whose slots fill whole elements."""
        return 4 // math.gcd(self.keep, 4)

    @property
    def run_elements(self) -> int:
        return self.run_groups * self.keep // 4

    @property
    def runs(self) -> int:
        """Of a tile."""
        return max(TILE // (self.run_groups * self.width), 1)

    @property
    def lanes(self) -> int:
        """Threads of a tile's row."""
        return min(self.runs, TILE // 64)

    def pack(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position [N, E] and value [N, E] of a weight [N, (compressed) K] that is known to hold the pattern."""
        n, k = weight.shape
        whole = self.width * self.run_groups * (1 + self.run_elements % 2)  # an even count of elements
        grouped = torch.nn.functional.pad(weight, (0, -k % whole)).view(n, -1, self.width)
        number = torch.arange(self.width, device=weight.device)
        key = torch.where(grouped != 0, number, number + self.width)
        position = key.sort(2).values[:, :, : self.keep] % self.width
        position = position.sort(2).values
        value = grouped.gather(2, position).reshape(n, -1)
        shift = self.bits * torch.arange(4, device=weight.device)
        four = (position.reshape(n, value.shape[1] // 4, 4) << shift).sum(2)
        dtype = {2: torch.uint8, 4: torch.int16, 8: torch.int32}[self.bits]
        return four.to(dtype), value_words(value)

    def unpack(self, position: torch.Tensor, value: torch.Tensor, values: str, k: int) -> torch.Tensor:
        """The weight [N, k] back."""
        n = len(position)
        shift = self.bits * torch.arange(4, device=position.device)
        at = ((position.long()[:, :, None] >> shift) & (2**self.bits - 1)).view(n, -1, self.keep)
        kept = values_back(value, values).view(n, at.shape[1], self.keep)
        dense = kept.new_zeros(n, at.shape[1], self.width).scatter_(2, at, kept)
        return dense.view(n, at.shape[1] * self.width)[:, :k].contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        n, elements = packed.shape[0], packed.tensors[0].shape[1]
        splits = [s for s in (1, 2, 4, 8) if s == 1 or s * 32 <= elements]
        if loop == "gather":
            made = [
                {"lanes": lanes, "splits": s, "warps": max(1, ROWS * lanes // 32 // each)}
                for lanes in (8, 16, 32)
                for s in splits
                for each in (1, 2)
                if lanes == 8 or 2 * lanes * s <= elements
            ]
            return sorted(made, key=lambda c: abs(-(-n // ROWS) * c["splits"] * c["warps"] - 4000))
        most = 32 if self.v or self.lanes == 1 or capability >= 120 else 64  # more rows of x in a tile spill registers
        bm = min(16 if m <= 16 else 32 if m <= 32 else 64, most)
        sizes = [size for size in (64, 128, 32) if not self.v or self.v % size == 0] or [self.v & -self.v]
        # 64 columns a thread, but not more threads than runs: what two threads hold alike is converted all the time.
        made = [
            {"bm": bm, "bn": bn, "splits": s, "warps": max(1, bn * self.lanes // 32)} for bn in sizes for s in splits
        ]
        return sorted(made, key=lambda c: abs(-(-n // c["bn"]) * -(-m // bm) * c["splits"] * c["warps"] - 1500))

    def launches(
        self, packed: Packed, loop: str, most: int, call: Call, config: Config, table: torch.Tensor | None = None
    ) -> list[Launch]:
        """``table``: int32 [blocks of rows, groups] where there is one. Raises ValueError where the loop cannot."""
        if most and call.m > most:
            raise ValueError(f"{loop} takes at most {most} rows, not {call.m}")
        if loop == "tile" and self.width not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"groups of a tile have 1, 2, 4, .. or 32 columns, not {self.width}")
        n, splits = packed.shape[0], config["splits"]
        out = call.y if splits == 1 else call.x.new_empty((splits, call.m, n), dtype=torch.float32)
        main = (self._gather if loop == "gather" else self._tile)(packed, call, config, out, table)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]

    def _shared(
        self, packed: Packed, call: Call, out: torch.Tensor, splits: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        position, words = packed.tensors[:2]
        args = {
            "X": call.x, "POSITION": position, "VALUE": words, "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias, "n": packed.shape[0], "k": packed.shape[1],
            "elements": position.shape[1], "stride_out": out.stride(-2),
        }  # fmt: skip
        constants = {
            "KEEP": self.keep, "WIDTH": self.width, "BITS": self.bits, "V": self.v, "SPLITS": splits,
            "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        return args, constants

    def _gather(
        self, packed: Packed, call: Call, config: Config, out: torch.Tensor, table: torch.Tensor | None
    ) -> Launch:
        args, constants = self._shared(packed, call, out, config["splits"])
        (n, k), elements, groups = packed.shape, packed.tensors[0].shape[1], -(-packed.shape[1] // self.span)
        args |= {"TABLE": packed.tensors[0] if table is None else table, "groups": groups}
        constants |= {
            "M": call.m, "STRIDE": call.x.stride(0) if call.m > 1 else 0, "WIDTH": self.span, "ROWS": ROWS,
            "CLAMP": k % self.span != 0 or elements * 4 != groups * self.keep,
            "LANES": config["lanes"], "VALUES": KINDS.index(packed.format.values),
        }  # fmt: skip
        counted = Loop("nonzero", ROWS * config["lanes"] * 8, LANE_INSTRUCTIONS * (2 + self.bits / 8), reason=GATHERED)
        return Launch(
            gather, (triton.cdiv(n, ROWS), config["splits"]), args, constants, warps=config["warps"], loop=counted
        )

    def _tile(
        self, packed: Packed, call: Call, config: Config, out: torch.Tensor, table: torch.Tensor | None
    ) -> Launch:
        args, constants = self._shared(packed, call, out, config["splits"])
        (n, k), bm, bn, m = packed.shape, config["bm"], config["bn"], call.m
        width = self.run_groups * self.width
        runs = self.runs
        args |= {
            "VALUE": packed.tensors[1].view(torch.int16), "m": m, "stride_x": call.x.stride(0),
            "TABLE": packed.tensors[0] if table is None else table.view(torch.uint8),
            "runs": packed.tensors[0].shape[1] // self.run_elements, "columns": -(-k // self.span) * self.width,
        }  # fmt: skip
        slots = triton.next_power_of_2(runs * self.run_elements * 4)
        constants |= {
            "GROUPS": self.run_groups, "SPAN": self.span, "SLOTS": slots, "BM": bm, "BN": bn, "RUNS": runs,
            "EVEN": not self.v and k % (runs * width) == 0,
        }  # fmt: skip
        stored = self.keep / self.width * (2 + self.bits / 8)  # bytes a (compressed) position
        reason = TILED if self.keep * 2 == self.width else SPARSE
        counted = Loop("weight", bn * runs * width, LANE_INSTRUCTIONS * stored, triton.cdiv(m, bm), reason)
        grid = (triton.cdiv(n, bn), triton.cdiv(m, bm), config["splits"])
        return Launch(tile, grid, args, constants, warps=config["warps"], loop=counted)
