"""Coded values on the CPU: which there are, their bytes, and the tensors that say what codes mean.

The kernels' half is ``coded.h``. A new value type is a name in ``values.py``, its codes in ``codes.py``, and a table of
levels in ``coded_<isa>.h``; patterns and loops do not know which values they move.

Tensors behind those of a layout: scales fp32 [tiles, groups, 16], or levels fp32 [rows, 16] of codebooks; zero points
uint8 in the order of the scales, of 4 bits only; and three of outliers, see ``outliers.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsec.codegen.cpp import outliers, packer
from sparsec.codegen.cpp.codes import SYMMETRIC_ZERO, Codes
from sparsec.codegen.cpp.values import bits, refusal
from sparsec.errors import PatternMismatch
from sparsec.formats import BOOKS, Format, value_kind

LANES_ARE_ROWS = ("sliced", "columns", "columns_bitmap")


@dataclass(frozen=True)
class Coded:
    """A weight [N, K] without its outliers, as ``codes``; ``stored``: uint8 [N, K], a code in the low bits of each."""

    main: torch.Tensor
    codes: Codes
    stored: torch.Tensor
    tail: tuple[torch.Tensor, ...]


def coded(weight: torch.Tensor, format: Format, layout: str, key: str = "") -> Coded:
    """Raises PatternMismatch where the layout does not take the values, or the weight is no grid with few outliers;
    ValueError where it is not a [N, K] fp32 or bf16 tensor on the CPU."""
    if why := refusal(layout, format.values):
        raise PatternMismatch(format=str(format), detail=why)
    if weight.dim() != 2 or weight.dtype not in packer.VALUE_DTYPES.values() or weight.device.type != "cpu":
        raise ValueError(f"a [N, K] fp32 or bf16 weight on the CPU is needed, not {tuple(weight.shape)} {weight.dtype}")
    weight = weight.detach().contiguous()
    main, aside, found = outliers.split(weight, format, key)
    if layout in LANES_ARE_ROWS and bool((found.zero != _middle(format.values)).any()):
        raise PatternMismatch(format=str(format), detail="its zero points differ; bitmap takes them")
    return Coded(main, found, _stored(found, format.values), (*_meaning(found, format.values), *outliers.stream(aside)))


def _middle(values: str) -> int:
    return SYMMETRIC_ZERO[value_kind(values)[0]]


def _wide(table: torch.Tensor, group: int, k: int) -> torch.Tensor:
    return table.repeat_interleave(group or max(k, 1), 1)[:, :k]


def _stored(found: Codes, values: str) -> torch.Tensor:
    if bits(values) == 8 or value_kind(values)[0] in BOOKS:
        return found.q.view(torch.uint8)
    return (found.q.to(torch.int16) + _wide(found.zero.to(torch.int16), found.group, found.q.shape[1])).to(torch.uint8)


def _tiled(table: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """[N, groups] as [tiles, groups up to a multiple of 128 columns, 16 rows], zeros where there is none."""
    rows = -(-len(table) // packer.TILE) * packer.TILE
    groups = -(-k // packer.CHUNK) * (packer.CHUNK // group) if group else 1
    wide = table.new_zeros(rows, groups)
    wide[: len(table), : table.shape[1]] = table
    return wide.view(rows // packer.TILE, packer.TILE, groups).transpose(1, 2).contiguous()


def _rows(tiled: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_tiled``, but for what it padded."""
    return tiled.transpose(1, 2).flatten(0, 1)


def _meaning(found: Codes, values: str) -> tuple[torch.Tensor, torch.Tensor]:
    k, none = found.q.shape[1], torch.zeros(0, dtype=torch.uint8)
    if value_kind(values)[0] in BOOKS:
        rows = -(-len(found.q) // packer.TILE) * packer.TILE
        return torch.nn.functional.pad(found.levels, (0, 0, 0, rows - len(found.q))), none
    zero = _tiled(found.zero, found.group, k) if bits(values) == 4 else none
    return _tiled(found.scale, found.group, k), zero


def decoded(
    stored: torch.Tensor, kept: torch.Tensor | None, tail: tuple[torch.Tensor, ...], values: str
) -> torch.Tensor:
    """The weight [N, K] that stored codes stand for, where ``kept`` (everywhere if None), and its outliers."""
    (n, k), (kind, group) = stored.shape, value_kind(values)
    scale, zero = tail[:2]
    if not stored.numel():
        return torch.zeros(n, k, dtype=tail[4].dtype)
    if kind in BOOKS:
        found = Codes(stored.view(torch.int8), torch.zeros(n, 0), zero, scale[:n], 0)
    else:
        groups = -(-k // group) if group else 1
        scales = _rows(scale)[:n, :groups]
        zeros = torch.full(scales.shape, _middle(values), dtype=torch.int16)
        if bits(values) == 4:
            zeros = _rows(zero)[:n, :groups].to(torch.int16)
        q = stored.view(torch.int8) if bits(values) == 8 else (stored - _wide(zeros, group, k)).to(torch.int8)
        found = Codes(q, scales, zeros.to(torch.uint8), torch.zeros(n, 0), group)
    main = found.weight(tail[4].dtype)
    return outliers.joined(main if kept is None else main.masked_fill(~kept, 0.0), tail[2:])


# ---- codes as bytes


def _unit(width: int) -> tuple[int, int]:
    """(codes, bytes) of the least number of codes that fill whole bytes."""
    whole = math.lcm(8, width)
    return whole // width, whole // 8


def to_bytes(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 codes [..., J] of ``width`` bits as uint8 [..., J width / 8], the first code in the lowest bits."""
    each, size = _unit(width)
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    if size > 1:
        parts = parts.int()
    out: torch.Tensor = parts[..., 0].clone()
    for i in range(1, each):
        out |= parts[..., i] << (width * i)
    if size == 1:
        return out
    return torch.stack([(out >> (8 * i)) & 255 for i in range(size)], -1).flatten(-2).to(torch.uint8)


def from_bytes(data: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse: uint8 [..., B] gives codes [..., 8 B / width]."""
    (each, size), mask = _unit(width), (1 << width) - 1
    if size > 1:
        parts = data.reshape(*data.shape[:-1], data.shape[-1] // size, size).int()
        data = torch.stack([parts[..., i] << (8 * i) for i in range(size)]).sum(0, dtype=torch.int32)
    return torch.stack([(data >> (width * i)) & mask for i in range(each)], -1).flatten(-2).to(torch.uint8)


def _slots(counts: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width) < counts[:, None]


def ragged(codes: torch.Tensor, counts: torch.Tensor, most: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of parts that follow each other, ``counts`` of each and ``most`` at most, each part from a new byte on.

    Returns the bytes, with room to read past their end, and how many each part has.
    """
    sizes = (counts * width + 7) // 8
    wide = torch.zeros(len(counts), most, dtype=torch.uint8)
    wide[_slots(counts, most)] = codes
    chosen = to_bytes(wide, width)[_slots(sizes, most * width // 8)]
    data = packer.padded(chosen.numel(), torch.uint8)
    data[: chosen.numel()] = chosen
    return data, sizes


def unragged(data: torch.Tensor, counts: torch.Tensor, most: int, width: int) -> torch.Tensor:
    """The codes back, without what is between the parts."""
    sizes = (counts * width + 7) // 8
    wide = torch.zeros(len(counts), most * width // 8, dtype=torch.uint8)
    wide[_slots(sizes, most * width // 8)] = data[: int(sizes.sum())]
    return from_bytes(wide, width)[_slots(counts, most)]
