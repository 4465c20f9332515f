"""RIA: how much a weight matters to its row and to its column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.masks.norms import column_norm

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class RIA:
    """Keep weights that matter to their row and column: relative importance.

    Score (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a with a = 0.5: shares of the column's (input's) and
    of the row's (output's) total, so that no channel loses all its weights. Source: Zhang et al., "Plug-and-Play: An
    Efficient Post-training Pruning Method for Large Language Models", 2024, equations 2 and 3. Reference code leaves
    the choice between rows and whole layers to a flag; here ``row`` is the default and ``scope`` changes it. Its
    channel permutation is a step of its own.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Zhang et al., 2024"
    cost: ClassVar[str] = "one forward"

    a: Annotated[float, Field(ge=0)] = field(default=0.5, metadata={"doc": "exponent of the activation norm"})

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """Relative importance times activation, [N, K] fp32."""
        size = weight.abs()
        return (_share(size, 0) + _share(size, 1)) * column_norm(stats) ** self.a


def _share(size: torch.Tensor, dim: int) -> torch.Tensor:
    """Each entry over the sum along ``dim``; 0 where all are zero."""
    total = size.sum(dim, keepdim=True)
    return size / total.masked_fill(total == 0, 1.0)
