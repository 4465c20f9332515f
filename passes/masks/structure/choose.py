"""Which units go: from what each is worth to a ``Keep``.

In: a worth for each unit, the share of parameters that should go. Out: bool masks, at least one unit left in each
family, ties decided by position (the later one goes first).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from sparsec.passes.masks.structure.units import Family, Units


def choose(
    units: Units,
    worth: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    uniform: bool = False,
    multiple: int = 1,
    frozen: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The units to keep when ``sparsity`` of the parameters of all families not in ``frozen`` (keys) should go.

    ``worth``: Family.key -> [count], any order-preserving number, finite. Without ``uniform`` all compete and the
    removed parameters come to within half a unit of the target; with it each family loses its share, so that layers
    of one kind stay alike. ``multiple``: kept neurons of a layer are rounded up to a multiple of it.
    """
    free = [family for family in units.families if family.key not in frozen]
    keep = units.all()
    if uniform:
        for family in free:
            gone = min(math.floor(sparsity * family.count + 0.5), family.count - 1)
            keep[family.key] = _best(worth[family.key], family.count - gone)
    else:
        _compete(free, worth, sparsity, keep)
    for family in free:
        kept = int(keep[family.key].sum())
        rounded = min(family.count, math.ceil(kept / multiple) * multiple)
        if family.kind == "neuron" and rounded != kept:
            keep[family.key] = _best(worth[family.key], rounded)
    return keep


def _best(worth: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` largest, bool; the first among equals."""
    keep = torch.zeros(len(worth), dtype=torch.bool)
    keep[worth.argsort(descending=True, stable=True)[:kept]] = True
    return keep


def _compete(
    free: list[Family], worth: Mapping[str, torch.Tensor], sparsity: float, keep: dict[str, torch.Tensor]
) -> None:
    target = sparsity * sum(family.count * family.cost for family in free)
    # reversed, so that among equals the last place of the last family comes first
    flat = torch.cat([worth[family.key].double() for family in free]).flip(0) if free else torch.zeros(0)
    places = [(family, i) for family in free for i in range(family.count)][::-1]
    left = {family.key: family.count for family in free}
    removed = 0
    for place in flat.argsort(stable=True).tolist():
        family, i = places[place]
        if removed + family.cost / 2 > target:
            return
        if left[family.key] > 1:
            keep[family.key][i] = False
            left[family.key] -= 1
            removed += family.cost
