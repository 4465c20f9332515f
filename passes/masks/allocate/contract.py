"""What an allocator is: a frozen dataclass that spreads a sparsity over layers. Their mean stays what was asked.

Its step stands before that of a mask method in the recipe: ``steps: [{method: owl, sparsity: 0.7}, {method: wanda}]``.
It either measures the dense model block by block and then decides (``Measures``), or learns in each block while it is
compressed (``Learns``). Registered in ``sparsec.passes.masks.METHODS`` with ``role = "allocate"``.

One allocator, ``time``, keeps the expected time of the asked sparsity instead of its mean; ``keeps`` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.block import Block
    from sparsec.passes.masks.contract import Statistics

# What an allocator remembers of a block, under names of its own choice; floats and lists of floats, so it is JSON.
Value: TypeAlias = "Mapping[str, float | Sequence[float]]"


@dataclass(frozen=True)
class Dense:
    """One layer of the dense model: its weight [N, K] fp32 and the statistics that the allocator needs."""

    name: str
    weight: torch.Tensor
    stats: Statistics


@dataclass(frozen=True)
class Measured:
    """One block after ``measure``: ``layers`` are (name, weights) in order, ``value`` what was measured.

    ``seconds(layer, sparsity)`` gives the expected time of a call of a layer on the target, where the target is known.
    It never rises with sparsity and is at most the dense time, which is that of sparsity 0.
    """

    name: str
    layers: tuple[tuple[str, int], ...]
    value: Value
    seconds: Callable[[str, float], float] | None = None


@dataclass(frozen=True)
class Allocation:
    """``sparsity``: layer name -> the share that goes, in [0, 1). ``notes``: sentences for the report."""

    sparsity: Mapping[str, float]
    notes: tuple[str, ...] = ()


class Allocator(Protocol):
    """The static part; beside it, it is ``Measures`` or ``Learns``. ``keeps`` is "mean" or "time"."""

    role: ClassVar[str]  # "allocate"
    needs: ClassVar[tuple[str, ...]]
    keeps: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]


@runtime_checkable
class Measures(Protocol):
    def measure(self, layers: Sequence[Dense]) -> Value:
        """Numbers about one block of the dense model."""
        ...

    def allocate(self, blocks: Sequence[Measured], sparsity: float) -> Allocation:
        """A sparsity for every layer.

        Where ``keeps`` is "mean", their mean weighted by weights is ``sparsity``. Where it is "time", the seconds of
        all layers together are at most those of ``sparsity`` everywhere, and the mean is whatever that takes.
        """
        ...


@runtime_checkable
class Learns(Protocol):
    def learn(self, block: Block, sparsity: float) -> Mapping[str, float | torch.Tensor]:
        """Layer name -> sparsity, or one for each row [N]; their weighted mean over the block is ``sparsity``.

        Called with dense weights still in place, and leaves them so. A method that gives rows their own says so by an
        option ``per`` that is "row": patterns other than unstructured are then refused.
        """
        ...
