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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, act: str = "") -> torch.Tensor:
    """act(x @ weight.T + bias), computed in fp32 and rounded once to ``x.dtype``.

    x: [..., K]; weight: [N, K]; bias: [N] or None; act: a name in ``sparsec.codegen.spec.ACTS``. Returns [..., N].
    Kernels skip positions where the weight is zero, so they agree for finite x; a NaN or infinity in x reaches every
    output that keeps a weight at its position.
    """
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    return ACT[act](y).to(x.dtype)


def rounded(x: torch.Tensor, scale: float = 0.0) -> torch.Tensor:
    """x as int8 says it, back in fp32: q s with q = round(x / s), to nearest even, between -127 and 127.

    s is ``scale``, or where that is 0 the largest magnitude of each row (the last dimension) over 127, and 1 where that
    is 0. A row that holds a NaN, or without ``scale`` an infinity, becomes NaN at every place.
    """
    wide = x.float()
    if not wide.shape[-1]:
        return wide
    s = torch.full_like(wide[..., :1], scale) if scale else wide.abs().amax(-1, keepdim=True) / 127
    s = torch.where(s == 0, 1, s)
    whole = (wide / s).round().clamp(-127, 127) * s
    return torch.where(whole.isnan().any(-1, keepdim=True), torch.nan, whole)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, act: str = "", scale: float = 0.0
) -> torch.Tensor:
    """``linear`` of ``rounded`` activations, rounded once to ``x.dtype``: what integer kernels compute."""
    wide = linear(rounded(x, scale), weight, None if bias is None else bias.float(), act)
    return wide.to(x.dtype)


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
