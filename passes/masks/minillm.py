"""MINI-LLM's criterion: weight, input and loss gradient in one product, without a backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsec.passes.masks.norms import column_norm, finite

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class MiniLLM:
    """Keep weights by |W| ||X_j|| |g|, the gradient g from forwards only.

    "Feature map sensitivity" |W_ij| ||X_j|| |g_ij| with g the sum over samples of a two-sided SPSA estimate: the loss
    at two opposite random steps of all weights. Its noise falls with the square root of probes times samples and grows
    with that of the number of weights, so for large models a single weight's g is nearly noise; sums over rows or
    blocks (``pattern: block:RxC``) are what it was made for. Source: Cheng et al., "MINI-LLM: Memory-Efficient
    Structured Pruning for Large Language Models", 2024. The paper prunes channels and heads by sums of the score;
    here it is per weight, and blocks add it up.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2", "spsa")
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "Cheng et al., 2024"
    cost: ClassVar[str] = "two forwards a probe and sample"

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """|W_ij| ||X_j|| |g_ij|, [N, K] fp32."""
        return weight.abs() * column_norm(stats) * finite(stats, "spsa").abs()
