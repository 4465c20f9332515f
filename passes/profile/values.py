"""What the kept values look like: real numbers, three values, a few levels, or integers times a scale.

Quantisation that any tool did shows in the values themselves. ``w = q * s`` with a small integer ``q`` leaves every
value of a row (or of a group along K) a whole multiple of one number; a codebook leaves few distinct values. A sample
is asked first, so that real weights cost next to nothing; what passes is then checked on every value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.facts import ValueFact
from sparsec.grid import KNOWN, OnGrid, on_grid

REAL = ValueFact()
MAX_LEVELS = 256
MAX_BOOK = 16  # levels of a row that has its own
MAX_BITS = 8
GROUPS = (0, 128, 64, 32)  # 0: one scale a row. The coarsest that holds is reported
_SAMPLE_ROWS = 16
_BAND = 1 << 20
_REPEATS = 8  # a level must be used this often on average; fewer is a small matrix, not a codebook
_EVIDENCE = 64  # multiples beyond those that a free choice of scales explains
_TELLING = 40  # a larger code of a 16-bit value is near some integer, whatever the value
_MIN_GROUP = 8  # kept values from which one group is evidence at all


def value_set(weight: torch.Tensor, nnz: int, key: str = "") -> ValueFact:
    """The value set of a finite weight [N, K] with ``nnz`` non-zeros; REAL when nothing smaller describes it.

    ``key``: of its content; scales that are found are remembered by it, for packing (``grid.KNOWN``).
    """
    if nnz == 0 or weight.numel() == 0 or not weight.dtype.is_floating_point:
        return REAL
    sample = _sample(weight)
    levels = _levels(weight, sample, nnz)
    if levels is not None and _is_ternary(levels):
        return ValueFact("ternary", levels.numel())
    count, most = 0 if levels is None else levels.numel(), _row_levels(weight, sample, nnz)
    for group in GROUPS:
        if group >= weight.shape[1]:
            continue
        if _grid([sample], group) is not None and (grid := _grid(_bands(weight), group)):
            kind = "ternary" if grid.largest == 1 else "grid"
            least = 2 if kind == "ternary" else 3  # -1 .. 2 has four values too, and codes of 2 bits are -1 .. 1
            proven = _proven(_bands(weight), max(grid.bits, least), group, key)
            return ValueFact(kind, count, grid.bits, group, proven, most)
        if weight.dtype != torch.float32 and (bits := _exact_bits(weight, sample, group, key)):
            return ValueFact("ternary" if bits == 2 else "grid", count, bits, group, True, most)
    return REAL if levels is None and not most else ValueFact("codebook", count, row_levels=most)


def _exact_bits(weight: torch.Tensor, sample: torch.Tensor, group: int, key: str) -> int:
    """Bits of the codes that give every value back, else 0. Where products were rounded to 16 bits any number is near
    a multiple of any other, and only the exact search tells."""
    for bits in (2, 4, MAX_BITS):
        found = _codes(sample, bits, group)
        if found is None:
            continue
        telling = int(((found.q != 0) & (found.q.abs() <= _TELLING)).sum()) - 2 * found.scale.numel()
        return bits if telling >= _EVIDENCE and _proven(_bands(weight), bits, group, key) else 0
    return 0


def _codes(weight: torch.Tensor, bits: int, group: int) -> OnGrid | None:
    """Codes of 2, 4 or 8 bits that give every value back, around any zero where they are of 4; None: there are none."""
    width = _width(bits)
    found = on_grid(weight.to("cpu"), width, group)
    return on_grid(weight.to("cpu"), width, group, shifted=True) if found is None and width == 4 else found


def _width(bits: int) -> int:
    return 2 if bits <= 2 else 4 if bits <= 4 else MAX_BITS


def _proven(bands: list[torch.Tensor], bits: int, group: int, key: str) -> bool:
    """Whether every band has such codes. Their scales are remembered: of all bands around the middle, or of all around
    any zero, since one that is around the middle is that too."""
    found: list[torch.Tensor] = []
    width, shifted = _width(bits), False
    for band in bands:
        symmetric = on_grid(band.to("cpu"), width, group) if not shifted else None
        shifted |= symmetric is None
        codes = symmetric or (on_grid(band.to("cpu"), width, group, shifted=True) if width == 4 else None)
        if codes is None:
            return False
        found.append(codes.scale)
    if key:
        KNOWN.remember(key, width, group, False, None if shifted else torch.cat(found))
        if shifted:
            KNOWN.remember(key, width, group, True, torch.cat(found))
    return True


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Rows spread over the matrix, fp32 or wider, contiguous: [<= 16, K]."""
    n = weight.shape[0]
    rows = sorted({i * n // _SAMPLE_ROWS for i in range(_SAMPLE_ROWS)})
    return weight[rows].to("cpu").contiguous()


def _bands(weight: torch.Tensor) -> list[torch.Tensor]:
    """Views of whole rows; each is read, and freed, when it is looked at."""
    step = max(_BAND // weight.shape[1], 1)
    return [weight[begin : begin + step] for begin in range(0, weight.shape[0], step)]


def _levels(weight: torch.Tensor, sample: torch.Tensor, nnz: int) -> torch.Tensor | None:
    """The distinct kept values, ascending, or None when there are too many to be a set of levels."""
    known: torch.Tensor = torch.unique(sample[sample != 0])
    most = min(MAX_LEVELS, nnz // _REPEATS)
    if known.numel() > most:
        return None
    for band in _bands(weight):
        values = band.to("cpu").contiguous().view(-1)
        fresh = values[~_contains(known, values)]
        if fresh.numel():
            known = torch.unique(torch.cat([known, torch.unique(fresh)]))
        if known.numel() > most:
            return None
    return known


def _row_levels(weight: torch.Tensor, sample: torch.Tensor, nnz: int) -> int:
    """The most kept values that a row has, 0 where it is more than a book of 16 has or they are hardly used."""
    if int(_counted(sample).max()) > MAX_BOOK:
        return 0
    used = torch.cat([_counted(band.to("cpu")) for band in _bands(weight)])
    most = int(used.max())
    return most if most <= MAX_BOOK and _REPEATS * int(used.sum()) <= nnz else 0


def _counted(band: torch.Tensor) -> torch.Tensor:
    """How many different values each row keeps, int64 [rows]."""
    ordered = band.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (first & (ordered != 0)).sum(1)


def _contains(known: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Which values are zero or one of ``known`` (ascending)."""
    if not known.numel():
        return values == 0
    at = torch.searchsorted(known, values).clamp_(max=known.numel() - 1)
    return (known[at] == values) | (values == 0)


def _is_ternary(levels: torch.Tensor) -> bool:
    return levels.numel() == 1 or (levels.numel() == 2 and bool(levels[0] == -levels[1]))


@dataclass(frozen=True)
class _Grid:
    largest: int  # of |q|
    span: int  # largest difference of two q under one scale, zero included

    @property
    def bits(self) -> int:
        """Bits of a code: 4 for -8..7, and for 0..15 around any zero point."""
        return self.span.bit_length()


def _grid(bands: list[torch.Tensor], group: int) -> _Grid | None:
    """The integer grid on which every value lies, one scale for each row or group, or None."""
    largest = span = evidence = 0
    for band in bands:
        rows = _grouped(band, group)
        kept = (rows != 0).sum(1)
        strong = rows[kept >= _MIN_GROUP]
        if not strong.numel():
            continue
        scale = _scale(strong, _tolerance(band.dtype))
        if scale is None:
            return None
        q = (strong / scale[:, None]).round_()
        largest = max(largest, int(q.abs().max()))
        span = max(span, int((q.amax(1).clamp_(min=0) - q.amin(1).clamp_(max=0)).max()))
        evidence += int((kept[kept >= _MIN_GROUP] - 2).sum())
        if _too_coarse(band.dtype, largest):
            return None
    return _Grid(largest, span) if evidence >= _EVIDENCE and span < 2**MAX_BITS else None


def _grouped(band: torch.Tensor, group: int) -> torch.Tensor:
    """[groups, group] in fp64, the last group of a row filled with zeros; the row itself where ``group`` is 0."""
    values = band.to("cpu").double()
    if group == 0:
        return values
    missing = -values.shape[1] % group
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(-1, group)


def _tolerance(dtype: torch.dtype) -> float:
    """Relative error of a stored product q * s: one rounding of the scale and one of the product."""
    return 2 * torch.finfo(dtype).eps


def _too_coarse(dtype: torch.dtype, largest: int) -> bool:
    """Rounding of the dtype is so wide that any number would be near a multiple."""
    return largest > 2**MAX_BITS - 1 or largest * _tolerance(dtype) > 0.25


def _scale(rows: torch.Tensor, tolerance: float) -> torch.Tensor | None:
    """A scale for each row of [G, g] such that all its values are near multiples of it; None when one row has none."""
    size = rows.abs()
    smallest = torch.where(size > 0, size, torch.inf).amin(1)
    scale = _refine(rows, smallest)
    open_rows = ~_fits(rows, scale, tolerance)
    if bool(open_rows.any()):  # the smallest value is not one step: the smallest gap between values usually is
        todo = rows[open_rows]
        gap = _smallest_gap(todo, tolerance)
        best = torch.full_like(gap, torch.nan)
        for part in range(1, 5 if tolerance > 1e-3 else 17):  # fine dtypes prove a grid on fewer values
            guess = _refine(todo, gap / part)
            best = torch.where(best.isnan() & _fits(todo, guess, tolerance), guess, best)
        if bool(best.isnan().any()):
            return None
        scale[open_rows] = best
    return scale


def _smallest_gap(rows: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Smallest difference of two different sizes in each row, zero included; rounding noise is no difference."""
    size = rows.abs().sort(1).values
    gaps = size.diff(dim=1)
    real = gaps > 2 * tolerance * size[:, 1:]
    first = torch.where(size > 0, size, torch.inf).amin(1)
    smallest: torch.Tensor = torch.where(real, gaps, torch.inf).amin(1)
    return torch.minimum(smallest, first)


def _refine(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Least squares: the scale that the integers read off with a rough one ask for."""
    q = (rows / scale[:, None]).round_()
    return (rows * q).sum(1) / (q * q).sum(1).clamp_(min=1)


def _fits(rows: torch.Tensor, scale: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which rows are whole multiples of their scale, up to the rounding of the dtype, with |q| of at most 8 bits."""
    q = rows / scale[:, None]
    whole = q.round()
    allowed = (whole.abs() * tolerance).clamp_(min=1e-6, max=0.25)
    near = (q - whole).abs_() <= allowed
    small: torch.Tensor = (whole.abs() <= 2**MAX_BITS - 1) & ((whole != 0) | (rows == 0))
    return (near & small).all(1)
