"""SparseGPT: a mask from second-order scores, chosen while the weights that stay make up for those that go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.masks import obs
from sparsec.passes.masks.contract import Pruned, pattern_of

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Choose, Statistics
    from sparsec.passes.masks.pattern import MaskPattern


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column; the columns to come are updated: w^2 / U_jj^2.

    With H = X X^T + damp * mean(diag) * I and U the upper Cholesky factor of H^-1: score w^2 / U_jj^2; each pruned
    weight's error w / U_jj times row j of U is taken from the columns after it. Source: Frantar & Alistarh,
    "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, algorithm 1 and section 3.

    Masks are chosen on weights that earlier columns have already updated: N:M and V:N:M in each group of M columns,
    unstructured and block quotas in each ``blocksize`` columns over all rows. So ``blocksize`` changes an
    unstructured mask, not only the speed; the paper's 128 is too coarse for narrow layers, therefore the default is
    min(128, in-features / 8), in whole groups of the pattern. For N:M and V:N:M it is without effect.

    Where reference code differs: it prunes one weight too many a block, and all ties; it sets the weights of dead
    inputs (always zero in calibration) to zero. Here quotas are exact, counted over all columns so far; a dead input's
    weights have score 0, go first, and keep their values where the quota keeps them.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("xxt",)
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "Frantar & Alistarh, 2023, algorithm 1"
    cost: ClassVar[str] = "minutes: one forward pass and K^3 + N K^2 a layer"

    blocksize: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"doc": "columns that share an unstructured quota; null: min(128, in-features / 8)"}
    )
    damp: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "share of the mean of the Hessian's diagonal that is added to it"}
    )

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """Mask and fp32 values of ``weight`` [N, K]. Raises SingularHessian."""
        factor, dead = obs.inverse_factor(stats["xxt"], self.damp)
        width = self.width(weight.shape[1], pattern_of(choose))
        pruned = obs.prune(weight.masked_fill(dead, 0.0), factor, choose, width=width)
        assert pruned.values is not None
        pruned.values[:, dead] = weight[:, dead].float() * pruned.keep[:, dead]
        return pruned

    def width(self, inputs: int, pattern: MaskPattern) -> int:
        """How many columns ``choose`` is asked for at a time, for a layer of so many in-features."""
        if pattern.sparsity is not None:
            return pattern.group
        asked = self.blocksize or min(128, inputs // 8)
        return max(1, asked // pattern.group) * pattern.group
