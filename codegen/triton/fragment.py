"""``fragment``: dense tensor cores fed from weights in register order, for up to 32 rows of x.

Quantised dense weights (int8, int4, ternary, 16 levels), and 4:8 and 8:16 in 16-bit values.

  blocks of 16 rows x 256 columns along K, then along N, as ``fragment_pack`` lays them out for ``mma16``:
    words     int4, codebook: 4 loads of 16 bytes a lane; int8: 8; ternary: 2; 4:8, 8:16: 8 of values
    bits      4:8, 8:16: one load more, a bit for each position
    scale     of rows [N], of groups [block, part, g, (group of two, h)], of a codebook the bytes of its levels

Nothing passes through shared memory or between lanes before the products: a warp streams blocks of its own, a trip
ahead, makes registers of the A operand of them and multiplies. x is read in place, 16 bytes a lane for eight of its
rows and 32 columns.

Lane instructions a weight on sm_90 for up to 8 rows of x, and what an H200 can issue while it arrives:

  int4       1.7 to 2.2 of 3.9 to 4.4: of two, a shift, an "and or" and a subtraction
  int8       2.1 of 7.8: two "and or" more for the sign
  ternary    1.5 of 2.0: as int4, but three codes share a shift
  codebook   3.0 of 3.9: of four, 6 permutations for their bytes, 2 that join those, 2 or 3 that select
  4:8        3.3 of 8.8: of four, 2 for bits, 1 or 2 for ranks, and of each two a permutation, 2 for a mask, an "and"
  8:16       4.6 of 8.8: quads 1 and 2 of four also count another quad, and choose between two pairs of registers

Each further eight rows cost 1/8 for the product, 1/16 for the load of x and four for each lane and group of columns
with a scale. Above 32 rows x flows through L1 more often than an SM can take it, and registers spill.

Integers are multiplied as such, exact in bf16 and fp16; scales multiply fp32 sums of a group's columns, or of a row.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.epilogue import reduction
from sparsec.codegen.triton.fragment_pack import (
    BITS,
    COLUMNS,
    ROWS,
    dense_back,
    dequantise,
    quantise,
    sparse_words,
)
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.mma16 import levels, mma16, octets, ternary
from sparsec.codegen.triton.mma_sp import decode, fold
from sparsec.codegen.triton.nm import check
from sparsec.codegen.triton.nm24 import BYTE, cost, write
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind

KINDS = ("int4", "int8", "ternary", "codebook", "4:8", "8:16")  # kernels get the position in this tuple
LOADS = {"int4": 4, "int8": 8, "ternary": 2, "codebook": 4, "4:8": 8, "8:16": 8}


@triton.jit
def padded(X, OUT, m, k, wide, stride_x, BLOCK: tl.constexpr):
    """x [m, k] as [m, wide], zeros behind it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // wide, at % wide
    x = tl.load(X + tl.cast(row, tl.int64) * stride_x + column, mask=(row < m) & (column < k), other=0.0)
    tl.store(OUT + at, x, mask=row < m)


@triton.jit
def fetch(A, E, block, i, LOADS: tl.constexpr, SPARSE: tl.constexpr):
    """The words of one block for each warp: ``LOADS`` 16-byte loads a lane, and one of bits."""
    at = A + block.to(tl.int64) * (LOADS * 128) + i % 128
    words = ()
    for j in tl.static_range(LOADS):
        words = words + (tl.load(at + j * 128),)
    if SPARSE:
        words = words + (tl.load(E + block.to(tl.int64) * 128 + i % 128),)
    return words


