"""Magnitude: the weights nearest to zero go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest weights: score |W|.

    No data, no update; the baseline of every paper. Source: Han et al., "Learning both Weights and Connections for
    Efficient Neural Networks", 2015, section 3.1; scope ``layer`` is one threshold a layer, ``global`` one for all.
    Reference code prunes ``|W| <= sorted(|W|)[int(numel * sparsity)]``, one weight too many and all ties; here the
    quota is exact.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Han et al., 2015"
    cost: ClassVar[str] = "seconds"

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """|W|, [N, K] in the weight's dtype."""
        return weight.abs()
