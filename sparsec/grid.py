"""Weights that lie on a grid of small integers times a scale, found in plain floating-point numbers.

In: a weight [N, K] that some quantiser left as ``q * scale`` in its own dtype. Out: q and the scales, proven: every
``(q * scale)`` rounds to the very weight. What does not hold exactly is not a grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLED = 8

Fit = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class OnGrid:
    """``q``: int8 [N, K]. ``scale``: fp32 [N, groups]. weight = (q * scale) rounded to the weight's dtype."""

    q: torch.Tensor
    scale: torch.Tensor
    group: int

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight back, [N, K]."""
        k = self.q.shape[1]
        wide = self.scale.repeat_interleave(self.group or k, 1)[:, :k]
        return (self.q.float() * wide).to(dtype)


def on_grid(weight: torch.Tensor, bits: int, group: int = 0, shifted: bool = False) -> OnGrid | None:
    """The symmetric grid of a weight [N, K], or None. ``group`` in-features of a row share a scale; 0: the whole row.

    ``shifted``: 2^bits neighbouring integers with 0 among them, any for each group, instead of -top .. top.

    The scale of a group is its largest |w| over some integer up to 2^(bits-1) - 1; round to nearest leaves the largest
    such integer, so that is tried first, and others only where it does not hold. A weight of 16 bits has rounded
    products, so that the maximum tells the scale only nearly; all weights of the group together tell the rest.
    """
    k = weight.shape[1]
    if not weight.numel():
        return None
    size, top = group or k, 2**bits - 1 if shifted else 2 ** (bits - 1) - 1
    fit = functools.partial(_fit, top=top, span=top if shifted else 2 * top)
    grouped = torch.nn.functional.pad(weight.detach(), (0, -k % size)).reshape(-1, size)
    scale = torch.ones(len(grouped), 1, device=weight.device)
    largest = grouped.float().abs().amax(1, keepdim=True)
    todo = (largest[:, 0] > 0).nonzero().flatten()
    for step in range(top, 0, -1):
        found, fitted = fit(grouped[todo], largest[todo] / step)
        scale[todo[found]] = fitted[found]
        todo = todo[~found]
        if not len(todo):
            break
        few = todo[:SAMPLED]  # where a few groups are on no grid at all, the others need not be tried
        if step == top and not _each_on_some(grouped[few], largest[few], top, fit):
            return None
    if len(todo):
        return None
    q = (grouped.float() / scale).round().to(torch.int8).reshape(len(weight), -1)[:, :k].contiguous()
    made = OnGrid(q, scale.reshape(len(weight), -1), group)
    return made if torch.equal(made.weight(weight.dtype), weight.detach()) else None


def _fit(part: torch.Tensor, scale: torch.Tensor, top: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which groups hold exactly with this scale, or with one near it; and the scale that does."""
    wide = part.float()
    q = (wide / scale).round()
    near = q.amax(1).clamp(min=0) - q.amin(1).clamp(max=0) <= span
    exact = near & ((q * scale).to(part.dtype) == part).all(1)
    if part.dtype == torch.float32:  # the maximum tells the scale up to two units in its last place
        for up in (torch.inf, -torch.inf):
            other = scale
            for _ in range(2 if not bool(exact.all()) else 0):
                other = other.nextafter(torch.full_like(other, up))
                holds = near & ~exact & (q * other == part).all(1)
                exact, scale = exact | holds, torch.where(holds[:, None], other, scale)
        return exact, scale
    better = common_scale(part, scale)
    q = (wide / better).round()
    near = q.amax(1).clamp(min=0) - q.amin(1).clamp(max=0) <= span
    again = (q * better).to(part.dtype)
    refined = near & (again == part).all(1) & (q.abs().amax(1) <= top)
    return exact | refined, torch.where(exact[:, None], scale, better)


def common_scale(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale [G, 1] near ``scale`` with which whole numbers round to every weight of 16 bits; else ``scale``.

    A product rounds to w between the middles of w and its neighbours, so each q allows an interval of scales, and all
    of a group have the true one in common. Small q are known first; they narrow the interval until large ones are.
    """
    bits, size = part.abs().contiguous().view(torch.int16), part.abs().float()
    below, above = (((bits + by).clamp(min=0).view(part.dtype).float() + size) / 2 for by in (-1, 1))
    low, high = scale * (1 - 2**-8), scale * (1 + 2**-8)
    for last in (False, False, False, True):
        q = (above / low * (1 + 1e-6)).floor()  # a middle belongs to one of its sides: leave both
        known = (size > 0) & (q > 0) & (q == (below / high * (1 - 1e-6)).ceil())
        if last:
            q = (size / (low + high) * 2).round()
            known = q > 0
        low = torch.maximum(low, torch.where(known, below / q, 0).amax(1, keepdim=True))
        high = torch.minimum(high, torch.where(known, above / q, torch.inf).amin(1, keepdim=True))
    return torch.where(high >= low, (low + high) / 2, scale)


def _each_on_some(part: torch.Tensor, largest: torch.Tensor, top: int, fit: Fit) -> bool:
    """Whether each group holds with some step."""
    held = torch.zeros(len(part), dtype=torch.bool, device=part.device)
    for step in range(top, 0, -1):
        held |= fit(part, largest / step)[0]
    return bool(held.all())