@triton.jit
def registers(words, table, Q: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """The A operand of product ``Q`` of a block."""
    if KIND == 0:
        return decode(words[Q // 4], Q % 4, 4, HALF, ASM)
    elif KIND == 1:
        return decode(words[Q // 2], Q % 2, 8, HALF, ASM)
    elif KIND == 2:
        return ternary(words[Q // 8], Q, HALF, ASM)
    elif KIND == 3:
        return levels(words[Q // 4], table[0], table[1], table[2], table[3], Q, ASM)
    elif KIND == 4:
        return octets(words[Q // 2], words[Q // 2], words[8], Q, 4, ASM)
    else:
        return octets(words[Q // 4 * 2], words[Q // 4 * 2 + 1], words[8], Q, 8, ASM)


@triton.jit
def multiply(
    accs, words, table, scale, block, x, i,
    KIND: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr,
    COUNT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block for each warp; accs: of x tile t and row tile r at t * EACH + r. x: one pointer for each x tile.

    COUNT: loads of a block in ``words``. k-tiles that share a scale are multiplied from zero and then folded in.
    """
    SPAN: tl.constexpr = GROUP // 32 if GROUP > 1 else 4
    scales = ()
    for u in tl.static_range(8 // SPAN):
        if GROUP > 1 and u % 2 == 0:
            scales = ()
            for r in tl.static_range(EACH):
                at = scale + block[r].to(tl.int64) * (4096 // GROUP) + u * 16 + i // 16 % 8 * 4 + i % 4
                scales = scales + (tl.load(at).to(tl.float32),)
        parts = accs
        for jj in tl.static_range(SPAN):
            b = ()
            for t in tl.static_range(TILES):
                if KIND == 5:
                    b = b + (tl.load(x[t] + ((u * SPAN + jj) // 2 * 32 + jj % 2 * 4)),)
                else:
                    b = b + (tl.load(x[t] + (u * SPAN + jj) * 16),)
            for h in tl.static_range(2):
                a = ()
                for r in tl.static_range(EACH):
                    own, levels = words[r * COUNT : (r + 1) * COUNT], table[r * 4 : r * 4 + 4]
                    a = a + (registers(own, levels, (u * SPAN + jj) * 2 + h, KIND, HALF, ASM),)
                added = ()
                for t in tl.static_range(TILES):
                    for r in tl.static_range(EACH):
                        if GROUP > 1 and jj == 0 and h == 0:
                            y = tl.zeros(accs[0].shape, tl.float32)
                        else:
                            y = parts[t * EACH + r]
                        added = added + (mma16(a[r], b[t], y, h, HALF, ASM),)
                parts = added
        if GROUP > 1:
            added = ()
            for t in tl.static_range(TILES):
                for r in tl.static_range(EACH):
                    added = added + (fold(accs[t * EACH + r], parts[t * EACH + r], scales[r], u % 2, ASM),)
            parts = added
        accs = parts
    return accs


@triton.jit
def skinny(
    A, E, SCALE, X, OUT, BIAS, m, n, blocks, steps, stride_x, stride_out,
    KIND: tl.constexpr, LOADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``GROUP``: columns that share a scale; 1: whole rows do, 0: there is none. ``WHOLE``: no warp is ever idle."""
    SIZE: tl.constexpr = ROWS * PARTS * 128
    SPARSE: tl.constexpr = KIND > 3
    COUNT: tl.constexpr = LOADS + SPARSE
    i = tl.arange(0, SIZE)
    group, split = tl.program_id(0), tl.program_id(1)
    top = (group * ROWS + i // (128 * PARTS)) * EACH
    step = split * PARTS + i // 128 % PARTS
    words, table, block, x_row, accs = (), (), (), (), ()
    for r in tl.static_range(EACH):
        # Warps at the edges repeat the last rows, which are not stored, or the last step, which is not added.
        row = tl.minimum(top + r, blocks - 1)
        block = block + (row * steps + tl.minimum(step, steps - 1),)
        words = words + fetch(A, E, block[r], i, LOADS, SPARSE)
        for part in tl.static_range(4 if KIND == 3 else 0):
            table = table + (tl.load(SCALE + row.to(tl.int64) * 128 + i // 16 % 8 * 16 + part * 4 + i % 4),)
    for t in tl.static_range(TILES):
        place = i // 4 % 4 * 8 + i % 4 if KIND == 5 else i % 16
        x_row = x_row + (X + tl.minimum(t * 8 + i // 16 % 8, m - 1).to(tl.int64) * stride_x + place,)
    for _ in tl.static_range(TILES * EACH):
        accs = accs + (tl.zeros((SIZE,), tl.float32),)
    for _trip in tl.range(0, steps - split * PARTS, SPLITS * PARTS):
        live = step < steps
        x = ()
        for t in tl.static_range(TILES):
            x = x + (x_row[t] + tl.minimum(step, steps - 1) * 128,)
        step += SPLITS * PARTS
        ahead, block_ahead = (), ()
        for r in tl.static_range(EACH):
            row = tl.minimum(top + r, blocks - 1)
            block_ahead = block_ahead + (row * steps + tl.minimum(step, steps - 1),)
            ahead = ahead + fetch(A, E, block_ahead[r], i, LOADS, SPARSE)
        made = multiply(accs, words, table, SCALE, block, x, i, KIND, GROUP, HALF, TILES, EACH, COUNT, ASM)
        if WHOLE:
            accs = made
        else:
            kept = ()
            for t in tl.static_range(TILES * EACH):
                kept = kept + (tl.where(live, made[t], accs[t]),)
            accs = kept
        words, block = ahead, block_ahead
    for t in tl.static_range(TILES):
        for r in tl.static_range(EACH):
            tile = (group * ROWS + tl.arange(0, ROWS)[:, None]) * EACH + r
            write(
                accs[t * EACH + r], SCALE, OUT, BIAS, m, n, stride_out, tile, t, split,
                GROUP, ROWS, PARTS, SPLITS, ACT, HAS_BIAS,
            )  # fmt: skip


NATIVE = isinstance(skinny, triton.JITFunction)  # the interpreter runs no assembly


class Fragment:
    kind = "fragment"
    formats = (
        *(f"dense+{kind}" for kind in ("int4g128", "int4g64", "int4g32", "int4", "int8", "int8g128")),
        *("dense+ternary", "dense+codebook", "nm:4:8+bf16", "nm:8:16+bf16", "nm:8:16+fp16"),
    )
    loops = LOOPS["fragment"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        if weight.dtype not in (torch.bfloat16, torch.float16):
            raise PatternMismatch(format=str(format), detail=f"its values are {weight.dtype}")
        like = weight.new_empty(0)
        if format.pattern.kind == "nm":
            keep, wide = format.pattern.params
            if (keep, wide) not in ((4, 8), (8, 16)):
                raise PatternMismatch(format=str(format), detail="of N:M, 4:8 and 8:16 are laid out")
            check(weight, format, keep, wide)
            n, k = weight.shape
            filled = torch.nn.functional.pad(weight, (0, -k % COLUMNS, 0, -n % ROWS))
            tensors = (*sparse_words(filled, keep), like)
        elif value_kind(format.values)[0] in BITS:
            tensors = (*quantise(weight, format), like)
        else:
            raise PatternMismatch(format=str(format), detail="a dense weight that is not quantised needs no pack")
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (*weight.shape,), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        words, second, like = packed.tensors
        n, k = packed.shape
        if packed.format.pattern.kind == "nm":
            weight = dense_back(words, second, packed.format.pattern.params[0], like)
        else:
            weight = dequantise(words, second, packed.format, like)
        return weight[:n, :k].contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """``rows`` and ``parts``: warps along N and K. ``each``: row tiles of a warp, which share a load of x."""
        blocks, steps = packed.tensors[0].shape[:2]
        made = [
            {"rows": rows, "each": each, "parts": parts, "splits": splits}
            for rows in (1, 2, 4, 8)
            for each in ((1, 2) if m > 16 else (1,))
            for parts in (1, 2, 4, 8)
            for splits in (1, 2, 4, 8)
            if rows * parts <= 8 and (splits * parts <= steps or splits * parts == 1)
        ]
        stored = 8 * packed.bytes / (blocks * steps * ROWS * COLUMNS)
        return sorted(made, key=lambda config: cost(blocks, steps, stored, m, config))[:24]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        m, n = call.m, packed.shape[0]
        if m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        words, second, like = packed.tensors
        if call.x.dtype != like.dtype:
            raise ValueError(f"x of {call.x.dtype} with a weight of {like.dtype}")
        kind = _kind(packed.format)
        blocks, steps = words.shape[:2]
        rows, each, parts, splits = config["rows"], config["each"], config["parts"], config["splits"]
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        before, x = _in_place(call.x, steps * COLUMNS)
        args = {
            "A": words, "E": second if ":" in kind else words, "SCALE": second, "X": x, "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "n": n, "blocks": blocks, "steps": steps, "stride_x": x.stride(0), "stride_out": out.stride(-2),
        }  # fmt: skip
        scaled = 0 if kind == "codebook" or ":" in kind else value_kind(packed.format.values)[1] or 1
        constants = {
            "KIND": KINDS.index(kind), "LOADS": LOADS[kind], "GROUP": scaled, "HALF": like.dtype == torch.float16,
            "TILES": triton.next_power_of_2(-(-m // 8)), "ROWS": rows, "EACH": each, "PARTS": parts, "SPLITS": splits,
            "WHOLE": steps % (parts * splits) == 0, "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
            "ASM": NATIVE,
        }  # fmt: skip
        stored = (LOADS[kind] + (":" in kind)) * 512
        if scaled > 1:
            stored += ROWS * COLUMNS // scaled * second.element_size()
        counted = Loop("weight", rows * each * parts * ROWS * COLUMNS, BYTE * stored / (ROWS * COLUMNS))
        main = Launch(
            skinny, (triton.cdiv(blocks, rows * each), splits), args, constants,
            warps=rows * parts, loop=counted, expects={"mma": "HMMA"},
        )  # fmt: skip
        after = [] if splits == 1 else [reduction(out, call.y, call.bias, call.act)]
        return [*before, main, *after]


def _kind(format: Format) -> str:
    if format.pattern.kind == "nm":
        return "{}:{}".format(*format.pattern.params)
    return value_kind(format.values)[0]


def _in_place(x: torch.Tensor, wide: int) -> tuple[list[Launch], torch.Tensor]:
    """x as pairs of columns, int32 [M, wide / 2]; and the launch that widens what is narrow or not aligned."""
    if x.shape[1] == wide and x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0:
        return [], x.view(torch.int32)
    out = x.new_empty((x.shape[0], wide))
    args = {"X": x, "OUT": out, "m": x.shape[0], "k": x.shape[1], "wide": wide, "stride_x": x.stride(0)}
    launch = Launch(padded, (triton.cdiv(out.numel(), 1024),), args, {"BLOCK": 1024})
    return [launch], out.view(torch.int32)


FAMILY = Fragment()
