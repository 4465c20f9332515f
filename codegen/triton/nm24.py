"""``nm24``: weights of which two of every four neighbours are kept, for up to 64 rows of x, on sparse tensor cores.

  block: 16 rows x 256 columns = 8 k-tiles of 32 columns, in the register order of ``mma.sp`` (see ``mma_sp``)
    values     bf16, fp16: [k-tile 8, lane 32, register 4] int32, two values a register             8 KiB
               int8:       [pair of k-tiles 4, lane, word 4]: k-tile j has words 2 (j % 2) + q, bytes (v, h)
               int4:       [four k-tiles 2, lane, word 4]: k-tile j has word j % 4, nibbles (v, q, h), plus 8
    metadata   [lane, word 4] int32: word w serves k-tiles 2w and 2w + 1                            512 B
    scales     of groups of 128: [g 8, (group 2, h 2)] fp32; of whole rows: [N] fp32 beside the blocks
  blocks of 16 rows follow each other along K, rows are padded to 16 and columns to 256 with zeros; a last block is zero

9 bits a weight in 16-bit values, 5 in int8, 3.13 in int4 with groups. A warp streams blocks of its own, 4.5 KiB a trip
in 16-byte loads that are issued a trip ahead, and nothing is reordered on the way to the tensor core: weights are the
A operand, so rows of x are the side of eight, and up to eight such tiles share one load of the weights.

Warps of a program stand along the rows (``rows``, each with ``each`` tiles) or along K (``parts``, added up through
shared memory), and programs may split K too (``splits``, added by ``reduce``). Where parts do not divide the blocks of
a row, a warp without work reads the zero block, which costs no memory traffic and no mask in the loop: assembly must
not be predicated.

x: either its pairs of columns are read in place (``direct``: four 4-byte loads a k-tile, one cache line for each row
of x), or a small kernel before brings it into register order (one 16-byte load a k-tile and eight rows).

Lane instructions a weight on sm_90, of 8.8 (16 bits), 4.9 (int8) and 3.2 (int4) that an H200 can issue while the
weight arrives: 0.4, 1.2, 1.1 for 8 rows of x; 0.6, 1.4, 1.3 for one row read in place; 1.1, 1.9, 2.3 for 64. ptxas
sinks the loads of the next trip below the products of this one, which saves registers: 64 of them for few rows, so an
SM holds 32 warps.

Integers are multiplied as such, exact in bf16 and fp16. Scales multiply fp32 sums: of 128 columns, or of a whole row.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS, nm24_pack
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.epilogue import finish, reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.mma_sp import (
    decode,
    fold,
    mma,
)
from sparsec.codegen.triton.nm24_pack import COLUMNS, ROWS
from sparsec.formats import Format, value_kind

BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
BYTE = 7.8  # lane instructions an H200 can issue while a byte arrives


@triton.jit
def arrange(X, OUT, m, k, stride_x, COLS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """x [m, k] in the order of registers b: [step, tile of rows, k-tile 8, row COLS, t 4, r 4, 2], zeros around it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair, r, t, row = at % 2, at // 2 % 4, at // 8 % 4, at // 32 % COLS
    rest = at // (32 * COLS)
    tile, step = rest // 8 % TILES, rest // (8 * TILES)
    row += tile * 8
    column = step * 256 + rest % 8 * 32 + r * 8 + t * 2 + pair
    x = tl.load(X + tl.cast(row, tl.int64) * stride_x + column, mask=(row < m) & (column < k), other=0.0)
    tl.store(OUT + at, x)


@triton.jit
def fetch(A, block, i, LOADS: tl.constexpr):
    """The values of one block for each warp: ``LOADS`` 16-byte loads a lane."""
    at = A + block.to(tl.int64) * (LOADS * 128) + i % 128
    words = ()
    for j in tl.static_range(LOADS):
        words = words + (tl.load(at + j * 128),)
    return words


