"""Wanda: weights times the norm of what they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsec.passes.masks.norms import column_norm

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class Wanda:
    """Keep weights that are large where their input is: score |W_ij| ||X_j||.

    ||X_j|| is the l2 norm of in-feature j over all calibration tokens; weights of one output row compete, and every
    row loses exactly the same number. No update. Source: Sun et al., "A Simple and Effective Pruning Approach for
    Large Language Models", 2023, equation 1. Reference code divides the squared norm by the number of sequences,
    which changes no mask.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Sun et al., 2023"
    cost: ClassVar[str] = "one forward"

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """|W_ij| ||X_j||, [N, K] fp32."""
        return weight.abs() * column_norm(stats)


@dataclass(frozen=True)
class WandaAlpha:
    """Wanda's variant: every row may lose the same share of its total score.

    With s = |W_ij| ||X_j||, a row prunes its lowest scores as long as their sum is at most alpha times the row's total,
    with the one alpha that meets the layer's quota. A weight goes exactly if the share of the row's total that lies in
    it and in all below it is at most alpha: that share is the score here, compared over the layer, and the quota finds
    alpha. Rows lose different numbers. Source: Sun et al., 2023, appendix; ``use_variant`` of the reference code, which
    bisects alpha in [0, 0.8] until the sparsity is within 0.001; here it is exact.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "Sun et al., 2023"
    cost: ClassVar[str] = "one forward"

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """Share of the row's total score that is gone once this weight is, [N, K] fp32 in [0, 1]."""
        score = Wanda().score(weight, stats)
        best_first = score.sort(dim=1, descending=True, stable=True)  # the lower index counts as better, as in select
        gone = best_first.values.double().flip(1).cumsum(1).flip(1)
        share = gone / gone[:, :1].clamp(min=1e-300)  # a row of zeros is 0 / tiny
        return score.scatter(1, best_first.indices, share.float())
