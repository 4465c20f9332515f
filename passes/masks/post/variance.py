"""Variance correction: pruned weights are scaled up until their variance is that of the dense ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from sparsec.passes.masks.post.layers import write

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.block import Block

Per = Literal["row", "layer"]


@dataclass(frozen=True)
class Variance:
    """Scale what is left to the variance of the dense weight.

    W' = W^ * sqrt(Var(W) / Var(W^)), Var over all positions, the pruned zeros among them: zeros stay zero and the
    variance is met exactly (up to rounding to the weight's dtype). Source: Maximov et al., "From 2:4 to 8:16 sparsity
    patterns in LLMs for Outliers and Weights with Variance Correction", 2025, arXiv 2507.03052. The paper's text was
    read as one factor a layer; one a row was better wherever we measured both, and is the default here. Rows (or
    layers) without variance, before or after, stay as they are. After methods that update weights (SparseGPT) there is
    less to correct, and more to lose.
    """

    role: ClassVar[str] = "post"
    needs: ClassVar[tuple[str, ...]] = ()
    moves_masks: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    source: ClassVar[str] = "Maximov et al., 2025"
    cost: ClassVar[str] = "seconds"

    per: Per = field(default="row", metadata={"doc": "one factor for each row (out-feature) or one for the layer"})

    def refine(self, block: Block) -> None:
        """Scale every masked layer."""
        for layer in block.layers:
            if layer.keep is not None:
                write(layer, corrected(layer.weight, layer.dense, self.per))


def corrected(weight: torch.Tensor, dense: torch.Tensor, per: Per = "row") -> torch.Tensor:
    """``weight`` [N, K], scaled by row or as a whole to the variance of ``dense`` [N, K]; float64."""
    over = (1,) if per == "row" else (0, 1)
    wide = weight.double()
    factor = (dense.double().var(over, correction=0, keepdim=True) / wide.var(over, correction=0, keepdim=True)).sqrt()
    usable = factor.isfinite() & (factor > 0)
    return wide * factor.masked_fill(~usable, 1.0)
