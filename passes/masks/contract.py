"""What a mask method is: a frozen dataclass that scores weights, or updates them while choosing.

In: one layer's weight as a matrix [N, K] = [out_features, in_features], and the statistics it asked for. Out: a score
per weight (the higher, the more it is worth keeping), or new values together with the mask.

A method is one file and one line in ``sparsec.passes.masks.METHODS``; its fields are its options and become keys of
the recipe, checked from their annotations. Pattern, scope and quota are not its business: it hands scores to
``Choose``, so every method works with every pattern. Its class says::

    needs   names of STATISTICS; () runs without data
    scope   where weights compete unless the recipe says otherwise: "layer", "global" or "row"
    norm    how the scores of a block add up: "l2" for magnitudes, "sum" for scores that are squares already
    source  paper or equation
    cost    what a user waits for, in a few words

and ``patterns``, where it makes only some: a recipe with another is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

from sparsec.passes.masks.pattern import MaskPattern

if TYPE_CHECKING:
    import torch

# What a layer's inputs X [tokens, K] and the gradients of its weight G [N, K] can be reduced to. Methods that share a
# name share one pass over the data; ``statistics.py`` has the accumulators of the first group.
STATISTICS: Mapping[str, str] = {
    "tokens": "[] int64: tokens seen",
    "sum_x2": "[K] fp32: sum of x^2 over tokens",
    "sum_x4": "[K] fp32: sum of x^4 over tokens",
    "xxt": "[K, K] fp32: sum of x x^T over tokens",
    "absmax": "[K] fp32: largest |x|",
    "histogram": "[K, bins] int64: counts of x in equal bins over [-r, r), r the power of two above the absmax",
    "entropy": "[K] fp32: entropy of the column's histogram, nats",
    "sample": "[rows, K] fp32: up to 512 rows of X, evenly spaced over the tokens",
    "grad2": "[N, K] fp32: sum over samples of g^2, g the gradient of the model's loss before the step",
    "grad_abs": "[N, K] fp32: sum over samples of |g|",
    "spsa": "[N, K] fp32: sum over samples of a forward-only (SPSA) estimate of g",
}
GRADIENTS = ("grad2", "grad_abs", "spsa")  # of the whole model, taken before the step (and its rewrites) changes it
SCOPES = ("layer", "global", "row")

Statistics: TypeAlias = "Mapping[str, torch.Tensor]"


class Choose(Protocol):
    """Which weights stay, from their scores: the recipe's pattern, quota and scope behind one call."""

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Scores [N, width] of the in-features from ``start`` on; gives a bool keep-mask of that shape.

        A method that walks over column blocks calls it once a block, and the quota holds in each up to rounding, which
        ``start`` carries on from block to block: it holds for the whole to the weight. ``start`` must be a multiple
        of the pattern's group. A fixed mask is just another ``Choose`` ("keep the mask, update the rest").
        """
        ...


def pattern_of(choose: Choose) -> MaskPattern:
    """What ``choose`` says its pattern is; unstructured where it says nothing. A wrapper must hand ``pattern`` on."""
    return getattr(choose, "pattern", MaskPattern())


@dataclass(frozen=True)
class Pruned:
    """``keep``: bool [N, K]. ``values``: the new [N, K] weights, or None where the kept ones stay as they are."""

    keep: torch.Tensor
    values: torch.Tensor | None = None


class Method(Protocol):
    """The static part every method has; beside it, it is ``Scores`` or ``Updates``."""

    role: ClassVar[str]  # "mask"
    needs: ClassVar[tuple[str, ...]]
    scope: ClassVar[str]
    norm: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]


@runtime_checkable
class Scores(Protocol):
    """A method whose kept weights stay as they are (magnitude, Wanda, RIA)."""

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """[N, K] floats, NaN-free; higher is kept. Must not change ``weight``."""
        ...


@runtime_checkable
class Updates(Protocol):
    """A method that chooses and repairs at once (SparseGPT: later columns are scored on already updated weights)."""

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """The mask and the new values. Must not change ``weight``."""
        ...


def prune(method: Method, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
    """Run a method on one matrix [N, K]; nothing is written."""
    if isinstance(method, Updates):
        return method.update(weight, stats, choose)
    if isinstance(method, Scores):
        return Pruned(choose(method.score(weight, stats)))
    raise TypeError(f"{type(method).__name__} has neither score nor update")