@triton.jit
def multiply(
    accs, words, meta, scale, x,
    BITS: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr, COLS: tl.constexpr,
    EACH: tl.constexpr, DIRECT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block for each warp; accs: of x tile t and row tile r at t * EACH + r."""
    LOADS: tl.constexpr = BITS // 2
    PER: tl.constexpr = 16 // BITS  # k-tiles of a load
    for u in tl.static_range(2):  # four k-tiles, which share a scale
        a = ()
        for r in tl.static_range(EACH):
            for j in tl.static_range(4):
                if BITS == 16:
                    a = a + (words[r * LOADS + u * 4 + j],)
                else:
                    a = a + (decode(words[r * LOADS + (u * 4 + j) // PER], u * 4 + j, BITS, HALF, ASM),)
        added = ()
        for t in tl.static_range(TILES):
            b = ()
            for j in tl.static_range(4):
                if DIRECT:
                    b = b + (tl.load(x + (u * 4 + j) * 16),)
                else:
                    b = b + (tl.load(x + (t * 8 + u * 4 + j) * 16 * COLS),)
            for r in tl.static_range(EACH):
                old = accs[t * EACH + r]
                if SCALED == 2:
                    y = tl.zeros(old.shape, tl.float32)
                else:
                    y = old
                for j in tl.static_range(4):
                    y = mma(a[r * 4 + j], b[j], y, meta[r], u * 4 + j, HALF, ASM)
                if SCALED == 2:
                    y = fold(old, y, scale[r], u, ASM)
                added = added + (y,)
        accs = added
    return accs


@triton.jit
def write(
    acc, SCALE, OUT, BIAS, m, n, stride_out, tile, t, split,
    SCALED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Parts added up; tile: of rows of the weight [ROWS, 1]. With splits the sums alone go out, [SPLITS, m, n]."""
    y = tl.sum(tl.reshape(acc, (ROWS, PARTS, 128)), 1)
    lane = tl.arange(0, 128)[None, :]
    column = tile * 16 + lane // 16 + lane // 2 % 2 * 8
    row = t * 8 + lane // 4 % 4 * 2 + lane % 2
    if SCALED == 1:
        y *= tl.load(SCALE + column, mask=column < n, other=0.0)
    if SPLITS == 1:
        y = finish(y, BIAS, column, ACT, HAS_BIAS, column < n)
        at = tl.cast(row, tl.int64) * stride_out + column
    else:
        at = (tl.cast(split, tl.int64) * m + row) * n + column
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=(column < n) & (row < m))


