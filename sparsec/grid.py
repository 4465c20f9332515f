"""Weights that lie on a grid of small integers or 8-bit floats times a scale, found in plain floating-point numbers.

In: a weight [N, K] that some quantiser left as ``q * scale`` in its own dtype. Out: q and the scales, proven: every
``(q * scale)`` rounds to the very weight. What does not hold exactly is not a grid.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLED = 8
# How near to a whole number a value is taken for it, round by round: at first only where the interval leaves no other.
CLEAR = (0.0, 0.0, 0.1, 0.3, 0.5)
TRIES = 16

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


class Known:
    """Scales that were found once, by the content of a weight: profiling and packing ask for the same."""

    def __init__(self, most_bytes: int = 1 << 26) -> None:
        self._most, self._bytes = most_bytes, 0
        self._scales: OrderedDict[tuple[str, int, int, bool], torch.Tensor | None] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, key: str, bits: int, group: int, shifted: bool, scale: torch.Tensor | None) -> None:
        """``scale``: fp32 [N, groups]; None: there is no such grid. The oldest go first."""
        with self._lock:
            self._take((key, bits, group, shifted))
            self._scales[key, bits, group, shifted] = scale
            self._bytes += _size(scale)
            while self._bytes > self._most:
                self._take(next(iter(self._scales)))

    def look(self, key: str, bits: int, group: int, shifted: bool) -> tuple[bool, torch.Tensor | None]:
        """(whether it is known, the scale)."""
        with self._lock:
            place = (key, bits, group, shifted)
            return place in self._scales, self._scales.get(place)

    def _take(self, place: tuple[str, int, int, bool]) -> None:
        self._bytes -= _size(self._scales.pop(place, None))


def _size(scale: torch.Tensor | None) -> int:
    return 0 if scale is None else scale.numel() * scale.element_size()


KNOWN = Known()


def on_grid(weight: torch.Tensor, bits: int, group: int = 0, shifted: bool = False, key: str = "") -> OnGrid | None:
    """The symmetric grid of a weight [N, K], or None. ``group`` in-features of a row share a scale; 0: the whole row.

    ``shifted``: 2^bits neighbouring integers with 0 among them, any for each group, instead of -top .. top. ``key``: of
    the weight's content, by which ``KNOWN`` may have its scales; they are proven all the same.

    The scale of a group is its largest |w| over some integer up to 2^(bits-1) - 1; round to nearest leaves the largest
    such integer, so that is tried first, and others only where it does not hold. A weight of 16 bits has rounded
    products, so the maximum tells its scale up to half a step only; every value of the group narrows that down.
    """
    k = weight.shape[1]
    if not weight.numel():
        return None
    size, top = group or k, 2**bits - 1 if shifted else 2 ** (bits - 1) - 1
    fit = functools.partial(_fit, top=top, span=top if shifted else 2 * top)
    grouped = torch.nn.functional.pad(weight.detach(), (0, -k % size)).reshape(-1, size)
    known, scale = KNOWN.look(key, bits, group, shifted)
    if known:
        return None if scale is None else _proven(weight, grouped, scale.reshape(-1, 1), group)
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
    return _proven(weight, grouped, scale, group)


def _proven(weight: torch.Tensor, grouped: torch.Tensor, scale: torch.Tensor, group: int) -> OnGrid | None:
    """The grid of these scales [G, 1], if it gives every value back."""
    q = _steps(grouped, scale).to(torch.int8).reshape(len(weight), -1)[:, : weight.shape[1]].contiguous()
    made = OnGrid(q, scale.reshape(len(weight), -1), group)
    return made if torch.equal(made.weight(weight.dtype), weight.detach()) else None


def _fit(part: torch.Tensor, scale: torch.Tensor, top: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which groups hold exactly with this scale, or with one near it; and the scale that does."""
    q = (part.float() / scale).round()
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
    steps = part.float() / scale
    open_groups = (~exact & ((steps - q).abs() <= 0.01 + q.abs() / 100).all(1)).nonzero()[:, 0]  # others are far off
    held, finer = _refined(part[open_groups], scale[open_groups], top, span)
    exact[open_groups], scale = held, scale.clone()
    scale[open_groups[held]] = finer[held]
    return exact, scale


