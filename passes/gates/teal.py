"""TEAL: whatever is small in front of a linear layer becomes zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.gates.thresholds import gate_inputs

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock


@dataclass(frozen=True)
class TEAL:
    """Zero inputs below a threshold of their layer, the share of which is the sparsity.

    x 1[|x| > t], t the quantile of |x| over the calibration tokens. ``greedy`` lets the layers of a block differ: from
    none on, the layer whose next step adds least to the error of the block's output goes first, until the mean over
    weights is what was asked. Source: Liu et al., "Training-Free Activation Sparsity in Large Language Models", 2024,
    section 4 and algorithm 1. Defaults: uniform; steps of 0.05.

    Differs from the paper's code: t is the quantile of |x| itself, not that of x under the assumption that x is
    symmetric around zero; each layer is calibrated on what the gates before it leave; greedy takes the error over all
    positions, not the last quarter, and tries a layer again only where it was the cheapest so far. Their perplexities
    gate the last half of each window only: ``layers.gated_tokens``.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    source: ClassVar[str] = "Liu et al., 2024"
    cost: ClassVar[str] = "six forwards; greedy: hundreds"

    greedy: bool = field(default=False, metadata={"doc": "let the layers of a block differ, their mean being sparsity"})
    step: Annotated[float, Field(gt=0, le=0.5)] = field(
        default=0.05, metadata={"doc": "greedy: what a layer of mean size gains at once"}
    )

    def gate(self, block: GateBlock) -> None:
        """Thresholds in front of every site."""
        if not self.greedy:
            gate_inputs(block)
            return
        from sparsec.passes.gates.greedy import shares

        gate_inputs(block, shares=shares(block, self.step))
