"""The OBS column solver: prune (or round) a weight column by column, and repair the columns that are still to come.

In: a weight [N, K], the inputs' X X^T [K, K], and which weights stay (a ``Choose`` or a fixed mask). Out: mask and new
values. With H = X X^T and U the upper Cholesky factor of H^-1, taking column j from w to q costs |e|^2 for
e = (w - q) / U_jj, and subtracting e * U_jk from each later column k makes up for all that can be made up for.
Source: Frantar & Alistarh, "SparseGPT", 2023, algorithm 1; Frantar et al., "GPTQ", 2022, algorithm 1.

A column's repairs are not done at once. Columns are split in halves, again and again: the left half is finished, its
errors reach the right half in one matrix product, and the right half follows. Only within the last few columns is a
repair a matrix-vector product. It is the same arithmetic as one rank-1 update a column, in another order, with the
large part of it done by matrix products that find their data in cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from sparsec.errors import SingularHessian
from sparsec.passes.masks.contract import Choose, Pruned

_LEAF = 16  # columns among which repairs go one by one


class Quantizer(Protocol):
    """The seam for GPTQ and SpQR: what a kept weight is rounded to."""

    def fit(self, columns: torch.Tensor, start: int) -> None:
        """Called with the up-to-date columns [N, width] from ``start`` on, before the first of them is rounded."""
        ...

    def round(self, column: torch.Tensor, j: int) -> torch.Tensor:
        """The values [N] that in-feature ``j`` gets. Must not change ``column``."""
        ...


def damped_hessian(xxt: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H [K, K] fp64 = X X^T + damp * mean(diag) * I, and ``dead``: bool [K], the inputs that were always zero.

    The mean is over live inputs, and a dead one gets it as its diagonal, so that the result is relative: scaling X
    scales H. (The reference code sets H_jj = 1 there, which is large or small as the inputs are.)
    Raises SingularHessian where X X^T is not finite, or all inputs are dead.
    """
    if not bool(torch.isfinite(xxt).all()):
        raise SingularHessian(
            why="they hold NaN or infinity", help="calibrate in float32, and leave out the samples that overflow"
        )
    hessian = xxt.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        raise SingularHessian(why="every input was zero", help="use more calibration tokens, some that reach the layer")
    mean = diagonal[~dead].mean()
    diagonal.masked_fill_(dead, float(mean)).add_(damp * mean)
    return hessian, dead


def inverse_factor(xxt: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor U [K, K] fp32 of H^-1 = U^T U, and the dead inputs, bool [K].

    ``xxt``: [K, K] fp32 or fp64. ``damp``: share of the mean of its diagonal that is added to the diagonal.
    H itself is split into R R^T with R upper (a Cholesky factor from the last column to the first), and U = R^-1: H^-1
    is never formed, which halves the work and squares no condition number. Raises SingularHessian.
    """
    hessian, dead = damped_hessian(xxt, damp)
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    # A pivot is what is left of an input once later ones explain theirs; below the rounding of X X^T it is noise.
    noise = torch.finfo(xxt.dtype).eps * hessian.diagonal().flip(0)
    if int(info) or not bool((lower.diagonal().square() > noise).all()):
        raise SingularHessian(
            why=f"their X X^T is singular at damp {damp:g}",
            help=f"raise damp, or use more calibration tokens (several for each of the {len(dead)} inputs)",
        )
    return _inverse_lower(lower).flip(0, 1).float(), dead


def _inverse_lower(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix, by halves; a triangular solve would not see the identity's zeros."""
    size = len(lower)
    if size <= 128:
        solved: torch.Tensor = torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_lower(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]).neg_()
    return inverse


def fixed(keep: torch.Tensor) -> Choose:
    """A mask, bool [N, K], as a ``Choose`` that does not look at scores."""
    return lambda score, start=0: keep[:, start : start + score.shape[1]]


def prune(
    weight: torch.Tensor,
    factor: torch.Tensor,
    choose: Choose | torch.Tensor,
    *,
    width: int = 128,
    quantizer: Quantizer | None = None,
) -> Pruned:
    """Prune ``weight`` [N, K] and update what is kept; ``weight`` stays as it is.

    ``factor``: U of ``inverse_factor``. ``choose``: which weights stay, asked once for each ``width`` columns with the
    scores w^2 / U_jj^2 of what the weights have become by then; or the mask itself, bool [N, K]. ``quantizer`` rounds
    what is kept, and its error is repaired like that of pruning. Gives fp32 values.
    """
    chosen = choose if callable(choose) else fixed(choose)
    # Transposed: a column is then contiguous, and so is everything that a product touches.
    sweep = _Sweep(
        weight.detach().t().to(torch.float32).clone(memory_format=torch.contiguous_format),
        factor.to(torch.float32),
        chosen,
        width,
        quantizer,
    )
    sweep.run(0, weight.shape[1])
    return Pruned(sweep.keep.t().contiguous(), sweep.columns.t().contiguous())


@dataclass
class _Sweep:
    """One walk over ``columns`` [K, N], a weight transposed. ``errors`` [K, N]: e of each finished column."""

    columns: torch.Tensor
    upper: torch.Tensor
    choose: Choose
    width: int
    quantizer: Quantizer | None
    keep: torch.Tensor = field(init=False)
    errors: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.keep = torch.empty_like(self.columns, dtype=torch.bool)
        self.errors = torch.empty_like(self.columns)
        self.pivots = self.upper.diagonal().tolist()

    def run(self, start: int, end: int) -> None:
        """Finish columns start..end; what the ones before ``start`` owe them was paid."""
        units = -(-(end - start) // self.width)
        if start % self.width == 0 and end == min(start + self.width, len(self.columns)):
            self._open(start, end)
        if units == 1 and end - start <= _LEAF:
            self._finish(start, end)
            return
        middle = start + (units // 2 * self.width if units > 1 else (end - start) // 2)
        self.run(start, middle)
        owed = self.upper[start:middle, middle:end].t()
        self.columns[middle:end].addmm_(owed, self.errors[start:middle], alpha=-1)
        self.run(middle, end)

    def _open(self, start: int, end: int) -> None:
        columns = self.columns[start:end]
        score = (columns / self.upper.diagonal()[start:end, None]).square_()
        self.keep[start:end] = self.choose(score.t(), start).t()
        if self.quantizer is not None:
            self.quantizer.fit(columns.t(), start)

    def _finish(self, start: int, end: int) -> None:
        for j in range(start, end):
            column = self.columns[j]
            if j > start:
                column.addmv_(self.errors[start:j].t(), self.upper[start:j, j], alpha=-1)
            new = column if self.quantizer is None else self.quantizer.round(column, j)
            new = new * self.keep[j]
            torch.sub(column, new, out=self.errors[j]).div_(self.pivots[j])
            column.copy_(new)