def _refined(part: torch.Tensor, scale: torch.Tensor, top: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of groups of 16-bit values whose scale is only roughly known: which hold, and their scales."""
    held, found = _holding(part, common_scale(part, scale), top, span)
    for step in range(-TRIES, TRIES + 1):  # few groups are left: two numbers were as near to a value
        todo = (~held).nonzero()[:, 0]
        if not len(todo):
            break
        near = scale[todo] * (1 + step / TRIES * 2**-8)
        low, high = _allowed(*_middles(part[todo]), _steps(part[todo], near).abs().double())
        held[todo], found[todo] = _holding(part[todo], ((low + high) / 2).nan_to_num(1, 1).float(), top, span)
    return held, found


def _holding(part: torch.Tensor, scale: torch.Tensor, top: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = _steps(part, scale)
    near = q.amax(1).clamp(min=0) - q.amin(1).clamp(max=0) <= span
    return near & ((q * scale).to(part.dtype) == part).all(1) & (q.abs().amax(1) <= top), scale


def _middles(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which numbers a product rounds to the magnitude of each value: fp64, of ``part``'s shape."""
    size = part.abs()
    down, up = (size.nextafter(torch.full_like(size, to)).double() for to in (0.0, torch.inf))
    return (down + size.double()) / 2, (up + size.double()) / 2


def _allowed(down: torch.Tensor, up: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest scale [G, 1] with which each number of ``q`` that is not 0 lies between the middles."""
    low = torch.where(q > 0, down / q, 0.0).amax(1, keepdim=True)
    return low, torch.where(q > 0, up / q, torch.inf).amin(1, keepdim=True)


def common_scale(part: torch.Tensor, scale: torch.Tensor, of_largest: bool = True) -> torch.Tensor:
    """The scale [G, 1] near ``scale`` with which whole numbers round to every 16-bit value of a group [G, size], where
    there is one.

    A product rounds to a value between the middles of it and its neighbours, so a known number allows an interval of
    scales. ``of_largest``: the largest number is known, since ``scale`` was made of it. As the interval narrows, others
    become so.
    """
    size = part.abs()
    down, up = _middles(part)
    kept, low, high = size > 0, scale.double() * (1 - 2**-7), scale.double() * (1 + 2**-7)
    known = kept & (size == size.amax(1, keepdim=True)) & of_largest
    q = (size.double() / scale.double()).round()
    found = scale.double()
    for clear in (*CLEAR, 0.0):
        lowest, highest = _allowed(down, up, torch.where(known, q, 0.0))
        low, high = torch.maximum(low, lowest), torch.minimum(high, highest)
        found = torch.where(high >= low, (low + high) / 2, found)  # empty: the round before took too much for known
        steps = size.double() / found
        one = (down / high * (1 - 1e-12)).ceil() == (up / low * (1 + 1e-12)).floor()
        q = torch.where(known, q, steps.round())
        known |= kept & (q > 0) & (one | ((steps - q).abs() <= clear))
    return found.float()


def _steps(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """part / scale as whole numbers, fp32. A value just above a power of two is rounded by up to half a step of 127:
    where the nearest integer does not give it back, the next one may."""
    q = (part.float() / scale).round()
    if part.dtype == torch.float32:
        return q
    next_one = q + part.sign().float()
    wrong = (q * scale).to(part.dtype) != part
    return torch.where(wrong & ((next_one * scale).to(part.dtype) == part), next_one, q)


def _each_on_some(part: torch.Tensor, largest: torch.Tensor, top: int, fit: Fit) -> bool:
    """Whether each group holds with some step; all steps are tried at once."""
    steps = torch.arange(1, top + 1, device=part.device, dtype=torch.float32)
    scales = (largest.float() / steps).t().reshape(-1, 1)
    held = fit(part.repeat(top, 1), scales)[0].view(top, len(part))
    return bool(held.any(0).all())


E4M3_MAX = 448.0
_E4M3_TOPS = (448, 416, 384, 352, 320, 288, 256, 240)  # every mantissa, at the largest exponent that has it


@dataclass(frozen=True)
class OnFp8:
    """``q``: e4m3 (float8_e4m3fn) [N, K]. ``scale``: fp32 [N]. weight = (q * scale) rounded to the weight's dtype."""

    q: torch.Tensor
    scale: torch.Tensor

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight back, [N, K]."""
        return (self.q.float() * self.scale[:, None]).to(dtype)


def on_fp8_grid(weight: torch.Tensor, scale: torch.Tensor | None = None) -> OnFp8 | None:
    """A weight [N, K] as e4m3 values times a scale a row, or None where that is not exact. Zeros of q have no sign.

    ``scale``: [N], positive; searched for where it is None. The largest of a row is some e4m3 value times its scale,
    known up to a power of two by the eight mantissas. That tells every q, and each q an interval of scales that round
    to its weight: what they have in common is the scale.
    """
    wide = weight.detach().float().abs()
    if scale is None:
        few = _fp8_scales(weight.detach()[:SAMPLED], wide[:SAMPLED])
        scale = None if few is None else _fp8_scales(weight.detach(), wide)
        if scale is None:
            return None
    magnitude = _e4m3(wide / scale.float()[:, None])
    signed = torch.where(magnitude > 0, magnitude.copysign(weight.detach().float()), 0.0)
    made = OnFp8(signed.to(torch.float8_e4m3fn), scale.float())
    return made if torch.equal(made.weight(weight.dtype), weight.detach()) else None


def _e4m3(value: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest e4m3 value, fp32 in and out; the largest for what is beyond it."""
    return value.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


def _fp8_scales(weight: torch.Tensor, wide: torch.Tensor) -> torch.Tensor | None:
    """Of each row, fp32 [N], or None where a row has none. wide: |weight| in fp32."""
    bits = weight.abs().contiguous().view(torch.int16 if weight.element_size() == 2 else torch.int32)
    low, high = ((wide + (bits + step).view(weight.dtype)).double() / 2 for step in (-1, 1))
    scale = torch.ones(len(wide), device=wide.device)
    todo = ((wide > 0).any(1) | ~wide.isfinite().all(1)).nonzero().flatten()
    for top in _E4M3_TOPS:
        if not len(todo):
            break
        part = wide[todo]
        q = _e4m3(part / (part.amax(1, keepdim=True) / top)).double()
        least = torch.where(part > 0, low[todo] / q, 0.0).amax(1)
        most = torch.where(part > 0, high[todo] / q, float("inf")).amin(1)
        fitted = ((least + most) / 2).float()
        exact = ((q.float() * fitted[:, None]).to(weight.dtype) == part.to(weight.dtype)).all(1)
        scale[todo[exact]] = fitted[exact]
        todo = todo[~exact]
    return None if len(todo) else scale
