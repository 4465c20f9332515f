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
