"""Quantised values on GPUs: how codes lie in 32-bit words, and how a few bit operations make floats of them.

A word holds 32 / BITS codes (4 int8, 8 int4, 16 ternary). Four words, one 16-byte load, are a chunk of a row:

  word i of the chunk, code j   column = chunk * WIDTH + j / 2 * 8 + i * 2 + j mod 2        WIDTH = 128 / BITS columns

so codes j and j + 1 of the four words are eight neighbours of x: as 16 bits one 16-byte load of four words, whose
halves are widened by one instruction each. Codes are q + ZERO, never negative, and stand where a float's
mantissa ends, so that one "and or" makes code j of a shifted word the float BASE + code, exactly:

  shift t = j / (8 / BITS): w, w << 8, w rotated by 16, w >> 8      bit = 23 - BITS * (1 + j mod (8 / BITS))
  bits(f) = (w_t & (2^BITS - 1) << bit) | bits(2^(23 - bit))        f = 2^(23 - bit) + code

int4 thus takes 8 ands and 3 shifts for 8 weights, where converting integers takes 16 and more. What is too much,
2^(23 - bit) + ZERO (24 and 264 for int4), does not depend on the row, so a sum over x takes it off once for all rows:
sum x q = sum x f - sum x (base + zero). The larger base costs 2^-16 of each product beside the 2^-9 of bf16.
(Marlin, Frantar et al., 2024, decodes in fp16 by the same trick of Kim et al., 2022.)

``codebook`` has 4-bit indices, code j at bit 4 j, into 16 levels a row, which are read through the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind
from sparsec.grid import OnGrid, on_grid

BITS = {"int8": 8, "int4": 4, "ternary": 2, "codebook": 4}
ZERO = {"int8": 128, "int4": 8, "ternary": 2, "codebook": 0}
LEVELS = 16


@triton.jit
def code(word, full, J: tl.constexpr, BITS: tl.constexpr):
    """Code ``J`` of int32 words as the fp32 number ``base + code``.

    ``full``: 2^BITS - 1, as an argument of the kernel: a mask that ptxas knew would be made anew before each use.
    """
    SHIFT: tl.constexpr = J // (8 // BITS)
    BIT: tl.constexpr = 23 - BITS * (1 + J % (8 // BITS))
    if SHIFT == 1:
        word = word << 8
    if SHIFT == 2:
        word = (word << 16) | ((word >> 16) & 0xFFFF)
    if SHIFT == 3:
        word = word >> 8
    MAGIC: tl.constexpr = (150 - BIT) << 23
    return ((word & (full << BIT)) | MAGIC).to(tl.float32, bitcast=True)


@triton.jit
def excess(J: tl.constexpr, BITS: tl.constexpr):
    """What ``code`` is above q: its base and the code of zero."""
    BIT: tl.constexpr = 23 - BITS * (1 + J % (8 // BITS))
    return float((1 << (23 - BIT)) + (1 << (BITS - 1)))


@triton.jit
def scaled(number, scale, above, EXACT: tl.constexpr):
    """(number - above) * scale; as one fma unless ``EXACT``, where a scale of 16 bits leaves nothing to round."""
    if EXACT:
        return (number - above) * scale
    else:
        return number * scale - scale * above


@triton.jit
def neighbours(X, word, limit, HALVES: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr):
    """x at columns 2 ``word`` and 2 ``word`` + 1 in fp32; 0 from column ``limit`` on, unless EVEN says all are below.

    ``X``: of a row of x; HALVES: it points to int32 words of two 16-bit floats, bf16 or fp16.
    """
    if HALVES:
        if EVEN:
            both = tl.load(X + word)
        else:
            both = tl.load(X + word, mask=word < limit // 2, other=0)
        if BF16:
            return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
        low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    first = tl.load(X + word * 2, mask=word * 2 < limit, other=0.0).to(tl.float32)
    return first, tl.load(X + word * 2 + 1, mask=word * 2 + 1 < limit, other=0.0).to(tl.float32)


def halves(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] of 16-bit floats as int32 words [M, K / 2], the same memory; x itself where that cannot be."""
    even = x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0
    return x.view(torch.int32) if x.element_size() == 2 and even else x


@triton.jit
def level(word, TABLE, J: tl.constexpr):
    """Level ``J`` of int32 words in fp32. ``TABLE``: pointers to 16 levels, of a shape that broadcasts to the words."""
    return tl.load(TABLE + ((word >> (4 * J)) & 15)).to(tl.float32)


