"""Proximal 2:4: a regulariser that only 2:4 groups escape pulls the weights into a mask while the loss pulls back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import pad

from sparsec.errors import BadRecipe
from sparsec.passes.masks import obs
from sparsec.passes.masks.contract import Choose, Pruned, Statistics, pattern_of

_FIRST, _LAST = 1e-3, 30.0  # lambda times step: from hardly felt to next to every group at most two
_SWEEPS = 12  # of coordinate descent in one group
_PART = 1 << 14  # groups at a time, so that they stay in cache


@dataclass(frozen=True)
class Proximal:
    """Find a 2:4 mask by proximal gradient steps, then refit the kept weights.

    Each group of four has the regulariser r(w) = |w1 w2 w3| + |w1 w2 w4| + |w1 w3 w4| + |w2 w3 w4|, which is zero just
    where at most two weights are not. ISTA on ||X (W - W')||^2 / 2 + lambda * r: a gradient step of 1 / (largest
    eigenvalue of H), the proximal operator of r, lambda growing geometrically until groups are 2:4; the two largest of
    each group stay. Then masked gradient descent on the loss alone. Source: Kübler et al., "A Proximal Operator for
    Inducing 2:4-Sparsity", 2025, sections 3 and 4.

    Ours: weights are taken times ||X_j||, and each row by its root mean square, so that one range of lambda does for
    all layers and the start of the path is Wanda's mask; the descent is by conjugate gradients, which need no step size
    and never raise the loss. H is damped as in SparseGPT. Makes 2:4 only.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("xxt",)
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Kübler et al., 2025"
    cost: ClassVar[str] = "minutes a layer: (steps + descent) N K^2"
    patterns: ClassVar[tuple[str, ...]] = ("2:4",)

    steps: Annotated[int, Field(ge=1)] = field(default=100, metadata={"doc": "proximal steps, lambda growing"})
    descent: Annotated[int, Field(ge=0)] = field(default=30, metadata={"doc": "masked gradient steps afterwards"})
    damp: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "share of the mean of the Hessian's diagonal that is added to it"}
    )

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """Mask and fp32 values of ``weight`` [N, K]. Raises BadRecipe where the pattern is not 2:4, SingularHessian."""
        hessian, dead = obs.damped_hessian(stats["xxt"], self.damp)
        norms = hessian.diagonal().sqrt()
        unit = (hessian / norms / norms[:, None]).float()
        target = weight.float() * norms.masked_fill(dead, 0.0).float()
        size = target.square().mean(1, keepdim=True).sqrt()
        target /= size.masked_fill(size == 0, 1.0)
        _refuse_all_but_2_4(choose(target.abs()), choose)

        keep = choose(self._path(target, unit).abs() + 1e-6 * target.abs())
        values = masked_descent(target, unit, keep, self.descent)
        values = values * size / norms.float()
        return Pruned(keep, torch.where(dead & keep, weight.float(), values))

    def _path(self, target: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """The weights at the end of the ISTA steps, [N, K]."""
        step = 1.0 / _largest_eigenvalue(unit)
        now = target
        for i in range(self.steps):
            strength = _FIRST * (_LAST / _FIRST) ** (i / max(1, self.steps - 1))
            now = prox(now - step * ((now - target) @ unit), strength)
        return now


def prox(weight: torch.Tensor, strength: float) -> torch.Tensor:
    """For each group of four in-features the z with the least ||z - w||^2 / 2 + strength * r(z); [N, K], K any.

    Signs stay, so |w| is solved. On it the problem is quadratic in each coordinate: z_i = max(0, w_i - strength * the
    products of two others). Descent by coordinates is started from w, from its three largest, from half of both
    (where weights are alike, the first step from w overshoots into a corner) and from its two largest (which are a
    solution with two); the best of the ends is taken.
    """
    rows, k = weight.shape
    groups = pad(weight, (0, -k % 4)).view(-1, 4)
    solved = torch.cat([_prox_of_groups(part, strength) for part in torch.split(groups, _PART)])
    return solved.view(rows, -1)[:, :k]


def _prox_of_groups(groups: torch.Tensor, strength: float) -> torch.Tensor:
    size, order = groups.abs().sort(dim=1, descending=True, stable=True)
    size = size.t().contiguous()
    best = size.clone()
    best[2:] = 0.0
    cost = _objective(best, size, strength)
    starts = torch.stack((size, size, size / 2, size / 2), dim=1)
    starts[3, 1::2] = 0.0
    for z in _descend(starts, size[:, None], strength).unbind(1):
        better = (found := _objective(z, size, strength)) < cost
        best, cost = torch.where(better, z, best), torch.where(better, found, cost)
    solved = torch.empty_like(groups).scatter_(1, order, best.t())
    return solved.copysign_(groups)


def _descend(z: torch.Tensor, size: torch.Tensor, strength: float) -> torch.Tensor:
    """Coordinate descent from ``z`` [4, starts, groups], in place; ``size`` [4, 1, groups]."""
    for _ in range(_SWEEPS):
        for i in range(4):
            a, b, c = (z[j] for j in range(4) if j != i)
            pairs = torch.addcmul(a * b, a + b, c)
            torch.sub(size[i], pairs, alpha=strength, out=z[i]).clamp_(min=0.0)
    return z


def _objective(z: torch.Tensor, size: torch.Tensor, strength: float) -> torch.Tensor:
    a, b, c, d = z.unbind()
    return (z - size).square().sum(0) / 2 + strength * (a * b * (c + d) + c * d * (a + b))


def masked_descent(target: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor, steps: int) -> torch.Tensor:
    """Lower (w - w') H (w - w')^T of each row over its kept columns by conjugate gradients, from the target's values.

    All [N, K] fp32; zero where ``keep`` is False. After as many steps as a row keeps columns it is the least squares.
    """
    now = target * keep
    residual = ((target - now) @ hessian) * keep
    direction = residual.clone()
    power = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian) * keep
        bend = (direction * curved).sum(1, keepdim=True)
        length = torch.where(bend > 0, power / bend, 0.0)
        now = now + length * direction
        residual = residual - length * curved
        before, power = power, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(before > 0, power / before, 0.0) * direction
    return now


def _largest_eigenvalue(matrix: torch.Tensor) -> float:
    """Of a symmetric positive definite matrix, by power iteration from a fixed vector, rounded up a little."""
    vector = torch.linspace(1.0, 2.0, len(matrix), dtype=matrix.dtype, device=matrix.device)
    value = 1.0
    for _ in range(50):
        vector = matrix @ (vector / torch.linalg.vector_norm(vector))
        value = float(torch.linalg.vector_norm(vector))
    return 1.05 * value if math.isfinite(value) else 1.0


def _refuse_all_but_2_4(keep: torch.Tensor, choose: Choose) -> None:
    k = keep.shape[1]
    counts = pad(keep, (0, -k % 4)).view(len(keep), -1, 4).sum(2)
    wanted = torch.full((counts.shape[1],), 2, device=keep.device)
    if k % 4:
        wanted[-1] = min(2, k % 4)
    if not bool((counts == wanted).all()):
        raise BadRecipe(detail=f"proximal makes 2:4 masks and no others, and the pattern is {pattern_of(choose)}")
