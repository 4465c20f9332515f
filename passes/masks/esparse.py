"""E-Sparse: inputs count by how much they say, and by how large they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.masks.norms import column_norm, finite

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class ESparse:
    """Keep weights on inputs of high entropy and large norm.

    Score |W_ij| (H_j + alpha ||X_j||): H_j is the entropy (nats) of in-feature j's histogram over the calibration
    tokens (256 bins over a range of at most four times its largest magnitude), ||X_j|| its l2 norm over all of them.
    Source: Li et al., "E-Sparse: Boosting the Large Language Model Inference through Entropy-based N:M Sparsity",
    2023. No code was published; number of bins and alpha = 1 are ours. The norm grows with the square root of the
    tokens T and the entropy does not: with much data the score is near Wanda's, and ``alpha: 1/sqrt(T)`` weighs the
    entropy against the root mean square instead. The paper's channel shuffles are a step of their own.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2", "entropy")
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Li et al., 2023"
    cost: ClassVar[str] = "one forward"

    alpha: Annotated[float, Field(ge=0)] = field(default=1.0, metadata={"doc": "weight of the norm"})

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """|W_ij| (H_j + alpha ||X_j||), [N, K] fp32."""
        return weight.abs() * (finite(stats, "entropy") + self.alpha * column_norm(stats))
