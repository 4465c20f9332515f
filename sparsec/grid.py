"""Weights that lie on a grid of small integers or 8-bit floats times a scale, found in plain floating-point numbers.

In: a weight [N, K] that some quantiser left as ``q * scale`` in its own dtype. Out: q and the scales, proven: every
``(q * scale)`` rounds to the very weight. What does not hold exactly is not a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SAMPLED = 8


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


def on_grid(weight: torch.Tensor, bits: int, group: int = 0) -> OnGrid | None:
    """The symmetric grid of a weight [N, K], or None. ``group`` in-features of a row share a scale; 0: the whole row.

    The scale of a group is its largest |w| over some integer up to 2^(bits-1) - 1; round to nearest leaves the largest
    such integer, so that is tried first, and others only where it does not hold. A weight of 16 bits has rounded
    products, which move the scale that the maximum tells by half a step; least squares over the group moves it back.
    """
    k = weight.shape[1]
    if not weight.numel():
        return None
    size, top = group or k, 2 ** (bits - 1) - 1
    grouped = torch.nn.functional.pad(weight.detach(), (0, -k % size)).reshape(-1, size)
    scale = torch.ones(len(grouped), 1, device=weight.device)
    largest = grouped.float().abs().amax(1, keepdim=True)
    todo = (largest[:, 0] > 0).nonzero().flatten()
    for step in range(top, 0, -1):
        found, fitted = _fit(grouped[todo], largest[todo] / step, top)
        scale[todo[found]] = fitted[found]
        todo = todo[~found]
        if not len(todo):
            break
        few = todo[:SAMPLED]  # where a few groups are on no grid at all, the others need not be tried
        if step == top and not _each_on_some(grouped[few], largest[few], top):
            return None
    if len(todo):
        return None
    q = (grouped.float() / scale).round().to(torch.int8).reshape(len(weight), -1)[:, :k].contiguous()
    made = OnGrid(q, scale.reshape(len(weight), -1), group)
    return made if torch.equal(made.weight(weight.dtype), weight.detach()) else None


def _fit(part: torch.Tensor, scale: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which groups hold exactly with this scale, or with that of least squares near it; and the scale that does."""
    wide = part.float()
    q = (wide / scale).round()
    exact = ((q * scale).to(part.dtype) == part).all(1)
    if part.dtype == torch.float32 and bool(exact.all()):
        return exact, scale
    better = (wide * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True).clamp(min=1)
    again = ((wide / better).round() * better).to(part.dtype)
    refined = (again == part).all(1) & ((wide / better).round().abs().amax(1) <= top)
    return exact | refined, torch.where(exact[:, None], scale, better)


def _each_on_some(part: torch.Tensor, largest: torch.Tensor, top: int) -> bool:
    """Whether each group holds with some step."""
    held = torch.zeros(len(part), dtype=torch.bool, device=part.device)
    for step in range(top, 0, -1):
        held |= _fit(part, largest / step, top)[0]
    return bool(held.all())


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
