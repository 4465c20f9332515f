"""SmoothQuant: outlier channels of x move into the weights, then both are rounded to int8."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from sparsec.passes.quantize.rtn import RTN, Activations
from sparsec.passes.reparam.equalize import Equalize


@dataclass(frozen=True)
class SmoothQuant(RTN):
    """Move outliers of activations into the weights, then round both to int8.

    s_j = max|X_j|^alpha / max_i|W_ij|^(1 - alpha), the second maximum over all layers that read X; x / s is folded into
    the norm before, W * s is rounded as ``rtn`` does, and x, which is what its layer reads then, at run time.
    Source: Xiao et al., "SmoothQuant", 2023, equation 4. Defaults: alpha 0.5, norms only, int8 inputs per token.

    Differs from the paper's code: see ``equalize``, which finds the norms and makes the scales; here they are not
    rounded to powers of two unless ``exact``. Layers that no norm feeds (down, o) keep their inputs as they are and are
    rounded all the same.
    """

    needs: ClassVar[tuple[str, ...]] = ("absmax",)
    source: ClassVar[str] = "Xiao et al., 2023, eq. 4"
    cost: ClassVar[str] = "two passes over the data"

    activations: Activations = field(
        default="int8", metadata={"doc": "inputs at run time: int8 per token, int8-static (calibrated), none"}
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = field(
        default=0.5, metadata={"doc": "0: weights decide alone, 1: activations"}
    )
    exact: bool = field(default=False, metadata={"doc": "round scales to powers of two, which folds without rounding"})
    norms_only: bool = field(default=True, metadata={"doc": "fold into norms only; false: into linear layers too"})

    @property
    def folds(self) -> Equalize:
        """The rewrite that runs before weights are rounded."""
        return Equalize(self.alpha, self.exact, self.norms_only)
