"""``dense`` with quantised values: int8 and int4 with a scale a row or group, ternary, and 16 levels a row.

  words[N, chunks, 4] int32     codes of a chunk of columns as ``values.py`` says, 16 bytes; K is filled up with zero
  scale[N, groups]              fp32, or the weight's dtype where that holds it exactly; codebooks: levels[N, 16]
  like[0]                       the weight's dtype; then what ``sidecar.py`` has, where there are outliers

Loop ``gemv`` (M <= 8): memory-bound. A thread takes one chunk of each of ROWS rows, so that x is read, widened and
summed once for all of them; nothing moves between threads until the end. At M = 1 on sm_90 a weight of int4g128 takes
3.5 lane instructions, of int8 3.8, both below what an H200 has time for (4.0 and 7.8); ternary takes 3.0 of 2.0 (a
multiplication and an "and or" are two already), a codebook 7.2 of 4.0 (its level is loaded, and needs an address), and
each further row of x two to three. ``fragment`` has the same weights in register order and takes 1.5 to 3.3 for any of
up to 32 rows, so this loop is for x in fp32 and for outliers, and where tuning finds it faster.
Loop ``mma``: codes become q * scale in the dtype of x, the weight itself, and go through tensor cores, 5.1 to 8.5
instructions a weight for any M that a tile holds: decoded tiles pass through shared memory. For more than 32 rows.

The product uses q * scale before it is rounded to the weight's dtype ("gemv"), or after ("mma").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS, values
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.dot import dot
from sparsec.codegen.triton.epilogue import finish, reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.positions import load_x, write_tile
from sparsec.codegen.triton.sidecar import partial_sums, row_sums, unpacked
from sparsec.codegen.triton.values import BITS, Codes, code, excess, level, neighbours, scaled
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind


@triton.jit
def products(
    X, SCALE, words, sums, over, pair, first, m, n, k, full, stride_x,
    M: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, HALVES: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """``sums`` (of each row of the weight and of x) and ``over`` (of each row of x) with one chunk a lane added.

    ``words``: a tensor for each of ROWS rows from ``first`` on. ``pair``: half the column of code 0 of each word.
    """
    for j in tl.static_range(0, 32 // BITS, 2):
        x = over[:0]
        for s in tl.static_range(M):
            x_row = X + tl.minimum(s, m - 1) * stride_x
            x = x + neighbours(x_row, pair + j * 2, k, HALVES, EVEN, BF16)
        for h in tl.static_range(2):
            more = over[:0]
            for r in tl.static_range(ROWS):
                if TABLE:
                    q = level(words[r], SCALE + tl.minimum(first + r, n - 1) * 16, j + h)
                else:
                    q = code(words[r], full, j + h, BITS)
                    if EXACT:
                        q -= excess(j + h, BITS)
                for s in tl.static_range(M):
                    more = more + (sums[r * M + s] + q * x[2 * s + h],)
            sums = more
            if not TABLE and not EXACT:
                summed = over[:0]
                for s in tl.static_range(M):
                    summed = summed + (over[s] + x[2 * s + h] * excess(j + h, BITS),)
                over = summed
    return sums, over


@triton.jit
def gemv(
    X, WORDS, SCALE, OUT, BIAS, RAW, BEGIN, COLUMN, VALUE,
    m, n, k, chunks, groups, full, stride_x, stride_raw, stride_out,
    M: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    HALVES: tl.constexpr, BF16: tl.constexpr, OUTLIERS: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 128 // BITS
    first, split = tl.program_id(0) * ROWS, tl.program_id(1)
    lane, i = tl.arange(0, T)[:, None], tl.arange(0, 4)[None, :]
    KEPT: tl.constexpr = 4 if GROUP == 0 else 1  # sums that a thread keeps of a row: of each word, or of a chunk
    acc = (tl.zeros((T, KEPT), tl.float32),) * (M * ROWS)
    over = (tl.zeros((T, 4), tl.float32),) * M
    for start in tl.range(split * T, chunks, SPLITS * T):
        chunk = start + lane
        # Chunks behind the last repeat it, with zeros for x: cheaper than masks.
        place = chunk if EVEN else tl.minimum(chunk, chunks - 1)
        words = acc[:0]
        for r in tl.static_range(ROWS):
            at = tl.cast(tl.minimum(first + r, n - 1), tl.int64) * chunks
            words = words + (tl.load(WORDS + at * 4 + place * 4 + i),)
        if GROUP == 0:
            sums = acc
        else:
            sums = (tl.zeros((T, 4), tl.float32),) * (M * ROWS)
            over = (tl.zeros((T, 4), tl.float32),) * M
        sums, over = products(
            X, SCALE, words, sums, over, chunk * (WIDTH // 2) + i, first, m, n, k, full, stride_x,
            M, ROWS, BITS, TABLE, EVEN, EXACT, HALVES, BF16,
        )  # fmt: skip
        if GROUP == 0:
            acc = sums
        else:
            more = acc[:0]
            off = acc[:0]
            for s in tl.static_range(M):
                off = off + (tl.sum(over[s], 1, keep_dims=True),)
            for r in tl.static_range(ROWS):
                row = tl.cast(tl.minimum(first + r, n - 1), tl.int64) * groups
                scale = tl.load(SCALE + row + place * WIDTH // GROUP).to(tl.float32)
                for s in tl.static_range(M):
                    more = more + (acc[r * M + s] + scale * (tl.sum(sums[r * M + s], 1, keep_dims=True) - off[s]),)
            acc = more
    for r in tl.static_range(ROWS):
        if OUTLIERS:
            row = tl.minimum(first + r, n - 1)
            apart = row_sums(RAW, BEGIN, COLUMN, VALUE, row, m, stride_raw, lane, M, T, SPLITS, split)
        for s in tl.static_range(M):
            y = acc[r * M + s]
            if GROUP == 0:
                y -= over[s]
            y = tl.sum(tl.sum(y, 1), 0)
            if GROUP == 0 and not TABLE:
                y *= tl.load(SCALE + tl.minimum(first + r, n - 1)).to(tl.float32)
            if OUTLIERS:
                y += tl.sum(tl.sum(apart[s], 1), 0)
            column = first + r
            if SPLITS == 1:
                y = finish(y, BIAS, column, ACT, HAS_BIAS, column < n)
                at = OUT + tl.cast(s, tl.int64) * stride_out + column
            else:
                at = OUT + tl.cast(split * m + s, tl.int64) * n + column
            if column < n and s < m:
                tl.store(at, y.to(OUT.dtype.element_ty))


@triton.jit
def decoded(
    words, SCALE, row, scale, full,
    J: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, GROUP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Code ``J`` of words of the weight in fp32: q, or q * scale where a row has several."""
    if TABLE:
        return level(words, SCALE + row * 16, J)
    elif GROUP == 0:
        return code(words, full, J, BITS) - excess(J, BITS)
    else:
        return scaled(code(words, full, J, BITS), scale, excess(J, BITS), EXACT)


