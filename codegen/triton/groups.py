"""``block:1x16+int4g16``: rows that keep whole groups of 16 columns, in 4 bits, with a scale for each group (GQSA).

  bundle b of 16 rows, those of like counts together      start[b]: first pair, int32; order[b*16 + r]: its row
  pair p of kept groups A and B     column[p]: A | B << 16, first column / 16; scale[p, 2]; words[p, 4] int32
  row n, group g of the weight      slot[n, g] int16: which of the row's kept groups, or -1; place[n]: first pair

Words are a chunk of ``values.py``: codes 0 to 3 are A, 4 to 7 are B, so a pair is one 16-byte load and x is read eight
neighbours at a time. All rows of a bundle have as many pairs as its fullest one. 6 bits a kept weight; loop ``mma``
alone reads slot and place, one more bit for each position of the matrix.

Loop ``gemv`` (M <= 8): a thread takes a pair; rows do not share x, so widening x and its excess cost two instructions
a weight beside the three of decoding and multiplying: 5.7 in all on sm_90, where an H200 has time for 5.85. For the
same reason each further row of x takes three and a half more.
Loop ``mma``: groups are looked up by position and decoded to a dense tile for tensor cores, 9 instructions a position
whatever the sparsity (decoding and scaling 3.7, the look-up 1.5, the tile's way through shared memory and its product
1.5, x and the loop), of 2.9 at three tenths of density; so it pays for many rows of x.

Zeng et al., GQSA, 2024 (arXiv 2412.17560), section 3.2: 1 x 16 groups in a block-sparse row layout.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from sparsec.codegen.triton.values import code, excess, neighbours, scaled
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from sparsec.grid import OnGrid

OWN = "rows of the weight share no x, so each row of x costs a load, a widening and a product for every weight"
EXPANDED = "every position of a tile costs a look-up, decoding and half a pack, kept or not: for many rows of x"
ROWS = 16  # of a bundle
SIZE = 16  # columns of a group


@triton.jit
def gemv(
    X, WORDS, COLUMN, SCALE, START, ORDER, OUT, BIAS, m, n, k, full, stride_x, stride_out,
    M: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, HALVES: tl.constexpr, BF16: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    bundle, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(START + bundle)
    pairs = (tl.load(START + bundle + 1) - first) // ROWS
    lane = tl.arange(0, LANES)[None, :, None]
    i = tl.arange(0, 4)[None, None, :]
    mine = first + tl.arange(0, ROWS)[:, None, None] * pairs
    acc = (tl.zeros((ROWS, LANES, 1), tl.float32),) * M
    for step in tl.range(split * LANES, pairs, SPLITS * LANES):
        # Lanes behind the last pair repeat it, with scale 0.
        inside = (lane < pairs - step) & (mine >= 0)
        pair = mine + tl.minimum(step + lane, pairs - 1)
        words = tl.load(WORDS + tl.cast(pair, tl.int64) * 4 + i)
        both = tl.load(COLUMN + pair)
        sums = acc
        for half in tl.static_range(2):
            scale = tl.load(SCALE + pair * 2 + half, mask=inside, other=0.0).to(tl.float32)
            near = ((both >> (16 * half)) & 0xFFFF) * 8 + i
            part = (tl.zeros((ROWS, LANES, 4), tl.float32),) * M
            for jj in tl.static_range(0, 4, 2):
                x = acc[:0]
                for s in tl.static_range(M):
                    x_row = X + tl.minimum(s, m - 1) * stride_x
                    x = x + neighbours(x_row, near + jj * 2, k, HALVES, EVEN, BF16)
                for h in tl.static_range(2):
                    q = code(words, full, half * 4 + jj + h, 4)
                    more = acc[:0]
                    for s in tl.static_range(M):
                        if EXACT:
                            more = more + (part[s] + (q - excess(jj + h, 4)) * x[2 * s + h],)
                        else:
                            more = more + (part[s] - x[2 * s + h] * excess(jj + h, 4) + q * x[2 * s + h],)
                    part = more
            more = acc[:0]
            for s in tl.static_range(M):
                more = more + (sums[s] + scale * tl.sum(part[s], 2, keep_dims=True),)
            sums = more
        acc = sums
    column = tl.load(ORDER + bundle * ROWS + tl.arange(0, ROWS))
    for s in tl.static_range(M):
        y = tl.sum(tl.sum(acc[s], 2), 1)
        mask = (column < n) & (column * 0 + s < m)
        if SPLITS == 1:
            y = finish(y, BIAS, column, ACT, HAS_BIAS, column < n)
            tl.store(OUT + tl.cast(s, tl.int64) * stride_out + column, y.to(OUT.dtype.element_ty), mask=mask)
        else:
            tl.store(OUT + tl.cast(split * m + s, tl.int64) * n + column, y, mask=mask)


@triton.jit
def mma(
    X, WORDS, SCALE, SLOT, PLACE, OUT, BIAS, m, n, k, groups, full, stride_x, stride_out,
    TN: tl.constexpr, TM: tl.constexpr, TG: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    column = tl.program_id(0) * TN + tl.arange(0, TN)
    row = tl.program_id(1) * TM + tl.arange(0, TM)
    within = tl.minimum(column, n - 1)[:, None]
    first = tl.load(PLACE + within)
    inner = tl.arange(0, TG * 4)
    i = inner % 4
    neighbour = tl.arange(0, TG * 8) // 8 * 16 + tl.arange(0, TG * 8) % 8
    acc = tl.zeros((TN, TM), tl.float32)
    for start in tl.range(split * TG, groups, SPLITS * TG):
        group = start + inner // 4
        at = SLOT + tl.cast(within, tl.int64) * groups + group[None, :]
        slot = tl.load(at, mask=(group < groups)[None, :], other=-1).to(tl.int32)
        kept, second = slot >= 0, (slot & 1) == 1
        pair = tl.cast(first + (slot >> 1), tl.int64)
        words = tl.load(WORDS + pair * 4 + i[None, :], mask=kept, other=0)
        scale = tl.load(SCALE + pair * 2 + (slot & 1), mask=kept, other=0.0).to(tl.float32)
        # Codes of B stand where those of A do once the halves of a word change places.
        words = tl.where(second, (words << 16) | ((words >> 16) & 0xFFFF), words)
        for jj in tl.static_range(0, 4, 2):
            place = start * 16 + neighbour + jj * 4
            even = scaled(code(words, full, jj, 4), scale, excess(jj, 4), EXACT).to(X.dtype.element_ty)
            odd = scaled(code(words, full, jj + 1, 4), scale, excess(jj + 1, 4), EXACT).to(X.dtype.element_ty)
            x = load_x(X, place, row, m, k, stride_x, EVEN)
            acc = dot(tl.reshape(tl.join(even, odd), (TN, TG * 8)), x, acc)
    write_tile(acc, OUT, BIAS, column, row, m, n, stride_out, split, SPLITS == 1, ACT, HAS_BIAS)


class Groups:
    kind = "groups"
    formats = ("block:1x16+int4g16",)
    loops = LOOPS["groups"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        if format.pattern.params != (1, SIZE) or format.values != "int4g16":
            raise PatternMismatch(format=str(format), detail="blocks of one row are 1x16 with int4g16")
        n, k = weight.shape
        if k > 2**15 * SIZE:
            raise PatternMismatch(format=str(format), detail=f"{k} columns are more than 32768 groups")
        found = values.encode(weight, format)
        codes = torch.nn.functional.pad(found.codes, (0, -k % SIZE), value=values.ZERO["int4"]).view(n, -1, SIZE)
        kept = (codes != values.ZERO["int4"]).any(2)
        counts = (kept.sum(1) + 1) // 2
        order, start, first = _bundled(counts)
        slot = torch.where(kept, kept.cumsum(1) - 1, -1).to(torch.int16)
        row, group = kept.nonzero().unbind(1)
        at = first[row] * 2 + slot[row, group]
        total = int(start[-1]) * 2
        stored = codes.new_full((total, SIZE), values.ZERO["int4"])
        stored[at] = codes[row, group]
        column = torch.zeros(total, dtype=torch.int32, device=weight.device)
        column[at] = group.int()
        scale = found.scale.new_zeros(total)
        scale[at] = found.scale[row, group]
        words = values.to_words(stored.view(-1, 2 * SIZE), "int4").flatten(0, 1)
        both = column.view(-1, 2)
        column = both[:, 0] | both[:, 1] << 16
        tensors = (words, column, scale.view(-1, 2), start, order, slot, first.int(), weight.new_zeros(0))
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        words, column, scale, start, order, _, _, like = packed.tensors
        n, k = packed.shape
        counts = ((start[1:] - start[:-1]) // ROWS).repeat_interleave(ROWS)
        row = torch.repeat_interleave(order.long(), counts.long() * 2)
        group = torch.stack([column & 0xFFFF, (column >> 16) & 0xFFFF], 1).flatten().long()
        q = (values.from_words(words[:, None], "int4").view(-1, SIZE) - values.ZERO["int4"]).to(torch.int8)
        part = OnGrid(q, scale.float().view(-1, 1), 0).weight(like.dtype)
        out = like.new_zeros((n, -(-k // SIZE), SIZE))
        kept = (q != 0).any(1)
        out[row[kept], group[kept]] = part[kept]
        return out.flatten(1)[:, :k].contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        n, k = packed.shape
        if loop == "mma":
            groups = -(-k // SIZE)
            made = [
                {"tn": tn, "tm": tm, "tg": tg, "splits": splits, "warps": 4}
                for tn in (64, 32)
                for tm in (16, 32, 64, 128)
                if tm == max(16, min(tm, 2 * m)) and tm >= min(m // 4, 64)
                for tg in (8, 4)
                for splits in (1, 2, 4)
                if splits == 1 or tg * splits <= groups
            ]
            return sorted(made, key=lambda c: _flights(-(-n // c["tn"]) * -(-m // c["tm"]), c))
        pairs = len(packed.tensors[1]) / max(n, 1)
        made = [
            {"lanes": lanes, "splits": splits, "warps": max(1, ROWS * lanes // 32 // each)}
            for lanes in (2, 4, 8, 16, 32)
            if lanes == 2 or lanes <= pairs
            for splits in (1, 2, 4)
            if splits == 1 or lanes * splits <= pairs
            for each in (1, 2)
        ]
        return sorted(made, key=lambda c: _flights(-(-n // ROWS), c))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        words, column, scale, start, order, slot, first, _ = packed.tensors
        (n, k), m, splits = packed.shape, call.m, config["splits"]
        if self.loops[loop] and m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        args = {
            "X": call.x, "WORDS": words, "SCALE": scale, "OUT": out, "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "n": n, "k": k, "full": 15, "stride_x": call.x.stride(0), "stride_out": out.stride(-2),
        }  # fmt: skip
        constants = {
            "SPLITS": splits, "EVEN": k % SIZE == 0, "EXACT": call.x.dtype == torch.float32,
            "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        if loop == "gemv":
            x = values.halves(call.x)
            args |= {"X": x, "stride_x": x.stride(0), "COLUMN": column, "START": start, "ORDER": order}
            constants |= {"HALVES": x is not call.x, "BF16": call.x.dtype == torch.bfloat16}
            constants |= {"M": m, "ROWS": ROWS, "LANES": config["lanes"]}
            counted = Loop("nonzero", ROWS * config["lanes"] * 2 * SIZE, 7.8 * 6 / 8, reason=OWN)
            main = Launch(gemv, (len(start) - 1, splits), args, constants, warps=config["warps"], loop=counted)
        else:
            args |= {"SLOT": slot, "PLACE": first, "groups": slot.shape[1]}
            constants |= {"TN": config["tn"], "TM": config["tm"], "TG": config["tg"]}
            constants |= {"EVEN": k % (SIZE * config["tg"]) == 0}
            grid = (triton.cdiv(n, config["tn"]), triton.cdiv(m, config["tm"]), splits)
            count, stored = config["tn"] * config["tg"] * SIZE, packed.bytes / max(n * k, 1)
            counted = Loop("weight", count, 7.8 * stored, grid[1], EXPANDED)
            main = Launch(mma, grid, args, constants, warps=config["warps"], loop=counted)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]


def _flights(programs: int, config: Config) -> float:
    """How far a configuration is from 1500 warps in flight; more than that costs little."""
    flights = programs * config["splits"] * config["warps"] / 1500
    return 1 - flights if flights < 1 else (flights - 1) / 8


def _bundled(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows sorted by pairs in bundles of 16: order [bundles * 16] (N for none), start [bundles + 1], and the first pair
    of each row [N]."""
    n = len(counts)
    order = torch.argsort(counts, descending=True, stable=True)
    order = torch.cat([order, order.new_full((-n % ROWS,), n)])
    most = torch.cat([counts, counts.new_zeros(1)])[order].view(-1, ROWS).amax(1)
    start = torch.cat([most.new_zeros(1), (most * ROWS).cumsum(0)])
    inner = torch.arange(ROWS, device=counts.device)
    first = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
    first[order] = (start[:-1, None] + inner * most[:, None]).flatten()
    return order.int(), start.int(), first[:n]


FAMILY = Groups()
