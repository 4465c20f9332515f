"""The layout "sliced" (see ``sliced.h``), used by the patterns ``index``, ``block`` and high-sparsity ``nm``.

A slice is 16 rows by 128 columns; its rows are sorted by how much they keep, and the s-th values of all of them are
neighbours, each with the column as one byte. Related: SELL-C-sigma (Kreutzer et al., 2014); here sorting is inside a
slice, nothing is padded, and x is looked up in registers.
"""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern


def pack(weight: torch.Tensor, pattern: Pattern, values: str, source_key: str, share: int = 1) -> Packed:
    """``share`` neighbouring rows (1, 2, 4, 8 or 16) keep the same columns."""
    weight = packer.checked(weight, values)
    tensors = packer.pack_sliced(weight, share)
    start = tensors[-1]
    chunks = -(-weight.shape[1] // packer.CHUNK)
    work = start[:, 0] + 8 * start[:, 1] + torch.arange(start.shape[0]) * (32 * chunks + 1)
    n, k = weight.shape
    return Packed(Format(pattern, values), 1, tensors, work, (n, k), source_key)


def unpack(packed: Packed, share: int = 1) -> torch.Tensor:
    values, positions, lanes, heads, start = packed.tensors
    n, k = packed.shape
    per = 4 // values.element_size()
    chunks, tiles = -(-k // packer.CHUNK), -(-n // packer.TILE)
    slices = tiles * chunks
    head = heads[: 9 * slices].view(slices, 9)
    ranks = torch.stack([head[:, 1:] & 15, head[:, 1:] >> 4], dim=2).view(slices, 16).long()
    row_of = torch.empty_like(ranks).scatter_(1, ranks, torch.arange(16).expand(slices, 16))
    row_of += (torch.arange(slices) // max(chunks, 1) * packer.TILE)[:, None]
    base = (row_of * (chunks * packer.CHUNK) + (torch.arange(slices) % max(chunks, 1) * packer.CHUNK)[:, None]).view(-1)

    steps = lanes[: int(start[-1, 1])].long()
    slice_of = torch.repeat_interleave(torch.arange(slices), head[:, 0].long())
    first = steps.cumsum(0) - steps
    entry = torch.repeat_interleave(slice_of * 16 - first, steps) + torch.arange(int(steps.sum()))
    where = base[entry][:, None] + _columns(positions, entry.numel(), per, share)
    bits = values.view(torch.int32 if per == 1 else torch.int16)[: entry.numel() * per].view(-1, per)
    wide = torch.zeros(tiles * packer.TILE * chunks * packer.CHUNK, dtype=bits.dtype)
    kept = bits != 0  # the second half of the last pair of a row may be empty
    wide[where[kept]] = bits[kept]
    rows = wide.view(tiles * packer.TILE, -1) if wide.numel() else wide.view(tiles * packer.TILE, 0)
    return rows[:n, :k].contiguous().view(values.dtype)


def _columns(positions: torch.Tensor, entries: int, per: int, share: int) -> torch.Tensor:
    """[entries, per]: column in the slice, repeated for rows that share it."""
    own = positions[: entries * per // share].long().view(-1, 1, per)
    return own.expand(-1, share, per).reshape(-1, per)


def text(spec: KernelSpec, share: int = 1) -> str:
    return unit(spec, "sliced", {"kShare": share})
