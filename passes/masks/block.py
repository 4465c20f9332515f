"""One block of a model while it is compressed: what allocators that learn, and post-passes, are given.

A block is one entry of the model's list of layers (a decoder or encoder layer). The executor walks over them in order:
statistics of the block's inputs, then the masks, then the post-passes, then the outputs that the next block gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsec.passes.masks.pattern import MaskPattern

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparsec.passes.masks.contract import Choose, Method, Statistics


@dataclass
class LayerState:
    """One layer of the block. ``weight`` is a view [N, K] of the parameter: writing to it writes the model.

    ``dense``: an fp32 copy of the weight before the step. ``keep``: bool [N, K], the mask, None before it is chosen.
    ``choose``: the recipe's pattern, quota and scope. ``method``: the mask method of the step.
    """

    name: str
    weight: torch.Tensor
    dense: torch.Tensor
    stats: Statistics
    choose: Choose
    method: Method
    sparsity: float
    keep: torch.Tensor | None = None

    @property
    def pattern(self) -> MaskPattern:
        """The pattern that ``choose`` keeps to; unstructured where it has none (a fixed mask)."""
        found = getattr(self.choose, "pattern", None)
        return found if isinstance(found, MaskPattern) else MaskPattern()


@dataclass(frozen=True)
class Batch:
    """What one calibration batch brings into the block: ``hidden`` first, then the block's other arguments."""

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


class Block(Protocol):
    """The block with its layers and its calibration data. Iterating again gives the same batches in the same order.

    ``held``: (layer, "in" or "out") whose features an earlier step of the recipe gave a mask in groups or blocks: they
    may be scaled, and not reordered.
    """

    name: str
    module: nn.Module
    layers: list[LayerState]
    seed: int
    held: Set[tuple[str, str]]

    def batches(self) -> Iterator[Batch]:
        """What enters the block: the outputs of the compressed blocks before it (or of the dense ones, as asked)."""
        ...

    def targets(self) -> Iterator[torch.Tensor]:
        """What the dense block gave for each of these batches, [batch, tokens, width]."""
        ...

    def run(self, batch: Batch) -> torch.Tensor:
        """The block's output hidden states now; gradients flow where they are enabled."""
        ...
