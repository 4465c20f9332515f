"""RTN: every weight goes to the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from sparsec.passes.quantize.contract import Grid

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Choose, Pruned, Statistics

Activations: TypeAlias = Literal["none", "int8", "int8-static"]


@dataclass(frozen=True)
class RTN:
    """Round weights to the nearest integer times a scale; zeros stay zeros.

    No data, no compensation: the baseline of weight quantisation. Symmetric: scale = max|w| / (2^(bits-1) - 1) over a
    group of in-features, or a whole row. Asymmetric: a whole-number zero point, so that a pruned weight stays exactly
    zero, where fractional ones lose it. Source: Nagel et al., "A White Paper on Neural Network Quantization", 2021,
    section 2. The weights stay floating-point numbers, here in the weight's own dtype. Inputs may be rounded as well,
    at run time, by the layer itself (``inputs.quantized``).
    """

    role: ClassVar[str] = "quantize"
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Nagel et al., 2021"
    cost: ClassVar[str] = "seconds"

    bits: Annotated[int, Field(ge=2, le=8)] = field(default=8, metadata={"doc": "of each weight"})
    group: Annotated[int, Field(ge=0)] = field(
        default=0, metadata={"doc": "in-features that share a scale; 0: a whole row"}
    )
    symmetric: bool = field(default=True, metadata={"doc": "false: each group has a zero point besides its scale"})
    activations: Activations = field(
        default="none", metadata={"doc": "inputs at run time: int8 per token, int8-static (calibrated), none"}
    )

    def __post_init__(self) -> None:
        if self.activations == "int8-static" and not self.needs:
            object.__setattr__(self, "needs", ("absmax",))

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """The nearest grid values of weight [N, K], and the mask of those that are not zero."""
        from sparsec.passes.masks.contract import Pruned

        values = Grid(self.bits, self.group, self.symmetric).nearest(weight)
        return Pruned(values != 0, values)