@triton.jit
def mma(
    X, WORDS, SCALE, OUT, BIAS, m, n, k, chunks, groups, full, stride_x, stride_out,
    TN: tl.constexpr, TM: tl.constexpr, TW: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 128 // BITS
    split = tl.program_id(2)
    column = tl.program_id(0) * TN + tl.arange(0, TN)
    row = tl.program_id(1) * TM + tl.arange(0, TM)
    inner = tl.arange(0, TW)
    within = tl.cast(tl.minimum(column, n - 1), tl.int64)[:, None]
    acc = tl.zeros((TN, TM), tl.float32)
    for start in tl.range(split * TW, chunks * 4, SPLITS * TW):
        inside = (inner < chunks * 4 - start)[None, :]
        words = tl.load(WORDS + (within * chunks * 4 + start) + inner[None, :], mask=inside, other=0)
        neighbour = start // 4 * WIDTH + tl.arange(0, 2 * TW) // 8 * WIDTH + tl.arange(0, 2 * TW) % 8
        scale = 1.0
        if GROUP >= TW // 4 * WIDTH:
            scale = tl.load(SCALE + within * groups + start // 4 * WIDTH // GROUP).to(tl.float32)
        elif GROUP > 0:
            scale = tl.load(
                SCALE + within * groups + (start + inner)[None, :] // 4 * WIDTH // GROUP, mask=inside, other=0.0
            ).to(tl.float32)
        for j in tl.static_range(0, 32 // BITS, 2):
            place = neighbour + j * 4
            even = decoded(words, SCALE, within, scale, full, j, BITS, TABLE, GROUP, EXACT).to(X.dtype.element_ty)
            odd = decoded(words, SCALE, within, scale, full, j + 1, BITS, TABLE, GROUP, EXACT).to(X.dtype.element_ty)
            w = tl.reshape(tl.join(even, odd), (TN, 2 * TW))
            acc = dot(w, load_x(X, place, row, m, k, stride_x, EVEN), acc)
    if GROUP == 0 and not TABLE:
        acc *= tl.load(SCALE + within).to(tl.float32)
    write_tile(acc, OUT, BIAS, column, row, m, n, stride_out, split, WHOLE, ACT, HAS_BIAS)


class Dense:
    kind = "dense"
    formats: Sequence[str] = tuple(
        f"dense+{kind}"
        for kind in ("int4g128", "int4g64", "int4g32", "int4", "int8", "int8g128", "ternary", "codebook")
    )
    loops = LOOPS["dense"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        kind, group = value_kind(format.values)
        if kind not in BITS:
            raise PatternMismatch(format=str(format), detail="a dense weight that is not quantised needs no pack")
        if group % values.width(kind):
            raise PatternMismatch(format=str(format), detail=f"groups are multiples of {values.width(kind)} columns")
        n, k = weight.shape
        found = values.encode(weight, format)
        codes = torch.nn.functional.pad(found.codes, (0, -k % values.width(kind)), value=values.ZERO[kind])
        tensors = (values.to_words(codes, kind), found.scale.contiguous(), weight.new_zeros(0))
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        words, scale, like = packed.tensors[:3]
        kind, group = value_kind(packed.format.values)
        codes = values.from_words(words, kind)[:, : packed.shape[1]]
        main = values.decode(Codes(codes, scale, group), kind, like.dtype)
        return main + unpacked(packed.tensors[3:], main) if packed.tensors[3:] else main

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        words = packed.tensors[0]
        n, chunks = words.shape[0], words.shape[1]
        if loop == "gemv":
            most = max(
                1, 8 // m
            )  # sums of a thread: 4 for each row of each of the two; 16 take 230 registers, or spill
            made = [
                {"rows": rows, "warps": warps, "splits": splits}
                for rows in (4, 2, 8, 1)
                if rows <= most
                for warps in (1, 2, 4)
                if warps == 1 or 32 * warps <= chunks
                for splits in (1, 2, 4)
                if splits == 1 or 32 * warps * splits <= chunks
            ]
            first = min(4, most)
            return sorted(made, key=lambda c: _flights(n // c["rows"], c) + (c["rows"] != first))
        made = [
            {"tn": tn, "tm": tm, "tw": tw, "splits": splits, "warps": 4 if tn * tm <= 64 * 64 else 8}
            for tn in (64, 128)
            for tm in (16, 32, 64, 128)
            if tm == max(16, min(tm, 2 * m)) and tm >= min(m // 4, 64)
            for tw in (16, 32)
            for splits in (1, 2, 4, 8)
            if splits == 1 or tw * splits <= chunks
        ]
        return sorted(made, key=lambda c: _flights(-(-n // c["tn"]) * -(-m // c["tm"]), c))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        n, m, splits = packed.shape[0], call.m, config["splits"]
        if self.loops[loop] and m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        apart = packed.tensors[3:] if loop == "mma" else ()  # outliers that need a launch of their own
        parts = splits + bool(apart)
        out = call.y if parts == 1 else call.x.new_empty((parts, m, n), dtype=torch.float32)
        main = (_gemv if loop == "gemv" else _mma)(packed, call, config, out)
        if parts == 1:
            return [main]
        more = [partial_sums(apart, call, out[splits])] if apart else []
        return [main, *more, reduction(out, call.y, call.bias, call.act)]


def _shared(packed: Packed, call: Call, out: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of both kernels."""
    words, scale = packed.tensors[:2]
    kind, group = value_kind(packed.format.values)
    (n, k), m = packed.shape, call.m
    args = {
        "X": call.x, "WORDS": words, "SCALE": scale, "OUT": out, "BIAS": call.y if call.bias is None else call.bias,
        "m": m, "n": n, "k": k, "chunks": words.shape[1], "groups": scale.shape[1], "full": 2 ** BITS[kind] - 1,
        "stride_x": call.x.stride(0), "stride_out": out.stride(-2),
    }  # fmt: skip
    constants = {
        "BITS": BITS[kind], "TABLE": kind == "codebook", "GROUP": group, "EXACT": call.x.dtype == torch.float32,
        "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
    }  # fmt: skip
    return args, constants


FEW = "for x in fp32 and for outliers: each row of x costs two or three instructions, and `skinny` takes 2 in all"
MANY = "for more than 32 rows of x, whose products take as long as the weight; `skinny` takes fewer rows"


def _counted(packed: Packed, count: int, reason: str, repeats: int = 1) -> Loop:
    """A trip that handles ``count`` weights; an H200 has time for 7.8 lane instructions a byte."""
    n, k = packed.shape
    main = sum(t.numel() * t.element_size() for t in packed.tensors[:2])
    return Loop("weight", count, 7.8 * main / max(n * k, 1), repeats, reason)


def _gemv(packed: Packed, call: Call, config: Config, out: torch.Tensor) -> Launch:
    args, constants = _shared(packed, call, out)
    wide = values.width(value_kind(packed.format.values)[0])
    rows, lanes = config["rows"], 32 * config["warps"]
    x, stream = values.halves(call.x), packed.tensors[3:] or (call.x,) * 3
    args |= {"X": x, "stride_x": x.stride(0), "RAW": call.x, "stride_raw": call.x.stride(0)}
    args |= dict(zip(("BEGIN", "COLUMN", "VALUE"), stream, strict=True))
    constants |= {
        "M": call.m, "ROWS": rows, "T": lanes, "SPLITS": config["splits"],
        "EVEN": packed.shape[1] % (lanes * wide) == 0, "HALVES": x is not call.x,
        "BF16": call.x.dtype == torch.bfloat16, "OUTLIERS": len(packed.tensors) > 3,
    }  # fmt: skip
    counted = _counted(packed, rows * lanes * wide, FEW)
    grid = (triton.cdiv(packed.shape[0], rows), config["splits"])
    return Launch(gemv, grid, args, constants, warps=config["warps"], loop=counted)


def _mma(packed: Packed, call: Call, config: Config, out: torch.Tensor) -> Launch:
    args, constants = _shared(packed, call, out)
    (n, k), wide = packed.shape, values.width(value_kind(packed.format.values)[0])
    tn, tm, tw, splits = config["tn"], config["tm"], config["tw"], config["splits"]
    constants |= {
        "TN": tn,
        "TM": tm,
        "TW": tw,
        "SPLITS": splits,
        "WHOLE": out is call.y,
        "EVEN": k % (tw // 4 * wide) == 0,
    }
    grid = (triton.cdiv(n, tn), triton.cdiv(call.m, tm), splits)
    counted = _counted(packed, tn * tw // 4 * wide, MANY, grid[1])
    return Launch(mma, grid, args, constants, warps=config["warps"], loop=counted)


def _flights(programs: int, config: Config) -> float:
    """How far a configuration is from 1500 warps in flight; more than that costs little."""
    flights = programs * config["splits"] * config["warps"] / 1500
    return 1 - flights if flights < 1 else (flights - 1) / 8


FAMILY = Dense()
