"""Amber: N:M sparsity of activations while a prompt is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from sparsec.errors import BadRecipe
from sparsec.passes.gates.forms import GroupTopK
from sparsec.passes.gates.layers import matrix, shape_of
from sparsec.passes.masks.pattern import MaskPattern

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock, See


@dataclass(frozen=True)
class Amber:
    """Keep the N largest of each M neighbouring inputs of a token, in prompts.

    The layers of each block that it harms most stay as they are: the ``skip`` share of them with the largest
    ||W (x - x')|| / ||W x||. Source: An et al., "Amber Pruner: Leveraging N:M Activation Sparsity for Efficient Prefill
    in Large Language Models", 2025. Defaults: 8:16, a quarter skipped, prefill only.

    Differs from the paper: its score also weighs inputs by the norm of the weights that they meet.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    source: ClassVar[str] = "An et al., 2025"
    cost: ClassVar[str] = "three forwards"
    phase: ClassVar[str] = "prefill"

    pattern: str = field(default="8:16", metadata={"doc": "N:M, keep N of M inputs"})
    skip: Annotated[float, Field(ge=0, lt=1)] = field(
        default=0.25, metadata={"doc": "share of a block's layers that stay as they are, the most harmed ones"}
    )

    def __post_init__(self) -> None:
        if not self.skip:
            object.__setattr__(self, "needs", ())  # nothing is compared

    @property
    def n_m(self) -> tuple[int, int]:
        """Raises BadRecipe for a pattern of another kind, BadPattern for what is none."""
        found = MaskPattern.parse(self.pattern)
        if found.kind != "nm":
            raise BadRecipe(detail=f"amber keeps N of M activations, and the pattern is {found}; say 8:16 or the like")
        n, m = found.params
        return n, m

    def asks(self, sparsity: float | None) -> float | None:
        """What the pattern means. Raises BadRecipe for another sparsity."""
        n, m = self.n_m
        if sparsity is not None and abs(sparsity - (1.0 - n / m)) > 1e-6:
            raise BadRecipe(
                detail=f"pattern {self.pattern} means sparsity {1.0 - n / m:g}, but sparsity is {sparsity:g}; drop it"
            )
        return 1.0 - n / m

    def gate(self, block: GateBlock) -> None:
        """All but the most sensitive sites, from one run of the dense block."""
        fits = {}
        for name, site in block.sites.items():
            n, m = site.method.n_m
            width = shape_of(site.module)[1]
            if width % m:
                block.leave(name, f"its {width} in-features are not a multiple of {m}")
            else:
                fits[name] = GroupTopK(n, m)
        left = self._sensitive(block, fits)
        for name, gate in fits.items():
            if name in left:
                block.leave(
                    name, f"it is among the {len(left)} of {len(fits)} layers of its block that this harms most"
                )
            else:
                block.put(name, "input", gate, block.sites[name].share)

    def _sensitive(self, block: GateBlock, gates: dict[str, GroupTopK]) -> set[str]:
        count = round(self.skip * len(gates))
        if not count:
            return set()
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in gates}

        def seer(name: str) -> See:
            weight = matrix(block.sites[name].module).float()

            def see(x: torch.Tensor) -> None:
                lost, whole = (
                    nn.functional.linear(v, weight).square().sum() for v in (x - gates[name].zeroed(x, None), x)
                )
                sums[name] += torch.stack([lost, whole]).double().cpu()

            return see

        block.watch({name: seer(name) for name in gates})
        harm = {name: float(lost / whole) if whole else 0.0 for name, (lost, whole) in sums.items()}
        return set(sorted(harm, key=lambda name: (-harm[name], name))[:count])
