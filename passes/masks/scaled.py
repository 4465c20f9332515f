"""Gradients through float16 models: what a loss is multiplied by before its backward pass, and divided by after it.

The gradient of one output is about 1 / outputs of the loss, and float16 knows nothing below 6e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

_LEAST = 10  # 2^10: enough for losses of a few million outputs
_STEP = 64.0


def loss_scale(weights: Iterable[torch.Tensor], outputs: int = 1) -> float:
    """A power of two, so that it changes no bit: 1 unless some of ``weights`` are float16, else at least 1024.

    ``outputs``: numbers that a mean in the loss runs over. From a million on, the scale grows with them.
    """
    if all(weight.dtype != torch.float16 for weight in weights):
        return 1.0
    return float(1 << max(_LEAST, outputs.bit_length() - 1 - _LEAST))


def scaled_gradients(
    loss: Callable[[], torch.Tensor], wanted: Sequence[torch.Tensor], scale: float
) -> tuple[list[torch.Tensor | None], float]:
    """The gradients of a scale times ``loss()`` with respect to ``wanted`` (None where it does not depend), and the
    scale: divide by it in fp32. It is ``scale`` unless gradients overflow; then it is smaller, down to 1."""
    while True:
        value = loss()
        if not value.requires_grad:  # nothing wanted took part: experts that no token reached
            return [None for _ in wanted], 1.0
        found = torch.autograd.grad(value * scale, list(wanted), allow_unused=True)
        if scale == 1.0 or all(g is None or bool(g.isfinite().all()) for g in found):
            return list(found), scale
        scale = max(1.0, scale / _STEP)
