"""CoreInfer: a request's neurons are those that its prompt used most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.passes.gates.neurons import CoreNeurons

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock


@dataclass(frozen=True)
class CoreInfer:
    """Choose the neurons of a request from its prompt, and skip all others while it is answered.

    A token's core neurons are the ``token`` share with the largest activations; the request's are the 1 - sparsity
    share that is core in most tokens of the prompt. The prompt runs dense. Source: Wang et al., "CoreInfer:
    Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation", 2024, section 3.
    Default: 0.4 of a token's neurons, as in the paper; requests keep 1 - sparsity, there 0.2.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons",)
    source: ClassVar[str] = "Wang et al., 2024"
    cost: ClassVar[str] = "one forward"

    token: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.4, metadata={"doc": "share of the neurons that are core in one token"}
    )

    def gate(self, block: GateBlock) -> None:
        """A neuron set before the reader of every MLP."""
        for mlp in block.mlps:
            site = block.sites[mlp.reader]
            kept = max(1, round(mlp.neurons * (1.0 - site.share)))
            each = max(1, round(mlp.neurons * site.method.token))
            block.put(mlp.reader, "input", CoreNeurons(mlp.neurons, kept, each), site.share)
