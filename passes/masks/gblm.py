"""GBLM-Pruner: Wanda with the gradient of the model's loss added to the activation norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.masks.norms import column_norm, finite

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class GBLM:
    """Keep weights that are large where input or loss gradient is.

    Score |W_ij| (||X_j|| + G_ij), G_ij = sqrt(sum over samples of (scale g_ij)^2) with scale = 100; g is the gradient
    of one sample's mean next-token loss in the dense model, ||X_j|| the l2 norm over all tokens. Source: Das et al.,
    "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023, equation 6 (the l2 variant).
    Reference code divides the norm, and not G, by the square root of the number S of samples: ``scale: 100 sqrt(S)``
    gives its balance. The paper's alpha = 100 is its argument ``scale``.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2", "grad2")
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Das et al., 2023"
    cost: ClassVar[str] = "a forward, and a backward of the whole model"

    scale: Annotated[float, Field(ge=0)] = field(default=100.0, metadata={"doc": "weight of the gradient term"})

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """|W_ij| (||X_j|| + scale sqrt(sum g_ij^2)), [N, K] fp32."""
        return weight.abs() * (column_norm(stats) + self.scale * finite(stats, "grad2").sqrt())
