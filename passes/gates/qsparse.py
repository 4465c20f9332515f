"""Q-Sparse: each token keeps its largest inputs, the same number in every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sparsec.errors import BadRecipe
from sparsec.passes.gates.forms import TopK
from sparsec.passes.gates.layers import shape_of

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock


@dataclass(frozen=True)
class QSparse:
    """Keep the k largest inputs of each token in front of every linear layer.

    x TopK(|x|), k = (1 - sparsity) K, or ``k`` in every layer. Source: Wang et al., "Q-Sparse: All Large Language
    Models can be Fully Sparsely-Activated", 2024, equation 1. This is its inference side: the paper trains with it,
    and rescales by the norm, which a model that was not trained so does not expect.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = "Wang et al., 2024"
    cost: ClassVar[str] = "seconds"

    k: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"doc": "inputs that stay, instead of sparsity"}
    )

    def asks(self, sparsity: float | None) -> float | None:
        """The sparsity of a step; None where k says it."""
        if self.k is not None and sparsity is not None:
            raise BadRecipe(detail="k and sparsity both say how many inputs stay; give one of them")
        return None if self.k is not None else 0.5 if sparsity is None else sparsity

    def gate(self, block: GateBlock) -> None:
        """Raises BadRecipe for a k that is more than a layer reads; ``fits`` finds it before."""
        for name, site in block.sites.items():
            width = shape_of(site.module)[1]
            k = site.method.k or max(1, round(width * (1.0 - site.share)))
            block.put(name, "input", TopK(k), 1.0 - k / width)

    def fits(self, name: str, shape: tuple[int, int]) -> None:
        """Raises BadRecipe where layer ``name`` of shape [N, K] is too narrow."""
        if self.k is not None and self.k > shape[1]:
            raise BadRecipe(detail=f"k is {self.k}, but {name} reads only {shape[1]} features; give a smaller k")
