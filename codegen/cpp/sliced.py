"""The layout "sliced" (see ``sliced.h``), used by the patterns ``index``, ``block`` and high-sparsity ``nm``.

A slice is 16 rows by 128 columns; its rows are sorted by how much they keep, and the s-th values of all of them are
neighbours, each with the column as one byte. Related: SELL-C-sigma (Kreutzer et al., 2014); here sorting is inside a
slice, nothing is padded, and x is looked up in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsec.codegen.cpp import packer
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern

Array = np.ndarray[Any, Any]


def pack(weight: torch.Tensor, pattern: Pattern, values: str, source_key: str, share: int = 1) -> Packed:
    """``share`` neighbouring rows (1, 2, 4, 8 or 16) keep the same columns."""
    weight = packer.checked(weight, values)
    tensors = packer.pack_sliced(weight, share)
    start = tensors[-1]
    chunks = -(-weight.shape[1] // packer.CHUNK)
    work = start[:, 0] + 8 * start[:, 1] + torch.arange(start.shape[0]) * (32 * chunks + 1)
    n, k = weight.shape
    return Packed(Format(pattern, values), 1, tensors, work, (n, k), source_key)


_TILES_AT_ONCE = 16  # a piece fits the cache


def unpack(packed: Packed, share: int = 1) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone; on one thread."""
    n, k = packed.shape
    bits = torch.int32 if packed.tensors[0].element_size() == 4 else torch.int16
    out = torch.zeros(n, k, dtype=bits)
    tiles = -(-n // packer.TILE)
    for begin in range(0, tiles if k else 0, _TILES_AT_ONCE):
        end = min(begin + _TILES_AT_ONCE, tiles)
        height = min(end * packer.TILE, n) - begin * packer.TILE
        out.numpy()[begin * packer.TILE :][:height] = _unpack_tiles(packed, bits, share, begin, end)[:height, :k]
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
    bits = values[value0:value1].reshape(-1, per)
    kept = bits != 0  # the second half of the last pair of a row may be empty
    wide = np.zeros(slices * packer.TILE * packer.CHUNK, dtype=bits.dtype)
    wide[where[kept]] = bits[kept]
    return wide.reshape((end - begin) * packer.TILE, -1)


def text(spec: KernelSpec, share: int = 1) -> str:
    return unit(spec, "sliced", {"kShare": share})
