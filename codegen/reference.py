"""The meaning of every kernel, in plain PyTorch. Slow and obvious; tests and ``SPARSEC_VERIFY`` compare with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def quantised(x: torch.Tensor, x_scale: float = 0.0) -> torch.Tensor:
    """x [..., K] rounded to int8 and back, in fp32: q * s with q = clamp(round(x / s), -127, 127).

    ``x_scale`` as in ``SparsecCall``: 0: s = max|x| / 127 of each row, 1 where that is zero; positive: s itself;
    negative: as 0, but no s is less than ``-x_scale``. A row that holds a NaN, or an infinity where s comes from it, is
    NaN at every place.
    """
    wide = x.float()
    if not wide.shape[-1]:
        return wide
    if x_scale > 0:
        s = torch.tensor(x_scale, dtype=torch.float32, device=x.device)
    else:
        s = wide.abs().amax(-1, keepdim=True) / 127
        s = s.clamp(min=-x_scale) if x_scale else torch.where(s == 0, 1.0, s)
    whole = (wide / s).round().clamp(-127, 127) * s
    return torch.where(whole.isnan().any(-1, keepdim=True), torch.nan, whole)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "",
    x_scale: float | None = None,
) -> torch.Tensor:
    """act(x @ weight.T + bias), computed in fp32 and rounded once to ``x.dtype``.

    x: [..., K]; weight: [N, K]; bias: [N] or None; act: a name in ``sparsec.codegen.spec.ACTS``. Returns [..., N].
    ``x_scale``: x is ``quantised`` with it first; None: x is taken as it is.
    Kernels skip positions where the weight is zero, so they agree for finite x; a NaN or infinity in x reaches every
    output that keeps a weight at its position.
    """
    wide = x.float() if x_scale is None else quantised(x, x_scale)
    y = wide @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    return ACT[act](y).to(x.dtype)


def active_columns(x: torch.Tensor) -> torch.Tensor:
    """int32 [count], ascending: the columns of x [M, K] that hold something other than zero (a NaN, too)."""
    return (x != 0).any(0).nonzero()[:, 0].to(torch.int32)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "",
    threshold: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """act(where(|x| > threshold, x, 0) @ weight.T + bias), as ``linear``.

    threshold: a number, or one for each channel [K]; None leaves x as it is, for gates of exact zeros.
    """
    return linear(x if threshold is None else torch.where(x.abs() > threshold, x, 0), weight, bias, act)