@triton.jit
def skinny(
    A, E, SCALE, X, OUT, BIAS, m, n, blocks, steps, stride_x, stride_out,
    BITS: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, DIRECT: tl.constexpr,
    V: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``V``: blocks of so many tiles of 16 rows have an x each, one after the other; 0: all have the same."""
    SIZE: tl.constexpr = ROWS * PARTS * 128
    i = tl.arange(0, SIZE)
    group, split = tl.program_id(0), tl.program_id(1)
    top = (group * ROWS + i // (128 * PARTS)) * EACH
    step = split * PARTS + i // 128 % PARTS
    words, meta, block, accs = (), (), (), ()
    for r in tl.static_range(EACH):
        # Programs at the edge repeat the last rows, and do not store them.
        block = block + (tl.where(step < steps, tl.minimum(top + r, blocks - 1) * steps + step, blocks * steps),)
        words = words + fetch(A, block[r], i, BITS // 2)
        meta = meta + (tl.load(E + block[r].to(tl.int64) * 128 + i % 128),)
    for _ in tl.static_range(TILES * EACH):
        accs = accs + (tl.zeros((SIZE,), tl.float32),)
    for _trip in tl.range(0, steps - split * PARTS, SPLITS * PARTS):
        here = tl.minimum(step, steps - 1)
        if DIRECT:
            x = X + tl.minimum(i // 16 % COLS, m - 1) * stride_x + here * 128 + i // 4 % 4 + i % 4 * 4
        else:
            if V > 0:
                here += tl.minimum(top, blocks - 1) // V * steps
            x = X + here.to(tl.int64) * (TILES * 128 * COLS) + i % (16 * COLS)
        step += SPLITS * PARTS
        ahead, meta_ahead, block_ahead, scale = (), (), (), ()
        for r in tl.static_range(EACH):
            if SCALED == 2:
                scale = scale + (tl.load(SCALE + block[r].to(tl.int64) * 32 + i // 16 % 8 * 4 + i % 4),)
            live = tl.minimum(top + r, blocks - 1) * steps + step
            block_ahead = block_ahead + (tl.where(step < steps, live, blocks * steps),)
            ahead = ahead + fetch(A, block_ahead[r], i, BITS // 2)
            meta_ahead = meta_ahead + (tl.load(E + block_ahead[r].to(tl.int64) * 128 + i % 128),)
        accs = multiply(accs, words, meta, scale, x, BITS, HALF, SCALED, TILES, COLS, EACH, DIRECT, ASM)
        words, meta, block = ahead, meta_ahead, block_ahead
    for t in tl.static_range(TILES):
        for r in tl.static_range(EACH):
            tile = (group * ROWS + tl.arange(0, ROWS)[:, None]) * EACH + r
            write(
                accs[t * EACH + r], SCALE, OUT, BIAS, m, n, stride_out, tile, t, split,
                SCALED, ROWS, PARTS, SPLITS, ACT, HAS_BIAS,
            )  # fmt: skip


NATIVE = isinstance(skinny, triton.JITFunction)  # the interpreter runs no assembly


class NM24:
    kind = "nm24"
    formats = ("nm:2:4+bf16", "nm:2:4+fp16", "nm:2:4+int8", "nm:2:4+int4g128")
    loops = LOOPS["nm24"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        return nm24_pack.pack(weight, format, source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return nm24_pack.unpack(packed)

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """``rows`` and ``parts``: warps along N and K. ``each``: row tiles that a warp holds, so that a load of x
        serves more. ``direct``: x is read in place.
        """
        made = [
            {"rows": rows, "each": each, "parts": parts, "splits": splits, "direct": direct}
            for rows in (1, 2, 4, 8)
            for each in ((1, 2) if m > 16 else (1,))
            for parts in (1, 2, 4, 8)
            for splits in (1, 2, 4, 8)
            for direct in ((1, 0) if m <= 4 else (0,))
            if rows * parts <= 8 and (splits * parts <= _blocks(packed)[1] or splits * parts == 1)
        ]
        stored = BITS[value_kind(packed.format.values)[0]] / 2 + 1
        return sorted(made, key=lambda config: cost(*_blocks(packed), stored, m, config))[:24]

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        if call.m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {call.m}")
        tiles, cols = tiling(call.m)
        pairs = _pairs(call.x) if config["direct"] and tiles == 1 else None
        before, x = ([], pairs) if pairs is not None else _arranged(call.x, _blocks(packed)[1], tiles, cols)
        return product(packed, call, {**config, "direct": pairs is not None}, before, x)


def tiling(m: int) -> tuple[int, int]:
    """Tiles of eight rows of x, and rows of a tile that are stored."""
    return triton.next_power_of_2(-(-m // 8)), min(triton.next_power_of_2(m), 8)


def product(
    packed: Packed, call: Call, config: Config, before: list[Launch], x: torch.Tensor, v: int = 0
) -> list[Launch]:
    """``packed``: of 2:4. ``x``: pairs of columns in register order, one after the other for blocks of 16 ``v`` rows,
    after launches ``before``; or in place (``direct``)."""
    m, n = call.m, packed.shape[0]
    values, meta, scale, like = packed.tensors
    kind, size = value_kind(packed.format.values)
    bits = BITS[kind]
    if (bits == 16 and call.x.dtype != like.dtype) or call.x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x of {call.x.dtype} with a weight of {packed.format}")
    blocks, steps = _blocks(packed)
    rows, each, parts, splits = config["rows"], config["each"], config["parts"], config["splits"]
    out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
    tiles, cols = tiling(m)
    args = {
        "A": values, "E": meta, "SCALE": scale, "X": x, "OUT": out,
        "BIAS": call.y if call.bias is None else call.bias,
        "m": m, "n": n, "blocks": blocks, "steps": steps, "stride_x": x.stride(0), "stride_out": out.stride(-2),
    }  # fmt: skip
    constants = {
        "BITS": bits, "HALF": call.x.dtype == torch.float16, "SCALED": 0 if bits == 16 else 2 if size else 1,
        "TILES": tiles, "COLS": cols, "ROWS": rows, "EACH": each, "PARTS": parts, "SPLITS": splits,
        "DIRECT": bool(config["direct"]), "V": v, "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        "ASM": NATIVE,
    }  # fmt: skip
    stored = bits / 2 + 1 + (0.25 if size else 0)
    counted = Loop("weight", rows * each * parts * ROWS * COLUMNS, BYTE * stored / 8)
    main = Launch(
        skinny, (triton.cdiv(blocks, rows * each), splits), args, constants,
        warps=rows * parts, loop=counted, expects={"mma.sp": "HMMA.SP"},
    )  # fmt: skip
    after = [] if splits == 1 else [reduction(out, call.y, call.bias, call.act)]
    return [*before, main, *after]


def cost(blocks: int, steps: int, stored: float, m: int, config: Config) -> float:
    """In powers of two of time: what flows from L2, idle warps, few or many warps, a launch and its sums.

    ``stored``: bits a weight.

    Each program reads all of its x through L2, which gives an SM some 1.3 times what memory does. 2000 warps that each
    wait for 4.5 KiB keep an H200's memory busy; blocks of integers are smaller, so it takes more of them.
    """
    splits = config["splits"]
    parallel, tall = config["parts"] * splits, config["rows"] * config["each"]
    columns = triton.next_power_of_2(m)
    flow = 1 + columns * 2 / (tall * stored * 2)
    warps = -(-blocks // tall) * config["rows"] * parallel
    idle = -(-steps // parallel) * parallel / steps
    few = log2(min(2000 * 9 / stored, 4000) / (warps * config["each"]))
    more = 0.7 + log2(1 + splits * m * 8 / (steps * COLUMNS * stored / 8)) if splits > 1 else 0.0  # written, then read
    return 2 * max(0.0, log2(flow / 1.3)) + 2 * log2(idle) + max(few, -few / 4) + more - 0.1 * config.get("direct", 1)


def _blocks(packed: Packed) -> tuple[int, int]:
    """Blocks along N and along K."""
    n, k = packed.shape
    return -(-n // ROWS), -(-k // COLUMNS)


def _pairs(x: torch.Tensor) -> torch.Tensor | None:
    """x [M, K] as pairs of columns [M, K / 2] int32, or None where that needs padding or is not aligned."""
    if x.shape[1] % COLUMNS or x.stride(0) % 2 or x.storage_offset() % 2:
        return None
    return x.view(torch.int32)


def _arranged(x: torch.Tensor, steps: int, tiles: int, cols: int) -> tuple[list[Launch], torch.Tensor]:
    """The launch that brings x into register order, and its output as int32 [steps, pairs]."""
    size = tiles * cols * COLUMNS
    out = x.new_empty((steps, size))
    args = {"X": x, "OUT": out, "m": x.shape[0], "k": x.shape[1], "stride_x": x.stride(0)}
    constants = {"COLS": cols, "TILES": tiles, "BLOCK": 1024 if size % 1024 == 0 else size}
    grid = (out.numel() // int(constants["BLOCK"]),)
    return [Launch(arrange, grid, args, constants)], out.view(torch.int32)


FAMILY = NM24()
