"""The layout "pairs" of integer kernels (see ``int_pairs.h``): 2:4, and 1:2 as one of it.

Places take as many bytes as the masks of a bitmap would, 2 bits for each of two values instead of 4 for both, but say
where x has to go instead of where the weights do: no bit is counted, no weight moved, and no product is with a zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsec.codegen.cpp import int_codes, int_sliced, int_steps, nm, packer
from sparsec.codegen.cpp.codes import BITS, SYMMETRIC_ZERO, Codes, codes_of
from sparsec.codegen.spec import Packed
from sparsec.formats import Format, Pattern, value_kind

Array = np.ndarray[Any, Any]

QUAD = 32  # columns of 4 steps
PATTERNS = ((2, 4), (1, 2))


def holds(pattern: Pattern, group: int) -> bool:
    """Whether this layout takes N:M of values with a scale for ``group`` columns."""
    return pattern.kind == "nm" and pattern.params in PATTERNS and group % QUAD == 0


def on_tiles(format: Format) -> bool:
    """As in ``int_steps``."""
    return True


def constants(format: Format) -> dict[str, int | str]:
    return {"kSide": 1, "kXColumns": QUAD, "kXFlip": "kXOffset != 0", "kSums": 0}


def pack(weight: torch.Tensor, format: Format, source_key: str) -> Packed:
    """Raises PatternMismatch where the weight is on no such grid, or is not N:M."""
    kind, group = value_kind(format.values)
    nm.check(weight, format.pattern)
    codes, (n, k), bits = codes_of(weight, format, source_key), weight.shape, BITS[kind]
    tiles, quads = -(-n // packer.TILE), -(-k // QUAD)
    q = np.zeros((tiles * packer.TILE, quads * QUAD), dtype=np.int16)
    q[:n, :k] = codes.q.numpy()
    groups = (tiles, packer.TILE, quads, 4, 2, 4)  # row, quad, step, pair, column
    place = _places((q != 0).reshape(groups))
    value = np.take_along_axis((q + (_zeros(codes, *q.shape) if bits < 8 else 0)).reshape(groups), place, 5)
    steps = value.transpose(0, 2, 3, 1, 4, 5).astype(np.uint8).reshape(-1, 64)
    shifts = np.arange(0, 8, 2).reshape(4, 1, 1)
    places = (place << shifts).sum(3).astype(np.uint8).transpose(0, 2, 1, 3, 4)
    parts = [int_codes.planes(steps, bits).reshape(tiles * quads, QUAD * bits), places.reshape(tiles * quads, 64)]
    scale, zero, apart = int_steps.factors(codes, SYMMETRIC_ZERO[kind], tiles)
    info = torch.tensor([int_steps.DTYPES.index(weight.dtype), apart])
    stream = int_codes.padded(np.concatenate(parts, axis=1).ravel())
    work = torch.arange(tiles + 1) * (quads * QUAD * packer.TILE // 2 + 64)
    tensors = (stream, scale, int_sliced.sums_of(q, group, tiles), zero, info)
    return Packed(format, 1, tensors, work, (n, k), source_key, x="int8")


def _places(keep: Array) -> Array:
    """[..., 4] -> [..., 2]: the columns of two, those that are kept and the first others, ascending."""
    first = np.argsort(~keep, axis=-1, kind="stable")[..., :2]
    out: Array = np.sort(first, axis=-1)
    return out


def _zeros(codes: Codes, rows: int, columns: int) -> Array:
    """int16 [rows, columns]: the code of zero at each place, past the end of the weight too."""
    n, k = codes.q.shape
    wide = np.zeros((rows, columns), dtype=np.int16)
    if codes.zero.numel():
        of = np.minimum(np.arange(columns) // (codes.group or max(k, 1)), codes.zero.shape[1] - 1)
        wide[:n] = codes.zero.numpy()[:, of]
    return wide


def unpack(packed: Packed) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone."""
    if 0 in packed.shape:
        return torch.zeros(packed.shape, dtype=int_steps.DTYPES[int(packed.tensors[-1][0])])
    (n, k), (kind, group) = packed.shape, value_kind(packed.format.values)
    stream, scale, _, zero, info = packed.tensors
    tiles, quads, bits = -(-n // packer.TILE), -(-k // QUAD), BITS[kind]
    size = 32 * bits + 64
    parts = stream.numpy()[: tiles * quads * size].reshape(tiles * quads, size)
    value = int_codes.from_planes(parts[:, :-64], bits).reshape(tiles, quads, 4, packer.TILE, 2, 2)
    place = (parts[:, -64:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    place = place.reshape(tiles, quads, packer.TILE, 2, 2, 4).transpose(0, 1, 5, 2, 3, 4)
    wide = np.zeros((tiles, quads, 4, packer.TILE, 2, 4), dtype=np.int16)
    kept = np.zeros(wide.shape, dtype=bool)
    np.put_along_axis(wide, place.astype(np.int64), value.view(np.int8) if bits == 8 else value, 5)
    np.put_along_axis(kept, place.astype(np.int64), True, 5)
    rows, mask = (
        t.transpose(0, 3, 1, 2, 4, 5).reshape(tiles * packer.TILE, quads * QUAD)[:n, :k] for t in (wide, kept)
    )
    scales, zeros = int_steps.from_factors(scale, zero, tiles, n)
    span = np.repeat(zeros.numpy().astype(np.int16), group or max(k, 1), axis=1)[:, :k] if bits < 8 else 0
    q = torch.from_numpy(np.where(mask, rows - span, 0).astype(np.int8))
    return Codes(q, scales, zeros, torch.zeros(n, 0), group).weight(int_steps.DTYPES[int(info[0])])
