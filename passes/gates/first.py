"""First activations: a request's neurons are those that its first tokens used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.neurons import FirstNeurons
from sparsec.passes.gates.thresholds import UNREACHED

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.mlps import Mlp


@dataclass(frozen=True)
class FirstActivations:
    """Keep the neurons that the first tokens of a request activate, and skip the others in all later tokens.

    A neuron stays where its root mean square over those tokens is above the layer's threshold, calibrated so that
    the sets of calibration sequences leave out the sparsity on average; how many go differs from request to request.
    Source: Ma et al., "First Activations Matter: Training-Free Methods for Dynamic Activation in Large Language
    Models", 2024, section 4. Default: the first 32 tokens.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons",)
    source: ClassVar[str] = "Ma et al., 2024"
    cost: ClassVar[str] = "two forwards"

    first: Annotated[int, Field(ge=0)] = field(
        default=32, metadata={"doc": "tokens of a request that decide; 0: the whole prompt"}
    )

    def gate(self, block: GateBlock) -> None:
        """A neuron set before the reader of every MLP."""
        for mlp in block.mlps:
            self._mlp(block, mlp)

    def _mlp(self, block: GateBlock, mlp: Mlp) -> None:
        site = block.sites[mlp.reader]
        first = site.method.first
        seen = Histogram()

        def see(p: torch.Tensor) -> None:
            seen.add((p[:, :first] if first else p).square().mean(-2).sqrt())

        block.watch_sequences(mlp.reader, see)
        if not seen.count:
            block.leave(mlp.reader, UNREACHED)
            return
        gate = FirstNeurons(mlp.neurons, first)
        gate.threshold.fill_(seen.within(site.share))
        block.put(mlp.reader, "input", gate, site.share)
