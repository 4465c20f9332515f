"""SparseInfer: the signs of inputs and weights tell which neurons ReLU will zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.passes.gates.contract import maskable
from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.layers import matrix
from sparsec.passes.gates.predictor import Signs
from sparsec.passes.gates.tally import Tally
from sparsec.passes.gates.thresholds import UNREACHED

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.mlps import Mlp

NOT_RELU = "no neuron of it is exactly zero by itself: signs tell which are small, and zeroing those costs accuracy"


@dataclass(frozen=True)
class SparseInfer:
    """Skip neurons whose weights mostly disagree in sign with the input: ReLU would zero them.

    A neuron goes where N_neg > alpha N_pos, counts of signs of x and of its row of W_gate that differ and agree. No
    training; one bit a weight. Larger alphas skip less. ``sparsity`` finds each layer's alpha from the calibration
    data instead. Source: Shin et al., "SparseInfer: Training-free Prediction of Activation Sparsity for Fast LLM
    Inference", 2024, section 4. Default: alpha 1.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons",)
    source: ClassVar[str] = "Shin et al., 2024"
    cost: ClassVar[str] = "three forwards"

    alpha: Annotated[float, Field(gt=0)] = field(
        default=1.0, metadata={"doc": "signs that differ for each that agrees before a neuron goes"}
    )

    def asks(self, sparsity: float | None) -> float | None:
        """None where alpha decides."""
        return sparsity

    def gate(self, block: GateBlock) -> None:
        """A predictor at the layer that each activation reads."""
        for mlp in maskable(block):
            self._mlp(block, mlp)

    def _mlp(self, block: GateBlock, mlp: Mlp) -> None:
        name = mlp.writers[0]
        site = block.sites[mlp.reader]
        gate = Signs.of(matrix(block.module_of(name)), site.method.alpha)
        ratios, tally = Histogram(), Tally()

        def ratio(x: torch.Tensor) -> None:
            negative = gate.disagreeing(x)
            ratios.add(negative / (gate.reads - negative).clamp(min=0.5))

        block.watch({name: ratio})
        if not ratios.count:
            block.leave(name, UNREACHED)
            return
        if site.sparsity is not None:
            gate.alpha.fill_(ratios.within(1.0 - site.sparsity))
        kept: list[torch.Tensor] = []  # of the batch that is running: the reader runs after what it reads
        block.watch({name: lambda x: kept.append(gate.mask(x)), mlp.reader: lambda p: tally.add(kept.pop(), p != 0)})
        notes = [tally.sentence] if tally.zeros > 0.01 else [NOT_RELU]
        block.put(name, "output", gate, site.sparsity, notes)
