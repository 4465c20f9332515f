"""The layout "sliced" (see ``sliced.h``), used by the patterns ``index``, ``block`` and high-sparsity ``nm``.

A slice is 16 rows by 128 columns; its rows are sorted by how much they keep, and the s-th values of all of them are
neighbours, each with the column as one byte. Related: SELL-C-sigma (Kreutzer et al., 2014); here sorting is inside a
slice, nothing is padded, and x is looked up in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsec.codegen.cpp import coded, packer
from sparsec.codegen.cpp.codes import SYMMETRIC_ZERO
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import bits, is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern, value_kind

Array = np.ndarray[Any, Any]


def pack(weight: torch.Tensor, pattern: Pattern, values: str, source_key: str, share: int = 1) -> Packed:
    """``share`` neighbouring rows (1, 2, 4, 8 or 16) keep the same columns."""
    if is_coded(values):
        return _pack_coded(weight, Format(pattern, values), source_key, share)
    weight = packer.checked(weight, values)
    tensors = packer.pack_sliced(weight, share)
    start = tensors[-1]
    chunks = -(-weight.shape[1] // packer.CHUNK)
    work = start[:, 0] + 8 * start[:, 1] + torch.arange(start.shape[0]) * (32 * chunks + 1)
    n, k = weight.shape
    return Packed(Format(pattern, values), 1, tensors, work, (n, k), source_key)


def _pack_coded(weight: torch.Tensor, format: Format, source_key: str, share: int) -> Packed:
    """As ``pack``, but values are a byte stream in which the codes of each step start in a new byte."""
    found = coded.coded(weight, format, "sliced", source_key)
    (n, k), width = weight.shape, bits(format.values)
    q, positions, lanes, heads, start = packer.pack_sliced(found.codes.q.int(), share)
    values, steps = int(start[-1, 0]), int(start[-1, 1])
    stored = (q[:values] + (0 if width == 8 else SYMMETRIC_ZERO[value_kind(format.values)[0]])).to(torch.int8)
    stream, sizes = coded.ragged(stored.view(torch.uint8), lanes[:steps].long(), packer.TILE, width)
    begin = packer.prefix(sizes)[start[:, 1]]
    chunks = -(-k // packer.CHUNK)
    work = start[:, 0] + 8 * start[:, 1] + torch.arange(start.shape[0]) * (32 * chunks + 1)
    starts = torch.stack([begin, start[:, 1], start[:, 0]], 1).contiguous()
    return Packed(format, 1, (stream, positions, lanes, heads, starts, *found.tail), work, (n, k), source_key)


def _unpack_coded(packed: Packed, share: int) -> torch.Tensor:
    """By the plain layout of whole numbers, q as int32."""
    stream, positions, lanes, heads, starts, *tail = packed.tensors
    width = bits(packed.format.values)
    zero = 0 if width == 8 else SYMMETRIC_ZERO[value_kind(packed.format.values)[0]]
    codes = coded.unragged(stream, lanes[: int(starts[-1, 1])].long(), packer.TILE, width)
    q = (codes.view(torch.int8) if width == 8 else codes).int() - zero
    plain = (q, positions, lanes, heads, starts[:, [2, 1]].contiguous())
    numbers = unpack(Packed(Format(packed.format.pattern, "fp32"), 1, plain, packed.work, packed.shape, ""), share)
    stored = (numbers + zero).to(torch.int8).view(torch.uint8)
    return coded.decoded(stored, numbers != 0, tuple(tail), packed.format.values)


_TILES_AT_ONCE = 16  # a piece fits the cache


def unpack(packed: Packed, share: int = 1) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone; on one thread."""
    if is_coded(packed.format.values):
        return _unpack_coded(packed, share)
    n, k = packed.shape
    kind = torch.int32 if packed.tensors[0].element_size() == 4 else torch.int16
    out = torch.zeros(n, k, dtype=kind)
    tiles = -(-n // packer.TILE)
    for begin in range(0, tiles if k else 0, _TILES_AT_ONCE):
        end = min(begin + _TILES_AT_ONCE, tiles)
        height = min(end * packer.TILE, n) - begin * packer.TILE
        out.numpy()[begin * packer.TILE :][:height] = _unpack_tiles(packed, kind, share, begin, end)[:height, :k]
    return out.view(packed.tensors[0].dtype)


def _unpack_tiles(packed: Packed, dtype: torch.dtype, share: int, begin: int, end: int) -> Array:
    """Rows of tiles [begin, end), with columns up to the end of the last chunk."""
    values, positions, lanes, heads, start = (t.numpy() for t in (packed.tensors[0].view(dtype), *packed.tensors[1:]))
    per = 4 // values.itemsize
    chunks = -(-packed.shape[1] // packer.CHUNK)
    slices = (end - begin) * chunks
    head = heads[9 * begin * chunks :][: 9 * slices].reshape(slices, 9)
    ranks = np.stack([head[:, 1:] & 15, head[:, 1:] >> 4], axis=2).reshape(slices, 16)
    number = np.arange(slices)[:, None]
    row_of = np.argsort(ranks, axis=1) + number // chunks * packer.TILE
    base = (row_of * (chunks * packer.CHUNK) + number % chunks * packer.CHUNK).reshape(-1)

    (value0, step0), (value1, step1) = start[begin], start[end]
    steps = lanes[step0:step1].astype(np.int64)
    slice_of = np.repeat(np.arange(slices), head[:, 0])
    first = steps.cumsum() - steps
    entry = np.repeat(slice_of * 16 - first, steps) + np.arange((value1 - value0) // per)
    column = positions[value0 // share : value1 // share].reshape(-1, 1, per).repeat(share, axis=1).reshape(-1, per)
    where = base[entry][:, None] + column
    found = values[value0:value1].reshape(-1, per)
    kept = found != 0  # the second half of the last pair of a row may be empty
    wide = np.zeros(slices * packer.TILE * packer.CHUNK, dtype=found.dtype)
    wide[where[kept]] = found[kept]
    return wide.reshape((end - begin) * packer.TILE, -1)


def text(spec: KernelSpec, share: int = 1) -> str:
    return unit(spec, "sliced", {"kShare": share})