def bit_of(kind: str, j: int) -> int:
    """The lowest bit in a word, of 32, that code ``j`` has; it may wrap around."""
    if kind == "codebook":
        return 4 * j
    bits = BITS[kind]
    bit = 23 - bits * (1 + j % (8 // bits))
    return (bit + (0, -8, 16, 8)[j // (8 // bits)]) % 32


def width(kind: str) -> int:
    """Columns of a chunk."""
    return 128 // BITS[kind]


def to_words(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes [N, K], any integer dtype and K a multiple of ``width``, as int32 words [N, K / width, 4]."""
    each = 32 // BITS[kind]
    parts = codes.to(torch.int64).view(len(codes), codes.shape[1] // width(kind), each // 2, 4, 2)
    words = torch.zeros_like(parts[:, :, 0, :, 0])
    for j in range(each):
        moved = parts[:, :, j // 2, :, j % 2] << bit_of(kind, j)
        words |= (moved | moved >> 32) & 0xFFFFFFFF
    return words.to(torch.int32)


def from_words(words: torch.Tensor, kind: str) -> torch.Tensor:
    """The codes [N, K] back, int64."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    doubled = wide | wide << 32
    mask = (1 << BITS[kind]) - 1
    parts = [(doubled >> bit_of(kind, j)) & mask for j in range(32 // BITS[kind])]
    pairs = [torch.stack(parts[j : j + 2], 3) for j in range(0, len(parts), 2)]
    return torch.stack(pairs, 2).flatten(1)


@dataclass(frozen=True)
class Codes:
    """A weight [N, K] as ``codes`` [N, K] and ``scale`` [N, groups], fp32 or the weight's dtype.

    Codebooks have their levels for a scale, [N, 16]. ``group``: columns of a row that share a scale, 0 for all.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group: int


def encode(weight: torch.Tensor, format: Format) -> Codes:
    """The codes of a weight that lies on the grid of the format's values. Raises PatternMismatch."""
    kind, group = value_kind(format.values)
    if kind == "ternary":
        return _ternary(weight, format)
    if kind == "codebook":
        return _codebook(weight, format)
    bits = BITS[kind]
    grid = on_grid(weight, bits, group)
    if grid is None:
        row = _first_off_grid(weight, bits, group)
        raise PatternMismatch(format=str(format), detail=f"row {row} is on no grid of {bits}-bit steps")
    return Codes(grid.q.to(torch.int16) + ZERO[kind], _narrowed(grid, weight), group)


def decode(found: Codes, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of codes, by plain torch."""
    if kind == "codebook":
        return found.scale.gather(1, found.codes.long())
    q = (found.codes - ZERO[kind]).to(torch.int8)
    return OnGrid(q, found.scale.float(), found.group).weight(dtype)


def _narrowed(grid: OnGrid, weight: torch.Tensor) -> torch.Tensor:
    """Scales in the weight's dtype where they give the same weight; fp32 otherwise."""
    narrow = grid.scale.to(weight.dtype)
    same = torch.equal(OnGrid(grid.q, narrow.float(), grid.group).weight(weight.dtype), weight)
    return narrow if same else grid.scale


def _first_off_grid(weight: torch.Tensor, bits: int, group: int) -> int:
    """The first row that is on no grid, by bisection."""
    low, high = 0, len(weight)  # the first ``high`` rows hold one that is off
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if on_grid(weight[low:middle], bits, group) is None else (middle, high)
    return low


def _ternary(weight: torch.Tensor, format: Format) -> Codes:
    """Rows of -s, 0 and s."""
    scale = weight.abs().amax(1, keepdim=True)
    off = ~((weight == 0) | (weight.abs() == scale)) | ~weight.isfinite()
    if bool(off.any()):
        row, column = off.nonzero()[0].tolist()
        detail = f"row {row} has magnitudes other than {float(scale[row])}, the first in column {column}"
        raise PatternMismatch(format=str(format), detail=detail)
    return Codes(weight.sign().to(torch.int16) + ZERO["ternary"], scale, 0)


def _codebook(weight: torch.Tensor, format: Format) -> Codes:
    """Rows of at most 16 different values, in ascending order; the last one repeats where there are fewer."""
    ordered = weight.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = new.cumsum(1) - 1
    off = (rank[:, -1] >= LEVELS) | ~weight.isfinite().all(1)
    if bool(off.any()):
        row = int(off.nonzero()[0])
        detail = f"row {row} has more than {LEVELS} different values, or one that is not finite"
        raise PatternMismatch(format=str(format), detail=detail)
    levels = ordered[:, -1:].repeat(1, LEVELS)
    levels.scatter_(1, rank, ordered)
    codes = torch.searchsorted(levels.float().contiguous(), weight.float().contiguous())
    return Codes(codes.to(torch.int16), levels, 0)
