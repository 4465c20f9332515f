"""Rows of x as 8-bit floats with a scale each, for products of e4m3: q = x / scale, scale = max |x| of the row / 448.

One kernel, since torch operations would be five with fp32 copies of x between them. A program has one row: its second
pass finds it in L2. Rows are filled up with zeros to ``ALIGNED`` columns. A NaN stays one; a row with an infinite value
becomes NaN, as the scale would be infinite.

This is lossy: every value keeps four significant bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsec.codegen.triton.launch import Launch
from sparsec.grid import E4M3_MAX

ALIGNED = 16  # columns: rows start on 16 bytes
TINY = 2.0**-117  # the smallest scale: 448 values of it and their products stay normal numbers
_TOP, _TINY = tl.constexpr(E4M3_MAX), tl.constexpr(TINY)


@triton.jit
def rounded(x):
    """fp32 to the nearest e4m3 value, ties to even, for |x| up to 448: what the conversion of a GPU does.

    Triton's interpreter cuts off where a mantissa rounds up to the next power of two, so it is given exact values.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # in steps of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def quantize(X, OUT, SCALE, k, width, stride_x, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    row = tl.program_id(0)
    from_row = X + tl.cast(row, tl.int64) * stride_x
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, k, BLOCK):
        x = tl.load(from_row + start + at, mask=start + at < k, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), _TOP), _TINY)
    tl.store(SCALE + row, scale)
    for start in tl.range(0, width, BLOCK):
        x = tl.load(from_row + start + at, mask=start + at < k, other=0.0).to(tl.float32)
        q = tl.div_rn(x, scale)
        if ROUND:
            q = rounded(q)
        tl.store(OUT + tl.cast(row, tl.int64) * width + start + at, q.to(tl.float8e4nv), mask=start + at < width)


NATIVE = isinstance(quantize, triton.JITFunction)


def quantized(x: torch.Tensor) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch, q and the scales that it writes. x: [M, K] of unit inner stride, any float dtype.

    q: float8_e4m3fn [M, K up to a multiple of ``ALIGNED``], scale: fp32 [M]. The GPU is of sm_89 or newer.
    """
    m, k = x.shape
    width = -(-k // ALIGNED) * ALIGNED
    q = torch.empty(m, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    args = {"X": x, "OUT": q, "SCALE": scale, "k": k, "width": width, "stride_x": x.stride(0)}
    block = min(max(triton.next_power_of_2(width), 128), 4096)
    constants = {"BLOCK": block, "ROUND": not NATIVE}
    return Launch(quantize, (m,), args, constants, warps=8 if block > 1024 else 4), q, scale


def by_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``quantize`` gives for finite x by plain torch: its reference. q has the columns of x alone."""
    wide = x.float()
    largest = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    scale = (largest / E4M3_MAX).clamp(min=TINY)
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale
