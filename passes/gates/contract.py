"""What a gate method is: a frozen dataclass that decides which activations of a block become zero at run time.

In: one block of the model with its calibration data (``GateBlock``), upstream of which everything is gated already.
Out: gates (``forms.py``, ``neurons.py``, ``predictor.py``) put where they act. No weight changes, but for the bias that
a shift of the mode is folded into. What is written into the model is plain PyTorch, in one of these forms, which the
compiler recognises whoever wrote them:

  threshold   x = where(|x| > t, x, 0)                      before a linear, or after the activation of a gated MLP
  mode        x = where(|x - c| > t, x - c, 0)              before a linear whose bias is b + W c
  top-k       x = zeros.scatter(idx, x.gather(idx)), idx of topk(|x|)
  N:M         the same within groups of M
  predictor   y = where(mask(x), W x, 0)                    after the linear that the activation reads
  neurons     x = where(neurons, x, 0)                      before the linear that reads neurons; one set a request

A method is one file and one line in ``sparsec.passes.masks.METHODS``, with ``role = "gate"``. Its fields are keys of
the recipe. Its class says ``needs`` (of NEEDS; () where it needs no data), ``source``, ``cost``, and, where it differs,
``whole`` (it is given the model at once, not block by block) and ``phase`` (see ``forms.Gate``). A method whose
sparsity is not simply the recipe's has ``asks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparsec.passes.gates.forms import Gate
    from sparsec.passes.gates.mlps import Mlp

NEEDS: Mapping[str, str] = {
    "inputs": "what layers read",
    "neurons": "what the MLPs compute between their linears",
    "gradient": "a loss and its gradient, so labels or a model that predicts tokens",
}
# Before a linear; after one; after the activation of an MLP.
Place: TypeAlias = Literal["input", "output", "activation"]
PLACES: tuple[Place, ...] = ("input", "output", "activation")
Side: TypeAlias = Literal["in", "out"]
See: TypeAlias = "Callable[[torch.Tensor], None]"


@dataclass(frozen=True, eq=False)
class Site:
    """One layer that the step means. ``method``: with this layer's overrides. ``sparsity``: None where the method
    decides it."""

    name: str
    module: nn.Module
    sparsity: float | None
    method: Any

    @property
    def share(self) -> float:
        return 0.0 if self.sparsity is None else self.sparsity


class GateBlock(Protocol):
    """One block and its calibration data. Names are those of the model.

    ``sites``: the layers that the step means. ``mlps``: those whose reader is among them. ``queries_and_outputs``: the
    sites that are the first and the last linear of an attention.
    """

    name: str
    module: nn.Module
    seed: int
    sites: Mapping[str, Site]
    mlps: Sequence[Mlp]
    queries_and_outputs: frozenset[str]

    def module_of(self, name: str) -> nn.Module:
        """Any module of the model."""
        ...

    def groups(self) -> list[list[str]]:
        """The sites in the order in which they run, those that read one input together."""
        ...

    def watch(self, see: Mapping[str, See], side: Side = "in") -> None:
        """Run the block over its data with the gates it has by now, and show what these modules read or give, as fp32
        [tokens, K] without padding, batch by batch. Raises NonFinite where that is no number."""
        ...

    def watch_sequences(self, name: str, see: See) -> None:
        """Show what one module reads as fp32 [batch, tokens, K], padding and all. Raises NonFinite as well."""
        ...

    def outputs(self) -> Iterator[torch.Tensor]:
        """What the block gives now, batch by batch."""
        ...

    def put(self, name: str, place: Place, gate: Gate, asked: float | None, notes: Sequence[str] = ()) -> None:
        """Put a gate in; a row of the report. ``asked``: the share of zeros that it should give."""
        ...

    def leave(self, name: str, why: str) -> None:
        """A row of the report that says why nothing was put there."""
        ...

    def losses(self) -> Iterator[torch.Tensor]:
        """The loss of each calibration sequence, with the graph behind it. Raises NoLoss. Of ``whole`` methods only."""
        ...

    def keeping(self, names: Sequence[str], read: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, ``read`` holds what these modules read last, with the graph behind it."""
        ...


def maskable(block: GateBlock) -> Iterator[Mlp]:
    """The MLPs of a block in which what is zero before the activation is zero for the reader; for the others a row that
    says so."""
    for mlp in block.mlps:
        if mlp.maskable:
            yield mlp
        else:
            block.leave(
                mlp.writers[0], "zeroing what its activation reads gives no zero neuron, so none can be skipped"
            )


class Gates(Protocol):
    role: ClassVar[str]  # "gate"
    needs: ClassVar[tuple[str, ...]]
    source: ClassVar[str]
    cost: ClassVar[str]

    def gate(self, block: GateBlock) -> None:
        """Put gates into one block."""
        ...
