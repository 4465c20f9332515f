"""``block:RxC``, 16 to 128 rows by as many columns, in bf16, fp16 or fp32: a compressed sparse row of whole blocks.

  block row b, the fullest first     start[b]: its first block, int32; order[b]: which block row of the weight it is
  kept block i                       column[i]: its first column / C, int32; value[i, R, C]

8 bytes a block row and 4 a block beside the values: at 16x16 in bf16 that is 16.1 bits a kept weight. A kept block
is dense, so it goes through tensor cores for any number of rows of x; blocks on the lower or right edge are filled with
zeros. Long block rows start first, so that the last programs to run are short ones.

Loop ``mma``: weight [TN, TK] times x^T [TK, TM], the blocks of a row one after the other; where C is narrower than TK
a trip takes several blocks. fp32 is three TF32 products ("tf32x3"), which leaves some 2^-21 of each product.
At M = 1 too: 2 to 3 instructions a bf16 weight, where fp32 multiplications in registers take 16 to 22, over the 15.6 of
an H200, as each row of the weight reads x again. A block of one row is a group, with a file of its own (``groups.py``).

Layout as of block-sparse matrices in STK (Gale et al., MegaBlocks, 2022), without its transposed copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.dot import dot
from sparsec.codegen.triton.epilogue import reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.positions import load_x, write_tile
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

AHEAD = 8  # columns of zero behind the list, for trips that take several blocks: 128 / 16


@triton.jit
def mma(
    X, VALUE, COLUMN, START, ORDER, OUT, BIAS, m, n, k, stride_x, stride_out,
    R: tl.constexpr, C: tl.constexpr, TN: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = R // TN
    place, split = tl.program_id(0) // PARTS, tl.program_id(2)
    first, last = tl.load(START + place), tl.load(START + place + 1)
    each = tl.cdiv(last - first, SPLITS)
    first = first + split * each
    last = tl.minimum(last, first + each)
    inner = tl.program_id(0) % PARTS * TN + tl.arange(0, TN)
    row = tl.program_id(1) * TM + tl.arange(0, TM)
    at = tl.arange(0, TK)
    acc = tl.zeros((TN, TM), tl.float32)
    if TK <= C:
        STEPS: tl.constexpr = C // TK
        for step in tl.range(0, (last - first) * STEPS):
            block = first + step // STEPS
            begin = step % STEPS * TK
            column = tl.load(COLUMN + block) * C + begin + at
            w = tl.load(VALUE + tl.cast(block, tl.int64) * (R * C) + inner[:, None] * C + (begin + at)[None, :])
            acc = dot(w, load_x(X, column, row, m, k, stride_x, EVEN), acc)
    else:
        for block in tl.range(first, last, TK // C):
            one = block + at // C
            kept = tl.max_constancy(tl.load(COLUMN + one), C)
            column = tl.multiple_of(kept * C, C) + at % C
            offset = tl.cast(one, tl.int64) * (R * C) + at % C
            inside = (one < last)[None, :]
            w = tl.load(VALUE + offset[None, :] + inner[:, None] * C, mask=inside, other=0.0)
            acc = dot(w, load_x(X, column, row, m, k, stride_x, EVEN), acc)
    output = tl.load(ORDER + place) * R + inner
    write_tile(acc, OUT, BIAS, output, row, m, n, stride_out, split, SPLITS == 1, ACT, HAS_BIAS)


class Block:
    kind = "block"
    formats: Sequence[str] = (
        *(f"block:{size}+{values}" for size in ("16x16", "64x64") for values in ("bf16", "fp16", "fp32")),
        *(f"block:{size}+bf16" for size in ("32x32", "128x128", "16x64")),
    )
    loops = LOOPS["block"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        rows, cols = format.pattern.params
        if any(size not in (16, 32, 64, 128) for size in (rows, cols)):
            detail = "blocks have 16, 32, 64 or 128 rows and columns"
            raise PatternMismatch(format=str(format), detail=detail)
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -k % cols, 0, -n % rows))
        blocks = padded.view(len(padded) // rows, rows, -1, cols).transpose(1, 2)  # [N / R, K / C, R, C]
        kept = (blocks != 0).flatten(2).any(2)
        counts = kept.sum(1)
        order = torch.argsort(counts, descending=True, stable=True)
        start = torch.cat([counts.new_zeros(1), counts[order].cumsum(0)]).int()
        place, column = kept[order].nonzero().unbind(1)
        value = blocks[order[place], column].contiguous()
        tensors = (value, torch.nn.functional.pad(column.int(), (0, AHEAD)), start, order.int())
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        value, column, start, order = packed.tensors
        rows, cols = packed.format.pattern.params
        n, k = packed.shape
        out = value.new_zeros((-(-n // rows), -(-k // cols), rows, cols))
        row = torch.repeat_interleave(order.long(), (start[1:] - start[:-1]).long())
        out[row, column[: len(row)].long()] = value
        return out.transpose(1, 2).reshape(out.shape[0] * rows, -1)[:n, :k].contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        rows, cols = packed.format.pattern.params
        value, _, start, _ = packed.tensors
        mean = len(value) / max(len(start) - 1, 1)
        wide = value.element_size() == 4
        splits = [s for s in (1, 2, 4, 8) if s == 1 or mean >= 4 * s]
        most = 32 if wide else 128
        made = [
            {"tn": tn, "tm": tm, "tk": tk, "splits": s, "warps": _warps(tn * tm)}
            for tn in dict.fromkeys((min(rows, 64), rows, 16))
            for tm in (16, 32, 64, 128)
            if tm == 16 or (tm <= 2 * m and tm <= most)
            for tk in (64, 128, 32)
            if tk // cols <= AHEAD and tn * tk <= 8192 and (tk == 32 or not wide)
            for s in splits
        ]
        return sorted(made, key=lambda c: _cost(c, len(start) - 1, rows, m))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        (rows, cols), (n, k), m = packed.format.pattern.params, packed.shape, call.m
        value, column, start, order = packed.tensors
        splits, tn = config["splits"], config["tn"]
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        args = {
            "X": call.x, "VALUE": value, "COLUMN": column, "START": start, "ORDER": order, "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "n": n, "k": k, "stride_x": call.x.stride(0), "stride_out": out.stride(-2),
        }  # fmt: skip
        constants = {
            "R": rows, "C": cols, "TN": tn, "TM": config["tm"], "TK": config["tk"], "SPLITS": splits,
            "EVEN": k % cols == 0, "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        places = (len(start) - 1) * (rows // tn)
        budget = 7.8 * value.element_size()
        grid = (places, triton.cdiv(m, config["tm"]), splits)
        counted = Loop("nonzero", tn * config["tk"], budget, repeats=grid[1])
        main = Launch(mma, grid, args, constants, warps=config["warps"], loop=counted)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]


def _warps(tile: int) -> int:
    return 8 if tile >= 128 * 128 else 4 if tile >= 64 * 16 else 1


def _cost(config: Config, block_rows: int, rows: int, m: int) -> float:
    """How far a configuration is from 1500 warps in flight, or from large tiles once there are more."""
    programs = block_rows * (rows // config["tn"]) * config["splits"] * -(-m // config.get("tm", m))
    flights = programs * config["warps"] / 1500
    return abs(flights - 1) if flights < 1 else (flights - 1) / (4 if m > 64 else 1)


FAMILY = Block()
