"""Decoders that the sparse families share: elements of four values, sums for some rows of x, registers into a tile.

An *element* is four values and their positions, and a tensor of elements is one-dimensional. So every load of a loop
has one layout, in which a thread holds neighbouring elements (16 bytes a load), and nothing is converted; a
[rows, lanes, 8] tensor would make Triton move the smaller loads through shared memory.

  bf16, fp16   int64: value j in bits 16 j..          int8   int32: value j + 128 in bits 8 j..
  fp32         two int64 in planes [2, elements]: values 0 and 1, then 2 and 3
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsec.codegen.triton.epilogue import finish
from sparsec.errors import PatternMismatch

KINDS = ("bf16", "fp16", "fp32", "int8")  # kernels get the position in this tuple
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LANE_INSTRUCTIONS = 7.8  # that an H200 issues in the time it reads a byte: 128 lanes a clock, 16.5 bytes a clock
VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}


@triton.jit
def load_values(VALUE, at, mask, plane, VALUES: tl.constexpr):
    """The words of elements ``at``; zeros where ``mask`` is false. ``plane``: elements of a plane, for fp32."""
    if VALUES == 2:
        return (tl.load(VALUE + at, mask=mask, other=0), tl.load(VALUE + plane + at, mask=mask, other=0))
    elif VALUES == 3:
        return (tl.load(VALUE + at, mask=mask, other=-2139062144),)  # four times 128, which is 0
    else:
        return (tl.load(VALUE + at, mask=mask, other=0),)


@triton.jit
def value(words, J: tl.constexpr, VALUES: tl.constexpr):
    """Value ``J`` of each element, fp32."""
    if VALUES == 0:
        half = (words[0] >> (J // 2 * 32)).to(tl.int32)
        half = half << 16 if J % 2 == 0 else half & -65536
        return half.to(tl.float32, bitcast=True)
    elif VALUES == 1:
        return (words[0] >> (16 * J)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif VALUES == 2:
        return (words[J // 2] >> (J % 2 * 32)).to(tl.int32).to(tl.float32, bitcast=True)
    else:  # 2^23 + u has u as its lowest bits: an add where a conversion would take four issue slots
        return (((words[0] >> (8 * J)) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def zeros(M: tl.constexpr, SIZE: tl.constexpr):
    """``M`` accumulators [SIZE], one for each row of x."""
    made = ()
    for _ in tl.static_range(M):
        made = made + (tl.zeros((SIZE,), tl.float32),)  # type: ignore[assignment]
    return made


@triton.jit
def add_rows(sums, place, weight, M: tl.constexpr, STRIDE: tl.constexpr):
    """``weight`` times x of ``M`` rows at ``place`` (pointers into row 0). A constant stride is part of the load."""
    made = ()
    for i in tl.static_range(M):
        made = made + (sums[i] + weight * tl.load(place + i * STRIDE).to(tl.float32),)  # type: ignore[assignment]
    return made


@triton.jit
def write_rows(
    sums, OUT, BIAS, SCALE, column, n, stride_out, split,
    M: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, VALUES: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Reduce each of ``sums`` [ROWS * any] to outputs ``column`` [ROWS], below ``n``, finished or as partial sums."""
    mask = column < n
    for i in tl.static_range(M):
        y = tl.sum(tl.reshape(sums[i], (ROWS, sums[i].shape[0] // ROWS)), 1)
        if VALUES == 3:
            y *= tl.load(SCALE + column, mask=mask, other=0.0)
        if SPLITS == 1:
            y = finish(y, BIAS, column, ACT, HAS_BIAS, mask)
            tl.store(OUT + i * stride_out + column, y.to(OUT.dtype.element_ty), mask=mask)
        else:
            tl.store(OUT + (tl.cast(split, tl.int64) * M + i) * n + column, y, mask=mask)


@triton.jit
def joined(parts, LEFT: tl.constexpr):
    """``LEFT`` tensors [SIZE] as one [SIZE, 2, 2, ..], to be reshaped to [SIZE, LEFT]; a power of two."""
    if LEFT == 1:
        return parts[0]
    else:
        made = ()
        for i in tl.static_range(LEFT // 2):  # the halves first: the first axis is the highest bit
            made = made + (tl.join(parts[i], parts[i + LEFT // 2]),)  # type: ignore[assignment]
        return joined(made, LEFT // 2)


@triton.jit
def parted(whole, LEFT: tl.constexpr):
    """The inverse of ``joined``, of one [SIZE, 2, 2, ..] in a tuple: ``LEFT`` tensors [SIZE]."""
    if LEFT == 1:
        return whole
    else:
        first, second = (), ()
        for i in tl.static_range(len(whole)):
            low, high = tl.split(whole[i])
            first = first + (low,)  # type: ignore[assignment]
            second = second + (high,)  # type: ignore[assignment]
        return parted(first + second, LEFT // 2)


@triton.jit
def load_x(X, column, row, m, k, stride_x, EVEN: tl.constexpr):
    """x transposed, [columns, rows]: zeros beyond ``k`` (``EVEN``: there is no beyond); rows beyond ``m`` repeat."""
    place = X + tl.minimum(row, m - 1).to(tl.int64)[None, :] * stride_x + column[:, None]
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=(column < k)[:, None], other=0.0)


@triton.jit
def write_tile(
    sums, OUT, BIAS, column, row, m, n, stride_out, split,
    WHOLE: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write ``sums`` [columns, rows] as outputs ``column`` of ``row``, finished (WHOLE) or as partial sums."""
    column, row = column[:, None], row.to(tl.int64)[None, :]
    mask = (column < n) & (row < m)
    if WHOLE:
        y = finish(sums, BIAS, column, ACT, HAS_BIAS, column < n)
        tl.store(OUT + row * stride_out + column, y.to(OUT.dtype.element_ty), mask=mask)
    else:
        tl.store(OUT + (tl.cast(split, tl.int64) * m + row) * n + column, sums, mask=mask)


def checked(weight: torch.Tensor, values: str) -> torch.Tensor:
    """The weight, which has to be of the dtype that ``values`` stores. Raises PatternMismatch."""
    if weight.dtype != DTYPES.get(values):
        raise PatternMismatch(format=values, detail=f"the weight is {weight.dtype}")
    return weight


def value_words(of: torch.Tensor) -> torch.Tensor:
    """Values [..., 4 E] as elements: [..., E] int64 of 16-bit values, int32 of int8; [2, ..., E] of fp32."""
    if of.dtype == torch.int8:
        return (of.view(torch.uint8) ^ 128).contiguous().view(torch.int32)
    words = of.contiguous().view(torch.int64)
    if of.dtype != torch.float32:
        return words
    return words.view(*words.shape[:-1], words.shape[-1] // 2, 2).movedim(-1, 0).contiguous()


def values_back(words: torch.Tensor, values: str) -> torch.Tensor:
    """What ``value_words`` was made from; int8 for ``int8``."""
    if values == "int8":
        return (words.view(torch.uint8) ^ 128).view(torch.int8)
    if values == "fp32":
        words = words.movedim(0, -1).contiguous().flatten(-2)
    return words.view(DTYPES[values])
