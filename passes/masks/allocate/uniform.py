"""Uniform: every layer is as sparse as the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsec.passes.masks.allocate.contract import Allocation

if TYPE_CHECKING:
    from sparsec.passes.masks.allocate.contract import Dense, Measured, Value


@dataclass(frozen=True)
class Uniform:
    """Give every layer the same sparsity.

    What happens without an allocator; a baseline to name in a recipe. Source: none.
    """

    role: ClassVar[str] = "allocate"
    needs: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[str] = "mean"
    source: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "nothing"

    def measure(self, layers: Sequence[Dense]) -> Value:
        """Nothing."""
        return {}

    def allocate(self, blocks: Sequence[Measured], sparsity: float) -> Allocation:
        """``sparsity`` for all."""
        return Allocation({name: sparsity for block in blocks for name, _ in block.layers})
