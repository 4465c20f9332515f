"""Quantised values: the integers and scales that a floating-point weight was made of, found in the weight itself.

In: a weight [N, K] and a value type (``int8``, ``int8g128``, ``int4g32``, ``ternary``, ``codebook3``). Out: ``Codes``,
proven to give every element of the weight back. Packers store codes in the order their kernels read; kernels compute
with ``q * scale`` before that product was rounded to the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.errors import PatternMismatch
from sparsec.formats import BOOKS, TABLE, Format, value_kind
from sparsec.grid import OnGrid, on_grid

BITS = {"int8": 8, "int4": 4, "ternary": 2, "codebook": 4, "codebook3": 3, "codebook2": 2}
SYMMETRIC_ZERO = {"int8": 128, "int4": 8, "ternary": 1, **dict.fromkeys(BOOKS, 0)}


@dataclass(frozen=True)
class Codes:
    """weight = q * scale, rounded to the weight's dtype; for codebooks weight = levels[row, q].

    ``q``: int8 [N, K], 0 where the weight is 0 (codebooks: the index of the level, also of a level 0; -1 where zero is
    none of them, for a pattern that stores no zeros). ``scale``: fp32 [N, groups]; empty [N, 0] for codebooks.
    ``zero``: uint8 [N, groups], the unsigned code of 0, so that q + zero lies in 0 .. 2^bits - 1. ``levels``: fp32
    [N, 16], of codebooks only, else [N, 0]: as many as fit the bits, ascending, and then the same again.
    ``group``: columns that share a scale, 0 for the whole row; a last group may be shorter.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    levels: torch.Tensor
    group: int

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, K] back, by plain torch."""
        if self.levels.numel():
            return self.levels.gather(1, self.q.long().clamp(min=0)).masked_fill(self.q < 0, 0.0).to(dtype)
        return OnGrid(self.q, self.scale, self.group).weight(dtype)

    def unsigned(self) -> torch.Tensor:
        """q + zero, uint8 [N, K]."""
        k = self.q.shape[1]
        zero = self.zero.to(torch.int16).repeat_interleave(self.group or max(k, 1), 1)[:, :k]
        return (self.q + zero).to(torch.uint8)

    @property
    def symmetric(self) -> bool:
        """All groups have the same zero, the middle of the range."""
        return not self.zero.numel() or bool((self.zero == self.zero.flatten()[0]).all())


def codes_of(weight: torch.Tensor, format: Format, key: str = "") -> Codes:
    """The codes of a weight [N, K] on the CPU. Raises PatternMismatch where it lies on no such grid.

    ``key``: of the weight's content, as ``grid.on_grid``. Groups of zeros have the scale 1; so have those of a weight
    without rows or columns, which lies on any grid.
    """
    kind, group = value_kind(format.values)
    if not weight.numel():
        return _empty(weight, kind, group)
    if kind in BOOKS:
        return _codebook(weight, format, BOOKS[kind])
    if kind == "ternary":
        found, group = on_grid(weight, 2, 0, key=key), 0
        if found is None:
            raise PatternMismatch(format=str(format), detail="a row has more than one magnitude")
        return Codes(found.q, found.scale, _zeros(found, 1), _none(weight), 0)
    bits = BITS[kind]
    found = on_grid(weight, bits, group, key=key)
    if found is not None:
        return Codes(found.q, found.scale, _zeros(found, 2 ** (bits - 1)), _none(weight), group)
    found = on_grid(weight, bits, group, True, key) if bits < 8 else None  # q of 8 shifted bits fit no int8
    if found is None:
        where = f"groups of {group}" if group else "rows"
        raise PatternMismatch(format=str(format), detail=f"its {where} are on no grid of {bits} bits")
    return Codes(found.q, found.scale, _zero_points(found, bits), _none(weight), group)


def _empty(weight: torch.Tensor, kind: str, group: int) -> Codes:
    n, k = weight.shape
    groups = 0 if kind in BOOKS else -(-k // group) if group else 1
    zero = torch.full((n, groups), SYMMETRIC_ZERO[kind], dtype=torch.uint8)
    levels = torch.zeros(n, TABLE if kind in BOOKS else 0)
    return Codes(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups), zero, levels, group)


def _none(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(weight.shape[0], 0)


def _zeros(found: OnGrid, zero: int) -> torch.Tensor:
    return torch.full(found.scale.shape, zero, dtype=torch.uint8)


def _zero_points(found: OnGrid, bits: int) -> torch.Tensor:
    """The middle of the range where the codes of a group allow it, else the smallest zero that leaves none negative."""
    n, k = found.q.shape
    size, middle = found.group or k, 2 ** (bits - 1)
    q = torch.nn.functional.pad(found.q, (0, -k % size)).view(n, -1, size)
    low, high = q.amin(2).clamp(max=0), q.amax(2).clamp(min=0)
    fits = (low >= -middle) & (high < middle)
    return torch.where(fits, middle, -low.int()).to(torch.uint8)


def _codebook(weight: torch.Tensor, format: Format, most: int) -> Codes:
    """Rows of at most ``most`` values, of which a bitmap's zeros are none where that is what it takes.

    The largest repeats where there are fewer. Ascending, so a search finds each.
    """
    wide = weight.detach().float() + 0.0  # -0.0 and 0.0 are one level
    ordered, rank = _ranked(wide)
    left_out = torch.zeros_like(wide, dtype=torch.bool)
    if format.pattern.kind == "bitmap" and bool((rank[:, -1] >= most).any()):
        left_out = wide == 0
        wide = torch.where(left_out, wide.masked_fill(left_out, -torch.inf).amax(1, keepdim=True), wide)
        wide = wide.masked_fill(left_out & (wide == -torch.inf), 0.0)  # rows of zeros
        ordered, rank = _ranked(wide)
    off = ~wide.isfinite().all(1) | (rank[:, -1] >= most)
    if bool(off.any()):
        row = int(off.nonzero()[0])
        raise PatternMismatch(format=str(format), detail=f"row {row} has more than {most} values, or one not finite")
    levels = ordered[:, -1:].repeat(1, most)
    levels.scatter_(1, rank, ordered)
    q = torch.searchsorted(levels.contiguous(), wide.contiguous()).to(torch.int8).masked_fill(left_out, -1)
    table = levels.repeat(1, TABLE // most)
    return Codes(q, _none(weight), torch.zeros(len(weight), 0, dtype=torch.uint8), table, 0)


def _ranked(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in ascending order, and how many other values come before each."""
    ordered = wide.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, new.cumsum(1) - 1
