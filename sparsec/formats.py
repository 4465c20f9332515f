"""Format = Pattern x Values: which positions can be non-zero, and how the kept values are stored.

Names are what a user types and reads: ``bitmap``, ``index``, ``nm:2:4`` (keep 2 of 4), ``block:16x1`` (16 rows by 1
column); with values ``bitmap+bf16``. A weight has shape [N, K] = [out_features, in_features]; patterns are relative
to that orientation, so N:M groups run along K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.errors import UnknownFormat, did_you_mean, listed

if TYPE_CHECKING:
    from sparsec.facts import ValueFact, WeightFact

PATTERN_KINDS = ("dense", "panel", "bitmap", "index", "nm", "vnm", "block")
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of real values; CPU kernels take the first two
BOOKS = {"codebook2": 4, "codebook3": 8, "codebook": 16}  # levels of a row, zero among them where zeros are stored
VALUE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "ternary": 2, "codebook": 4,
              "codebook2": 2, "codebook3": 3}  # fmt: skip
TABLE = 16  # levels that a row's table has, the first again where there are fewer
SLICE = 128  # columns that are worked on together
_DEFAULT_PARAMS = {"nm": (2, 4), "vnm": (64, 2, 8), "block": (16, 1)}


@dataclass(frozen=True, order=True)
class Pattern:
    """Positions. ``params``: () for dense/bitmap/index, (n, m) for nm, (v, n, m) for vnm, (rows, cols) for block."""

    kind: str
    params: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind in ("nm", "vnm"):
            return ":".join((self.kind, *map(str, self.params)))
        if self.kind == "block":
            return f"block:{self.params[0]}x{self.params[1]}"
        return self.kind

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``bitmap``, ``nm:2:4``, ``block:16x1``. Raises UnknownFormat."""
        kind, _, rest = text.partition(":")
        if kind not in PATTERN_KINDS:
            raise UnknownFormat(name=text, nearest=did_you_mean(kind, PATTERN_KINDS), known=listed(PATTERN_KINDS))
        if not rest:
            return cls(kind, _DEFAULT_PARAMS.get(kind, ()))
        try:
            params = tuple(int(p) for p in rest.replace("x", ":").split(":"))
        except ValueError:
            params = ()
        if len(params) != len(_DEFAULT_PARAMS.get(kind, ())) or min(params, default=0) < 1:
            raise UnknownFormat(name=text, nearest="", known="bitmap, index, nm:N:M, vnm:V:N:M, block:RxC")
        return cls(kind, params)


@dataclass(frozen=True, order=True)
class Format:
    """A pattern and a value type: a key of VALUE_BITS, and gSIZE where groups of a row share a scale (``int4g128``)."""

    pattern: Pattern
    values: str

    def __str__(self) -> str:
        return f"{self.pattern}+{self.values}"

    @classmethod
    def parse(cls, text: str) -> Format:
        pattern, _, values = text.partition("+")
        values = values or "fp32"
        kind, group = value_kind(values)
        if kind not in VALUE_BITS or (group and kind not in ("int8", "int4")) or group < 0:
            raise UnknownFormat(name=text, nearest=did_you_mean(kind, VALUE_BITS), known=listed(VALUE_BITS))
        return cls(Pattern.parse(pattern), values)


def value_kind(values: str) -> tuple[str, int]:
    """(``int4``, 128) of ``int4g128``; group 0: a whole row shares a scale, or there is none."""
    kind, found, size = values.partition("g")
    return (kind, int(size)) if found and size.isdigit() else (values, 0)


def stored_types(fact: ValueFact, zeros: bool = True) -> tuple[str, ...]:
    """The quantised value types that hold every value of such a weight, smallest first.

    ``zeros``: some are stored, so that they take a level of a book.
    """
    if fact.kind == "ternary" and not fact.group:
        return ("ternary",)
    levels = fact.row_levels or (fact.levels if fact.kind == "codebook" else 0)
    found = tuple(name for name, most in BOOKS.items() if 0 < levels <= most - zeros)
    if fact.kind in ("ternary", "grid"):
        bits, group = max(fact.bits, 2), f"g{fact.group}" if fact.group else ""
        grid = (f"int4{group}",) if bits <= 4 else (f"int8{group}",)
        smaller = tuple(name for name in found if VALUE_BITS[name] < VALUE_BITS[grid[0].partition("g")[0]])
        return (*smaller[:1], *(grid if fact.exact else ()))
    return tuple(dict.fromkeys((*found[:1], *found[-1:])))  # the one for 16 levels too: GPUs have no other


DENSE = Pattern("dense")


