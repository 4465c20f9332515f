"""Structured steps of ``sparsify``: whole heads and neurons go, and a smaller dense model is left.

In: the model, one step and the calibration samples. Out: a ``Structured`` record. It stands alone in its recipe,
because every layer after it has another shape; masks go onto the result by a recipe of their own.
"""

from __future__ import annotations

from torch import nn

from sparsec.blockwise import Data
from sparsec.errors import BadRecipe
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.contract import Structural, Structured, Tick
from sparsec.passes.masks.structure.find import find_units
from sparsec.recipe_steps import DEFAULT_SPARSITY, Spread


def restructure(model: nn.Module, step: Spread, data: Data, seed: int, tick: Tick) -> Structured:
    """Make ``model`` smaller in place. Raises BadRecipe where it has no heads or neurons that can be told apart."""
    method: Structural = step.method_object()
    with evaluating(model):
        units = find_units(model, dict(data[0]))
        if "units" in method.needs and not units.families:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(units.declined.items())[:3])
            detail = f"{step.method} finds no heads or neurons to remove in this model" + (f" ({why})" if why else "")
            raise BadRecipe(detail=detail)
        share = DEFAULT_SPARSITY if step.sparsity is None else step.sparsity
        return method.apply(model, units, data, share, seed, tick=tick)
