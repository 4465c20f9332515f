"""What happens after the products: partial sums added in a fixed order, bias, one activation, one rounding.

Split-K writes fp32 partial sums [splits, M, N]; ``reduce`` adds them in the order of the splits, so a result does not
depend on which program ran first. With one split kernels finish their own sums by the same functions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton.launch import Launch

BLOCK = 1024


@triton.jit
def activate(y, ACT: tl.constexpr):
    """``ACT``: the position in ``spec.ACTS``. fp32 in and out."""
    if ACT == 1:
        y = tl.where(y < 0, 0.0, y)  # not maximum: NaN has to stay NaN
    if ACT == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACT == 3:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh z) = sigmoid(2 z)
    if ACT == 4:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def finish(y, BIAS, column, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, mask=None):
    """Bias of output ``column`` and the activation; ``y`` fp32 of the same shape as ``column``."""
    if HAS_BIAS:
        y += tl.load(BIAS + column, mask=mask, other=0.0).to(tl.float32)
    return activate(y, ACT)


@triton.jit
def reduce(
    PARTIAL, Y, BIAS, m, n, stride,
    SPLITS: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < m * n
    y = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        y += tl.load(PARTIAL + tl.cast(s, tl.int64) * m * n + i, mask=mask, other=0.0)
    row, column = i // n, i % n
    y = finish(y, BIAS, column, ACT, HAS_BIAS, mask)
    tl.store(Y + tl.cast(row, tl.int64) * stride + column, y.to(Y.dtype.element_ty), mask=mask)


def reduction(partial: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, act: str) -> Launch:
    """The launch that ends a split-K product. partial: fp32 [splits, M, N]; y: [M, N], unit inner stride."""
    splits, m, n = partial.shape
    return Launch(
        reduce,
        (triton.cdiv(m * n, BLOCK),),
        {"PARTIAL": partial, "Y": y, "BIAS": y if bias is None else bias, "m": m, "n": n, "stride": y.stride(0)},
        {"SPLITS": splits, "ACT": ACTS.index(act), "HAS_BIAS": bias is not None, "BLOCK": BLOCK},
    )
