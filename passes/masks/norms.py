"""What scores read from statistics, checked: the norm of each in-feature over the calibration tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec.errors import NonFinite

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


def finite(stats: Statistics, name: str) -> torch.Tensor:
    """The statistic ``name``. Raises NonFinite where it holds NaN or infinity, which would make scores meaningless."""
    value = stats[name]
    if not bool(value.isfinite().all()):
        raise NonFinite(what=f"the statistic {name}", name="a layer", where="")
    return value


def column_norm(stats: Statistics) -> torch.Tensor:
    """||X_j||_2 of each in-feature over all tokens, [K] fp32, from ``sum_x2``.

    All ones where only zeros were seen: the data then says nothing about this layer, any mask is as good on it, and
    scores fall back to the weights alone.
    """
    norm = finite(stats, "sum_x2").sqrt()
    return norm if bool(norm.any()) else norm + 1.0
