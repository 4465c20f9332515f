"""A sidecar of outliers beside a dense quantised weight: W = main + outliers, which share no position.

  begin[N + 1] int32     first outlier of each row
  column[O] int16        unsigned, ascending within a row; value[O] in the weight's dtype

4 bytes an outlier. ``gemv`` adds them in the same pass: lanes take a row's outliers while its words are in flight, one
load of each stream and one of x. ``mma`` has them in a launch of their own, as one more partial sum to reduce.

SpQR (Dettmers et al., 2023) and SqueezeLLM (Kim et al., 2023, "dense-and-sparse") keep 0.05 to 1 % of weights so; the
latter runs a second kernel with atomic additions, which costs a launch and makes sums depend on who comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import Launch
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

LANES = 32


@triton.jit
def row_sums(
    X, BEGIN, COLUMN, VALUE, row, m, stride_x, lane,
    M: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, split,
):  # fmt: skip
    """Products of one row's outliers with M rows of x: a tuple of M tensors shaped like ``lane``, still to be summed.

    ``lane``: 0 to T - 1. ``X``: to x in its own dtype.
    """
    end = tl.load(BEGIN + row + 1)
    sums = (tl.zeros(lane.shape, tl.float32),) * M
    for at in tl.range(tl.load(BEGIN + row) + split * T, end, SPLITS * T):
        inside = lane < end - at
        column = tl.load(COLUMN + at + lane, mask=inside, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(VALUE + at + lane, mask=inside, other=0.0).to(tl.float32)
        more = sums[:0]
        for s in tl.static_range(M):
            x = tl.load(X + tl.minimum(s, m - 1) * stride_x + column, mask=inside, other=0.0)
            more = more + (sums[s] + value * x.to(tl.float32),)
        sums = more
    return sums


@triton.jit
def partial(X, BEGIN, COLUMN, VALUE, OUT, m, n, stride_x, TM: tl.constexpr, LANES: tl.constexpr):
    """OUT[m, n] fp32: the outliers' sums. A program has one row of the weight and TM rows of x."""
    row = tl.program_id(1) * TM + tl.arange(0, TM)
    x_row = X + tl.cast(tl.minimum(row, m - 1), tl.int64)[:, None] * stride_x
    lane = tl.arange(0, LANES)
    acc = tl.zeros((TM, LANES), tl.float32)
    end = tl.load(BEGIN + tl.program_id(0) + 1)
    for at in tl.range(tl.load(BEGIN + tl.program_id(0)), end, LANES):
        inside = lane < end - at
        column = tl.load(COLUMN + at + lane, mask=inside, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(VALUE + at + lane, mask=inside, other=0.0).to(tl.float32)
        acc += value[None, :] * tl.load(x_row + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    tl.store(OUT + tl.cast(row, tl.int64) * n + tl.program_id(0), tl.sum(acc, 1), mask=row < m)


def partial_sums(stream: tuple[torch.Tensor, ...], call: Call, out: torch.Tensor) -> Launch:
    """The launch that fills ``out``, fp32 [M, N], with the outliers' sums."""
    m, n = out.shape
    begin, column, value = stream
    args = {
        "X": call.x, "BEGIN": begin, "COLUMN": column, "VALUE": value, "OUT": out,
        "m": m, "n": n, "stride_x": call.x.stride(0),
    }  # fmt: skip
    rows = min(16, triton.next_power_of_2(m))
    return Launch(partial, (n, triton.cdiv(m, rows)), args, {"TM": rows, "LANES": LANES}, warps=1)


def pack_with_outliers(main: torch.Tensor, outliers: torch.Tensor, format: Format, source_key: str) -> Packed:
    """Pack main + outliers, both [N, K] of one dtype: ``main`` on the grid of a dense format, ``outliers`` mostly zero.

    The pack is proven: unpacking gives main + outliers. Raises PatternMismatch where both have a value at one place,
    where ``main`` is not ``format``, or for more than 65536 columns.
    """
    from sparsec.codegen.triton import pack_verified

    both = (main != 0) & (outliers != 0)
    if bool(both.any()):
        row, at = both.nonzero()[0].tolist()
        detail = f"row {row}, column {at} is in the main part and in the outliers"
        raise PatternMismatch(format=str(format), detail=detail)
    if main.shape[1] > 2**16 or outliers.dtype != main.dtype or not bool(outliers.isfinite().all()):
        detail = "outliers need at most 65536 columns, the dtype of the main part and finite values"
        raise PatternMismatch(format=str(format), detail=detail)
    packed = pack_verified(main, format, source_key)
    found, column = outliers.nonzero().unbind(1)
    counts = torch.bincount(found, minlength=len(main))
    begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    stream = (begin, column.to(torch.int16), outliers[found, column].contiguous())
    return Packed(format, packed.version, (*packed.tensors, *stream), packed.work, packed.shape, source_key)


def unpacked(stream: tuple[torch.Tensor, ...], like: torch.Tensor) -> torch.Tensor:
    """The outliers as a dense matrix shaped like ``like``, by plain torch."""
    begin, column, value = stream
    out = torch.zeros_like(like)
    row = torch.repeat_interleave(torch.arange(len(out), device=out.device), (begin[1:] - begin[:-1]).long())
    out[row, column.long() & 0xFFFF] = value
    return out
