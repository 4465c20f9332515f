"""What a structured method is: a frozen dataclass that makes a model smaller, and leaves a plain dense one.

In: the model, its prunable units (``find.py``), calibration batches. Out: the same model with fewer heads, neurons or
a narrower stream, and a ``Structured`` record. Registered in ``sparsec.passes.masks.METHODS``, ``role = "structure"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from sparsec.passes.masks.structure.units import Units

NEEDS: Mapping[str, str] = {
    "units": "the heads and neurons that find_units found",
    "data": "calibration batches",
    "gradient": "a loss and its gradient, so labels or a model that predicts tokens",
}
Data: TypeAlias = Sequence[Mapping[str, Any]]  # one dict of keyword arguments of the model's forward for each batch


class Tick(Protocol):
    """Progress: ``done`` of ``total`` steps, and what is being done."""

    def __call__(self, done: int, total: int, what: str, /) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The ``Tick`` that says nothing."""


@dataclass(frozen=True)
class Row:
    """One attention, FFN or stream: ``kind`` (head, neuron, width), how many there were, and how many there are."""

    name: str
    kind: str
    before: int
    after: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Structured:
    """What was done. ``parameters_*`` are of the whole model, tied ones once.

    ``as_zeros``: what was removed is still there as exact zeros, so the model has its old shape and config.
    ``unsaved``: empty where ``save_pretrained`` writes a checkpoint that ``from_pretrained`` loads; otherwise one
    sentence that says why it does not, and what to do instead.
    """

    rows: tuple[Row, ...]
    parameters_before: int
    parameters_after: int
    sparsity: float  # achieved, in the method's own measure
    as_zeros: bool = False
    unsaved: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A line for each attention, FFN or stream that got smaller, the sum, and notes."""
        kinds = {"head": "heads", "neuron": "neurons", "width": "channels"}
        rows = [f"{row.name}: {row.after} of {row.before} {kinds[row.kind]} left" for row in self.rows]
        before, after = self.parameters_before, self.parameters_after
        zeroed = "; what was removed is there as zeros" if self.as_zeros else ""
        share = f"{1 - after / max(before, 1):.1%}"
        notes = [f"note: {note}" for note in (*self.notes, *([self.unsaved] if self.unsaved else []))]
        return [*rows, f"parameters: {before} before, {after} after, {share} gone{zeroed}", *notes]


class Structural(Protocol):
    """A structured method. ``needs``: names of NEEDS."""

    role: ClassVar[str]  # "structure"
    needs: ClassVar[tuple[str, ...]]
    source: ClassVar[str]
    cost: ClassVar[str]

    def apply(
        self, model: nn.Module, units: Units, forward_data: Data, sparsity: float, seed: int, *, tick: Tick = silent
    ) -> Structured:
        """Make ``model`` smaller in place by ``sparsity`` in [0, 1); the same seed gives the same model.

        Everything that can be wrong is raised (a SparsecError) before the first weight changes.
        """
        ...


def parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
