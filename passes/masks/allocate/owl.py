"""OWL: blocks with more outliers stay denser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.passes.masks.allocate.contract import Allocation
from sparsec.passes.masks.allocate.spread import importance, shift_to_mean

if TYPE_CHECKING:
    from sparsec.passes.masks.allocate.contract import Dense, Measured, Value


@dataclass(frozen=True)
class OWL:
    """Keep blocks with more outliers in their Wanda scores denser.

    In the dense model, A_l = 100 * the share of the Wanda scores |W_ij| ||X_j||_2 of block l, all its layers together,
    that are greater than M * their mean. Then r_l = 2 lambda (A_l - min A) / (max A - min A) and
    sparsity_l = S - (r_l - mean r): the mean is S, the range exactly 2 lambda.
    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2023, section 3; lambda 0.08 and M 5 as in its
    README (the script's own default is M 3).

    The paper takes blocks of equal size; here both means are weighted by the number of weights. Where a sparsity
    leaves [0.01, 0.99] it is clipped and the others move, so that the mean still holds; the reference code clips and
    lets the mean go. The scaling stretches any A over the whole range, noise too: where max A < flat * min A all get
    S. (It helped two small models with ratios of 3.4 and 4.5 and hurt one of 1.4; ``flat: 1`` always spreads.)
    """

    lam: Annotated[float, Field(ge=0, le=0.5)] = field(
        default=0.08, metadata={"doc": "half the range between the densest and the sparsest block (lambda)"}
    )
    m: Annotated[float, Field(gt=0)] = field(
        default=5.0, metadata={"doc": "a score above m times the mean is an outlier"}
    )
    flat: Annotated[float, Field(ge=1)] = field(
        default=2.0, metadata={"doc": "uniform where the largest outlier ratio is under this times the smallest"}
    )

    role: ClassVar[str] = "allocate"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    keeps: ClassVar[str] = "mean"
    source: ClassVar[str] = "Yin et al., 2023 (OWL)"
    cost: ClassVar[str] = "one pass over the calibration data"

    def measure(self, layers: Sequence[Dense]) -> Value:
        """``outliers``: A_l in percent; 0 for a block whose scores are all zero."""
        scores = [importance("wanda", layer.weight, layer.stats) for layer in layers]
        size = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
        return {"outliers": 100.0 * sum(int((score > self.m * mean).sum()) for score in scores) / size}

    def allocate(self, blocks: Sequence[Measured], sparsity: float) -> Allocation:
        """One sparsity for all layers of a block; their mean weighted by weights is ``sparsity``."""
        outliers = torch.tensor([block.value["outliers"] for block in blocks], dtype=torch.float64)
        least, most = float(outliers.min()), float(outliers.max())
        if most == least or most < self.flat * least:
            why = f"{least:.3g} % to {most:.3g} %, less than {self.flat:g} times apart"
            return Allocation(
                {name: sparsity for block in blocks for name, _ in block.layers},
                (f"owl: the outlier ratios of the blocks are flat ({why}), so every layer gets {sparsity:.4g}",),
            )
        weights = torch.tensor([sum(size for _, size in block.layers) for block in blocks])
        wanted = -2.0 * self.lam * ((outliers - least) / (most - least))
        shares = shift_to_mean(wanted, weights, sparsity).tolist()
        notes = []
        if max(shares) - min(shares) < 2.0 * self.lam - 1e-9:
            notes.append(f"owl: clipped to {min(shares):.3g} to {max(shares):.3g}; the mean is {sparsity:.4g} as asked")
        spread = {name: share for block, share in zip(blocks, shares, strict=True) for name, _ in block.layers}
        return Allocation(spread, tuple(notes))
