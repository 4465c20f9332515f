"""``index``: unstructured weights as blocks of eight values with a 16-bit base column and eight 8-bit offsets from it.

  group g of 16 rows, sorted by how many blocks they need      start[g]: first block, int32; order[g*16 + r]: its row
  block b                                                      base[b] u16, offset[b, 2] int32, value[b, 2] elements

Bytes a value: bf16 3.25, int8 2.25 (and one fp32 scale a row). Offset and value come as elements of four
(``positions.py``). No prefix sum: column = base + offset. Every row of a group has as many blocks as its fullest one,
so programs run in step, and rows of like counts stand together, so little is padded. Padding has value 0 at a column
that exists. A span of more than 255 columns within eight values ends the block early.

Loop ``gather`` (M <= 8): x is read through the cache at the columns that are kept. A value costs constant work whatever
the sparsity, where decoding to a dense tile costs a constant for each position; so it pays for few rows and for high
sparsity (MACKO, 2025, has the same trade with 4-bit deltas, and a scan).

Lane instructions a value on sm_90, bf16: 11.8 for M = 1 (seven are its own: byte, two of address, load, widen x and
value, FMA; the rest is addresses of a trip), and three more for each further row of x: load at a constant distance,
widen, FMA. An H200 waits for memory below 25 (3.25 bytes), that is up to M = 5; 8 rows cost 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.epilogue import reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.positions import (
    KINDS,
    LANE_INSTRUCTIONS,
    VALUE_BYTES,
    add_rows,
    checked,
    load_values,
    value,
    value_words,
    values_back,
    write_rows,
    zeros,
)
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from sparsec.grid import on_grid

OWN = "no two rows of the weight share columns of x, so each of its rows costs a load, a widening and a product"
ROWS = 16  # of a group
SIZE = 8  # values of a block: as bf16 one 16-byte load
SPAN = 255


@triton.jit
def gather(
    X, BASE, OFFSET, VALUE, SCALE, START, ORDER, OUT, BIAS, n, stride_out, plane,
    M: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
    VALUES: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(START + group)
    blocks = (tl.load(START + group + 1) - first) // ROWS
    i = tl.arange(0, ROWS * LANES * 2)
    half = i % (LANES * 2)
    at = (first + i // (LANES * 2) * blocks) * 2 + half
    sums = zeros(M, ROWS * LANES * 2)
    for step in tl.range(split * LANES, blocks, SPLITS * LANES):
        inside = half < (blocks - step) * 2
        here = at + step * 2
        base = tl.load(BASE + here // 2, mask=inside, other=0).to(tl.int32) & 0xFFFF
        offset = tl.load(OFFSET + here, mask=inside, other=0)
        words = load_values(VALUE, here, inside, plane, VALUES)
        place = X + base
        for j in tl.static_range(4):
            column = (offset >> (8 * j)) & 255
            sums = add_rows(sums, place + column, value(words, j, VALUES), M, STRIDE)
    column = tl.load(ORDER + group * ROWS + tl.arange(0, ROWS))
    write_rows(sums, OUT, BIAS, SCALE, column, n, stride_out, split, M, ROWS, SPLITS, VALUES, ACT, HAS_BIAS)


class Index:
    kind = "index"
    formats = ("index+bf16", "index+fp16", "index+fp32", "index+int8")
    loops = LOOPS["index"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        n, k = weight.shape
        if k > 2**16:
            raise PatternMismatch(format=str(format), detail=f"{k} columns need more than 16 bits")
        stored, scale = _stored(weight, format)
        base, offset, kept, counts = _blocks(stored)
        order, start, place = _grouped(counts)
        elements = value_words(_spread(kept, place))
        like = weight.new_empty(0)  # tells the dtype of a weight whose values are int8
        tensors = (_spread(base, place), _spread(offset, place).view(torch.int32), elements, start, order, scale, like)
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        base, offset, words, start, order, scale, like = packed.tensors
        n, k = packed.shape
        counts = ((start[1:] - start[:-1]) // ROWS).long()
        group = torch.repeat_interleave(torch.arange(len(counts), device=base.device), counts * ROWS)
        within = torch.arange(len(base), device=base.device) - start[group]
        row = order[group * ROWS + within // counts[group]].long()
        column = (base.long() & 0xFFFF)[:, None] + offset.view(torch.uint8).long()
        values = values_back(words, packed.format.values)
        kept = values != 0
        out = torch.zeros(n, k, dtype=values.dtype, device=base.device)
        out[row[:, None].expand_as(column)[kept], column[kept]] = values[kept]
        return (out.float() * scale[:, None]).to(like.dtype) if packed.format.values == "int8" else out

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Lanes and warps so that a thread holds one block, or two; splits so that 4000 warps are in flight."""
        blocks = packed.tensors[0].numel() / max(packed.shape[0], 1)
        lanes = [size for size in (8, 16, 32) if size == 8 or 2 * size <= blocks]
        groups = packed.tensors[3].numel() - 1
        made = [
            {"lanes": size, "splits": splits, "warps": max(1, ROWS * size // 32 // each)}
            for size in lanes
            for splits in (1, 2, 4)
            for each in (1, 2)
            if splits == 1 or blocks >= 2 * size * splits
        ]
        return sorted(made, key=lambda c: abs(groups * c["splits"] * c["warps"] - 4000))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        base, offset, words, start, order, scale, _ = packed.tensors
        m, n, splits, lanes = call.m, packed.shape[0], config["splits"], config["lanes"]
        if m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        args = {
            "X": call.x, "BASE": base, "OFFSET": offset, "VALUE": words, "SCALE": scale, "START": start,
            "ORDER": order, "OUT": out, "BIAS": call.y if call.bias is None else call.bias,
            "n": n, "stride_out": out.stride(-2), "plane": 2 * len(base),
        }  # fmt: skip
        constants = {
            "M": m, "STRIDE": call.x.stride(0) if m > 1 else 0, "ROWS": ROWS, "LANES": lanes, "SPLITS": splits,
            "VALUES": KINDS.index(packed.format.values), "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        budget = LANE_INSTRUCTIONS * (VALUE_BYTES[packed.format.values] + 1.25)
        counted = Loop("nonzero", ROWS * lanes * SIZE, budget, reason=OWN)
        main = Launch(gather, (start.numel() - 1, splits), args, constants, warps=config["warps"], loop=counted)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]


def _stored(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The values to keep [N, K] and, of int8, the scale of each row; raises PatternMismatch."""
    if format.values != "int8":
        return checked(weight, format.values), weight.new_empty(0, dtype=torch.float32)
    grid = on_grid(weight, 8)
    if grid is None:
        raise PatternMismatch(format=str(format), detail="some row is not int8 times one scale")
    return grid.q, grid.scale[:, 0].contiguous()


def _blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """base [N, B], offset and value [N, B, 8], and how many of the B blocks each row has; one block a row and step."""
    n, k = weight.shape
    kept = weight != 0
    per_row = kept.sum(1)
    first = per_row.cumsum(0) - per_row
    flat = kept.flatten().nonzero().flatten()
    columns = torch.cat([(flat % k).int(), flat.new_zeros(SIZE).int()])
    values = torch.cat([weight.flatten()[flat], weight.new_zeros(SIZE)])
    inner = torch.arange(SIZE, device=weight.device)
    done, counts = torch.zeros_like(per_row), torch.zeros_like(per_row)
    bases, offsets, kinds = [], [], []
    while bool((done < per_row).any()):
        at = ((first + done).clamp(max=len(flat))[:, None] + inner).clamp(max=len(flat) + SIZE - 1)
        column = columns[at]
        offset = column - column[:, :1]
        inside = (done[:, None] + inner < per_row[:, None]) & (offset <= SPAN) & (offset >= 0)
        bases.append(torch.where(inside[:, 0], column[:, 0], 0).to(torch.int16))
        offsets.append(torch.where(inside, offset, 0).to(torch.uint8))
        kinds.append(torch.where(inside, values[at], 0))
        counts += done < per_row
        done += inside.sum(1)
    if not bases:
        empty = weight.new_zeros((n, 0, SIZE))
        return empty[:, :, 0].to(torch.int16), empty.to(torch.uint8), empty, counts
    return torch.stack(bases, 1), torch.stack(offsets, 1), torch.stack(kinds, 1), counts


def _grouped(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows sorted by block count in groups of 16: order [groups * 16] (N for none), start [groups + 1], and for each
    block of the pack its (row, block) as a flat index into [N, B]; -1 for padding."""
    n, device = len(counts), counts.device
    order = torch.argsort(counts, descending=True, stable=True)
    padding = -n % ROWS
    order = torch.cat([order, order.new_full((padding,), n)])
    sizes = torch.cat([counts, counts.new_zeros(1)])[order].view(-1, ROWS)
    most = sizes.amax(1)
    start = torch.cat([most.new_zeros(1), (most * ROWS).cumsum(0)])
    group = torch.repeat_interleave(torch.arange(len(most), device=device), most * ROWS)
    within = torch.arange(len(group), device=device) - start[group]
    slot, block = within // most[group].clamp(min=1), within % most[group].clamp(min=1)
    width = int(most.max()) if n else 0
    place = torch.where(block < sizes[group, slot], order.view(-1, ROWS)[group, slot] * width + block, -1)
    return order.int(), start.int(), place


def _spread(of: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows of ``of`` [N, B, ...] as [N * B, ...] at ``place``; zeros where that is -1."""
    flat = torch.cat([of.flatten(0, 1), of.new_zeros((1, *of.shape[2:]))])
    return flat[place].contiguous()


FAMILY = Index()
