"""``index``: unstructured weights as blocks of eight values with a 16-bit base column and eight 8-bit offsets from it.

  group g of 16 rows, sorted by how many blocks they need      start[g]: first block, int32; order[g*16 + r]: its row
  block b                                                      base[b] u16, offset[b, 8] u8, value[b, 8]

3.25 bytes a bf16 value, and no prefix sum: column = base + offset. Every row of a group has as many blocks as its
fullest one, so programs run in step, and rows of like counts stand together, so little is padded. Padding has value
0 at a column that exists. A span of more than 255 columns within eight values ends the block early.

Loop ``gather`` (M <= 8): x is read through the cache at the columns that are kept. A value costs some eight
instructions whatever the sparsity, where decoding to a dense tile costs a constant for each position; so it pays for
few rows and for high sparsity (MACKO, 2025, has the same trade with 4-bit deltas, and a scan).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.epilogue import finish, reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

ROWS = 16  # of a group
SIZE = 8  # values of a block: as bf16 one 16-byte load
SPAN = 255


@triton.jit
def gather(
    X, BASE, OFFSET, VALUE, START, ORDER, OUT, BIAS, m, n, stride_x, stride_out,
    M: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(START + group)
    blocks = (tl.load(START + group + 1) - first) // ROWS
    lane = tl.arange(0, LANES)[None, :]
    place = first + tl.arange(0, ROWS)[:, None] * blocks + lane
    inner = tl.arange(0, 8)[None, None, :]
    # Rows beyond m repeat the last one and are not stored: cheaper than a mask on every read of x.
    x_row = X + tl.minimum(tl.arange(0, M), m - 1)[:, None, None, None] * stride_x
    acc = tl.zeros((M, ROWS, LANES, 8), tl.float32)
    for step in tl.range(split * LANES, blocks, SPLITS * LANES):
        inside = (lane < blocks - step) & (place >= 0)
        base = tl.load(BASE + place + step, mask=inside, other=0).to(tl.int32) & 0xFFFF
        at = ((place + step) * 8)[:, :, None] + inner
        offset = tl.load(OFFSET + at, mask=inside[:, :, None], other=0).to(tl.int32)
        value = tl.load(VALUE + at, mask=inside[:, :, None], other=0.0).to(tl.float32)
        column = base[:, :, None] + offset
        x = tl.load(x_row + column[None, :, :, :]).to(tl.float32)
        acc += value[None, :, :, :] * x
    y = tl.sum(tl.sum(acc, 3), 2)
    column = tl.load(ORDER + group * ROWS + tl.arange(0, ROWS))[None, :]
    row = tl.arange(0, M)[:, None]
    mask = (column < n) & (row < m)
    if SPLITS == 1:
        y = finish(y, BIAS, column, ACT, HAS_BIAS, column < n)
        tl.store(OUT + row * stride_out + column, y.to(OUT.dtype.element_ty), mask=mask)
    else:
        tl.store(OUT + (split * m + row) * n + column, y, mask=mask)


class Index:
    kind = "index"
    formats = ("index+bf16", "index+fp16", "index+fp32")
    loops = LOOPS["index"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        n, k = weight.shape
        if k > 2**16:
            raise PatternMismatch(format=str(format), detail=f"{k} columns need more than 16 bits")
        base, offset, value, counts = _blocks(weight)
        order, start, place = _grouped(counts)
        tensors = (_spread(base, place), _spread(offset, place), _spread(value, place), start, order)
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        base, offset, value, start, order = packed.tensors
        n, k = packed.shape
        counts = ((start[1:] - start[:-1]) // ROWS).long()
        group = torch.repeat_interleave(torch.arange(len(counts), device=value.device), counts * ROWS)
        within = torch.arange(len(base), device=value.device) - start[group]
        row = order[group * ROWS + within // counts[group]].long()
        column = (base.long() & 0xFFFF)[:, None] + offset.long()
        kept = value != 0
        out = torch.zeros(n, k, dtype=value.dtype, device=value.device)
        out[row[:, None].expand_as(column)[kept], column[kept]] = value[kept]
        return out

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Lanes and warps so that a thread holds one block, or two; splits so that 1500 warps are in flight."""
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
        return sorted(made, key=lambda c: abs(groups * c["splits"] * c["warps"] - 1500))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        base, offset, value, start, order = packed.tensors
        m, n, splits, lanes = call.m, packed.shape[0], config["splits"], config["lanes"]
        if m > self.loops[loop]:
            raise ValueError(f"{loop} takes at most {self.loops[loop]} rows, not {m}")
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        args = {
            "X": call.x, "BASE": base, "OFFSET": offset, "VALUE": value, "START": start, "ORDER": order, "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias,
            "m": m, "n": n, "stride_x": call.x.stride(0), "stride_out": out.stride(-2),
        }  # fmt: skip
        constants = {
            "M": triton.next_power_of_2(m), "ROWS": ROWS, "LANES": lanes, "SPLITS": splits,
            "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None,
        }  # fmt: skip
        counted = Loop("nonzero", ROWS * lanes * SIZE, 12.0 * m)
        main = Launch(gather, (start.numel() - 1, splits), args, constants, warps=config["warps"], loop=counted)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]


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