def stored_values(pattern: Pattern, fact: WeightFact) -> int:
    """How many values a format keeps of a weight: its non-zeros, and the zeros that pad N:M groups and blocks.

    Raises KeyError for a block shape that the weight was not profiled for.
    """
    if pattern.kind in ("dense", "panel"):
        return fact.n * fact.k
    if pattern.kind == "nm" and not _few(pattern):
        n, m = pattern.params
        return fact.n * -(-fact.k // m) * n
    if pattern.kind == "vnm":
        _, n, m = pattern.params
        return fact.n * -(-fact.k // m) * n
    if pattern.kind == "block":
        found = fact.block_fact(*pattern.params)
        if found is None:
            raise KeyError(f"{pattern} is not a fact of this weight")
        return found.nonzero * found.rows * found.cols
    return fact.nnz


def storage_bytes(format: Format, fact: WeightFact, outliers: int = 0) -> int:
    """Bytes of weight that a kernel of ``format`` on x as it is reads per call; the packers keep to it within a tenth.

    ``outliers``: values beside the codes, as coded packs can hold them. Raises KeyError as ``stored_values``.
    """
    kind, group = value_kind(format.values)
    if kind in VALUE_BYTES:
        return round(_body_bytes(format.pattern, VALUE_BYTES[kind], fact))
    layout = Pattern("bitmap") if _few(format.pattern) and not _slices_hold(kind, group) else format.pattern
    body = _body_bytes(layout, VALUE_BITS[kind] / 8, fact, kept=stored_values(format.pattern, fact), coded=True)
    return round(body) + _meaning_bytes(kind, group, fact) + _outlier_bytes(outliers, fact)


def _few(pattern: Pattern) -> bool:
    """N:M that keeps so little that columns are stored instead of bits."""
    return pattern.kind == "nm" and 6 * pattern.params[0] <= pattern.params[1]


def _slices_hold(kind: str, group: int) -> bool:
    """Whether values can lie in slices, which have no tables and one scale for 128 columns."""
    return kind not in BOOKS and group in (0, SLICE)


def _body_bytes(
    pattern: Pattern, width: float, fact: WeightFact, kept: int | None = None, coded: bool = False
) -> float:
    """Positions and values of ``width`` bytes. Codes begin anew with a byte in every word, run or step."""
    kept = stored_values(pattern, fact) if kept is None else kept
    unused = {0.5: 0.25, 0.25: 0.375, 0.375: 0.4375}.get(width, 0.0)  # of a last byte, on average
    rows, columns = -(-fact.n // 16) * 16, -(-fact.k // SLICE) * SLICE
    if pattern.kind in ("dense", "panel"):
        return (rows * columns if coded else kept) * width
    if pattern.kind == "bitmap" or (pattern.kind == "nm" and not _few(pattern)):
        words = rows * -(-fact.k // 32)
        return kept * width + words * (4 + unused)
    if pattern.kind == "block" and pattern.params[0] % 2 and pattern.params[1] % 16 == 0:
        return kept * width + kept // 16 * 4 + 8 * fact.n
    height, cols = pattern.params if pattern.kind == "block" else (1, 1)
    return _sliced_bytes(kept, math.gcd(height, 16), width, fact, whole_pairs=cols % 2 == 0, unused=unused)


def _meaning_bytes(kind: str, group: int, fact: WeightFact) -> int:
    """Scales and zero points of each group, or the 16 levels of each row."""
    rows = -(-fact.n // 16) * 16
    if kind in BOOKS:
        return rows * TABLE * 4
    groups = -(-fact.k // SLICE) * max(SLICE // group, 1) if group else 1
    return rows * groups * (4 + (VALUE_BITS[kind] == 4))


def _outlier_bytes(count: int, fact: WeightFact) -> int:
    position = 2 if fact.k <= 2**16 else 4
    return 4 * (-(-fact.n // 16) * 16 + 1) + count * (position + VALUE_BYTES.get(fact.dtype, 4))


def _sliced_bytes(kept: int, share: int, width: float, fact: WeightFact, whole_pairs: bool, unused: float) -> float:
    """Slices of 16 rows x 128 columns with one byte a column, which ``share`` rows have in common.

    A slice also holds a byte for each step of its fullest row, and bf16 values come in pairs, the last of a row often
    half empty. How full the fullest of g random rows is: mean plus a known number of deviations. ``unused``: bytes that
    the values of a step leave empty.
    """
    slices = -(-fact.n // 16) * -(-fact.k // SLICE)
    if not slices:
        return 0.0
    per = 2 if width == 2 else 1
    mean = min(kept / (16 * slices), float(SLICE))
    deviations = {1: 1.77, 2: 1.42, 4: 1.03, 8: 0.56, 16: 0.0}[share]
    fullest = min(mean + deviations * math.sqrt(mean * (1 - mean / SLICE)), float(SLICE))
    pairing = 8 * slices * min(mean, 1.0) if per == 2 and not whole_pairs else 0.0
    values = kept + pairing
    return values * (width + 1 / share) + slices * (9 + fullest * (1 / per + unused)) + fact.n
