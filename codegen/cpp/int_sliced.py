"""The layout "slices" of integer kernels (see ``int_sliced.h``): each row has its own columns, four values at a time.

For the patterns ``index``, ``block`` and N:M that keeps little. Related: SELL-C-sigma (Kreutzer et al., 2014); sorting
is inside a slice, nothing is padded but each row's last four values, and x is looked up in registers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from sparsec.codegen.cpp import int_codes, int_steps, nm, packer
from sparsec.codegen.cpp.codes import BITS, SYMMETRIC_ZERO, Codes, codes_of
from sparsec.codegen.spec import Packed
from sparsec.formats import Format, Pattern, value_kind

Array = np.ndarray[Any, Any]
SEGMENT = 65536  # columns: kSegment of int_groups.h


def shape_of(pattern: Pattern) -> tuple[int, int]:
    """(share, run): rows that keep the same columns, and whether four neighbouring columns are kept together."""
    rows, cols = pattern.params if pattern.kind == "block" else (1, 1)
    return math.gcd(rows, packer.TILE), 4 if cols % 4 == 0 else 1


def slice_of(format: Format) -> int:
    """Columns of a chunk: what the registers hold of x, or where x is read from memory, what a byte can count."""
    whole = shape_of(format.pattern) == (packer.TILE, 4)
    return math.gcd(value_kind(format.values)[1], 512 if whole else packer.CHUNK)


def on_tiles(format: Format) -> bool:
    """As in ``int_steps``: where all rows of a tile take the same columns, of which whole tiles can be empty."""
    return shape_of(format.pattern) == (packer.TILE, 4) and slice_of(format) % 64 == 0


def constants(format: Format) -> dict[str, int | str]:
    share, run = shape_of(format.pattern)
    side = 16 if (share, run) == (packer.TILE, 4) else 1
    return {
        **{"kShare": share, "kRun": run, "kSlice": slice_of(format)},
        **{"kSide": side, "kXColumns": packer.CHUNK, "kXFlip": "kXOffset != 0", "kSums": 0},
    }


class Slots(NamedTuple):
    """Where everything goes. A slot is one step of one group of ``share`` rows.

    ``first``: [tiles, chunks, steps] the first slot of each step; ``rank``: [tiles, chunks, groups] of the rows' groups
    by how much they keep; ``quads``: [tiles, chunks, groups] steps that each needs.
    """

    first: Array
    rank: Array
    quads: Array

    @property
    def steps(self) -> Array:
        """[tiles, chunks] steps of the fullest group."""
        out: Array = self.quads.max(2, initial=0)
        return out

    @property
    def active(self) -> Array:
        """[tiles, chunks, most steps] groups that still have something."""
        steps = np.arange(max(int(self.quads.max(initial=0)), 1))
        out: Array = (self.quads[..., None] > steps).sum(2)
        return out


def _slots(counts: Array, per: int) -> Slots:
    """``counts``: [tiles, chunks, groups] columns or runs that are kept; ``per`` of them make a step."""
    order = np.argsort(-counts, axis=2, kind="stable")
    rank = np.argsort(order, axis=2, kind="stable")
    slots = Slots(np.zeros(0), rank, -(-counts // per))
    flat = slots.active.ravel()
    return slots._replace(first=(flat.cumsum() - flat).reshape(slots.active.shape))


def pack(weight: torch.Tensor, format: Format, source_key: str) -> Packed:
    """Raises PatternMismatch where the weight is on no such grid, or is not N:M."""
    pattern, (kind, group) = format.pattern, value_kind(format.values)
    if pattern.kind == "nm":
        nm.check(weight, pattern)
    codes, (n, k), (share, run) = codes_of(weight, format, source_key), weight.shape, shape_of(pattern)
    wide, bits = slice_of(format), BITS[kind]
    tiles, chunks = -(-n // packer.TILE), -(-k // wide)
    q = np.zeros((tiles * packer.TILE, chunks * wide), dtype=np.int16)
    q[:n, :k] = codes.q.numpy()
    groups = packer.TILE // share
    units = (q != 0).reshape(tiles * groups, share, chunks, wide // run, run).any((1, 4))
    counts = units.sum(2).reshape(tiles, groups, chunks).swapaxes(1, 2)
    slots = _slots(counts, 4 // run)
    row, chunk, unit = units.nonzero()
    number = units.cumsum(2)[row, chunk, unit] - 1
    tile, member = row // groups, row % groups
    step = number * run // 4
    slot = slots.first[tile, chunk, step] + slots.rank[tile, chunk, member]

    total = int(slots.active.sum())
    position = np.zeros((total, 4 // run), dtype=np.uint8)
    position[slot, number % (4 // run)] = unit
    value = np.zeros((total, share, 4), dtype=np.int16)
    at = number % (4 // run)
    for i in range(share):
        for j in range(run):
            value[slot, i, at * run + j] = q[row * share + i, chunk * wide + unit * run + j]
    zeros = _zeros(codes, slots, wide, SYMMETRIC_ZERO[kind])
    lane, where = _zero_of_slots(slots, zeros, share)
    value[lane] += where
    flat = int_codes.in_bytes(value.astype(np.uint8).ravel(), bits)

    scale, _, _ = int_steps.factors(codes, SYMMETRIC_ZERO[kind], tiles)
    start = _starts(slots, share * bits // 2, 4 // run)
    tensors = (
        *(int_codes.padded(flat), int_codes.padded(position.ravel()), int_codes.padded(_lanes(slots, share))),
        *(int_codes.padded(_heads(slots, share)), torch.from_numpy(start), scale, sums_of(q, group, tiles)),
        *(torch.from_numpy(zeros.ravel()), torch.tensor([int_steps.DTYPES.index(weight.dtype), _apart(zeros)])),
    )
    work = start[:, 0] + start[:, 1] + 8 * start[:, 2] + np.arange(tiles + 1) * (32 * chunks + 1)
    return Packed(format, 1, tensors, torch.from_numpy(work), (n, k), source_key, x="int8")


def _apart(zeros: Array) -> int:
    return packer.TILE if zeros.ndim == 3 else 0


def _zeros(codes: Codes, slots: Slots, wide: int, middle: int) -> Array:
    """uint8 [tiles, chunks, 16] in the order of the ranks, or [16] where all are the same."""
    if codes.symmetric:
        return codes.zero.numpy().ravel()[:1].repeat(packer.TILE)
    tiles, chunks, groups = slots.rank.shape
    share = packer.TILE // groups
    by_row = np.full((tiles * packer.TILE, codes.zero.shape[1]), middle, dtype=np.uint8)
    by_row[: len(codes.zero)] = codes.zero.numpy()
    group = np.arange(chunks) * wide // (codes.group or chunks * wide)
    rows = by_row[:, group].reshape(tiles, groups, share, chunks).transpose(0, 3, 1, 2)
    out = np.empty_like(rows)
    np.put_along_axis(out, slots.rank[..., None].repeat(share, 3), rows, 2)
    return out.reshape(tiles, chunks, packer.TILE)


def _zero_of_slots(slots: Slots, zeros: Array, share: int) -> tuple[Array, Array]:
    """(slots, the zeros of their rows [slots, share, 1])."""
    tile, chunk, rank, step = _members(slots)
    slot = slots.first[tile, chunk, step] + rank
    if zeros.ndim == 1:
        return slot, np.broadcast_to(zeros[:1, None, None], (len(slot), share, 1))
    lanes = zeros.reshape(*zeros.shape[:2], -1, share)
    return slot, lanes[tile, chunk, rank][..., None]


def _members(slots: Slots) -> tuple[Array, Array, Array, Array]:
    """(tile, chunk, rank, step) of every slot."""
    ranked = np.empty_like(slots.quads)
    np.put_along_axis(ranked, slots.rank, slots.quads, 2)
    tile, chunk, rank, step = (ranked[..., None] > np.arange(slots.active.shape[2])).nonzero()
    return tile, chunk, rank, step


def sums_of(q: Array, group: int, tiles: int) -> torch.Tensor:
    """Sums of q over each group of columns, or over each segment of a row: int32 [tile][group][16]."""
    size = group or SEGMENT
    columns = np.arange(0, q.shape[1], size)
    sums = np.add.reduceat(q.astype(np.int32), columns, axis=1)
    return torch.from_numpy(sums.reshape(tiles, packer.TILE, len(columns)).swapaxes(1, 2).astype(np.int32).ravel())


def _starts(slots: Slots, bytes_of_slot: int, positions_of_slot: int) -> Array:
    """int64 [tiles + 1, 3]: bytes of codes, positions and steps before each tile."""
    ends = np.stack([slots.active.sum((1, 2)), slots.active.sum((1, 2)), slots.steps.sum(1)], axis=1).cumsum(0)
    start = np.concatenate([np.zeros((1, 3), dtype=np.int64), ends])
    return start.astype(np.int64) * [bytes_of_slot, positions_of_slot, 1]


def _lanes(slots: Slots, share: int) -> Array:
    active = slots.active
    lanes: Array = active[active > 0] * share
    return lanes.astype(np.uint8)


def _heads(slots: Slots, share: int) -> Array:
    """[tiles, chunks, 9]: steps, and the rank of each of 16 rows in 4 bits."""
    rank = (slots.rank[..., None] * share + np.arange(share)).reshape(*slots.rank.shape[:2], packer.TILE)
    pairs = rank[..., 0::2] | rank[..., 1::2] << 4
    return np.concatenate([slots.steps[..., None], pairs], axis=2).astype(np.uint8).ravel()


def unpack(packed: Packed) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone."""
    if 0 in packed.shape:
        return torch.zeros(packed.shape, dtype=int_steps.DTYPES[int(packed.tensors[-1][0])])
    (n, k), (kind, group) = packed.shape, value_kind(packed.format.values)
    (share, run), wide, bits = shape_of(packed.format.pattern), slice_of(packed.format), BITS[kind]
    flat, position, lanes, heads, start, scale, _, zero, info = (t.numpy() for t in packed.tensors)
    tiles, chunks = -(-n // packer.TILE), -(-k // wide)
    head = heads[: tiles * chunks * 9].reshape(-1, 9)
    ranks = np.stack([head[:, 1:] & 15, head[:, 1:] >> 4], axis=2).reshape(-1, packer.TILE)
    row_of_rank = np.argsort(ranks, axis=1)
    slice_of_step = np.repeat(np.arange(len(head)), head[:, 0])
    count = lanes[: len(slice_of_step)].astype(np.int64)
    of_lane = np.repeat(slice_of_step, count)
    rank = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    row = of_lane // chunks * packer.TILE + row_of_rank[of_lane, rank]
    places = position[: int(start[-1, 1])].reshape(-1, 4 // run).astype(np.int64).repeat(share, 0)
    columns = places if run == 1 else places * 4 + np.arange(4)
    columns = columns + (of_lane % chunks * wide)[:, None]
    zeros = zero[:1] if not info[1] else zero.reshape(-1, packer.TILE)[of_lane, rank][:, None]
    value = int_codes.from_bytes(flat[: int(start[-1, 0])], bits).reshape(-1, 4) - zeros.astype(np.int16)
    q = np.zeros((tiles * packer.TILE, chunks * wide), dtype=np.int8)
    kept = value != 0
    q[np.broadcast_to(row[:, None], value.shape)[kept], columns[kept]] = value[kept]
    found = torch.from_numpy(q[:n, :k].copy())
    scales, _ = int_steps.from_factors(torch.from_numpy(scale), torch.zeros(packer.TILE), tiles, n)
    none = torch.zeros(n, 0)
    return Codes(found, scales, none.to(torch.uint8), none, group).weight(int_steps.DTYPES[int(info[0])])
