"""The distribution of a layer's activations, streaming. In: activations, batch by batch. Out: quantiles and modes.

A bin is what fp32 numbers share that agree in their first 16 bits: sign, exponent and seven bits of mantissa. Bins are
0.8 % wide relative to what is in them, so one pass needs no range, and an outlier a million times the median costs no
resolution, where equal bins over [-r, r) (TEAL: 10 000; CATS: 20 000 over [-2, 2], with all that is larger in one)
have none left. Within a bin values count as evenly spread. Exact zeros are counted apart: after ReLU most are.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_HALF = 1 << 15
_FINITE = 0x7F80  # first bits of infinity
_STEPS = 400  # halvings of a bisection; it ends at the last bit of a double long before
_GRID = 1024  # points where a density is looked at
_PIECE = 1 << 22  # values reduced at once


def _edges() -> np.ndarray:
    """[2^16 + 1] fp64: bin i holds [edges[i], edges[i + 1])."""
    top = (np.arange(_FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    top[_FINITE] = float(torch.finfo(torch.float32).max)
    beyond = np.full(_HALF - _FINITE, top[-1])
    positive = np.concatenate([top, beyond])
    return np.concatenate([-positive[:0:-1], positive])


EDGES = _edges()


class Histogram:
    """Counts of everything that was added. ``count``: how many values; ``zeros``: how many of them are exactly 0."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _HALF, dtype=torch.int64)
        self.zeros = 0

    @property
    def count(self) -> int:
        return self.zeros + int(self.counts.sum())

    def add(self, values: torch.Tensor) -> None:
        """Values of any shape and float dtype. Raises ValueError where one is NaN or infinite."""
        for piece in torch.split(values.detach().float().flatten(), _PIECE):
            if not bool(piece.isfinite().all()):
                raise ValueError("NaN or infinite values have no place in a histogram")
            there = piece[piece != 0]
            self.zeros += len(piece) - len(there)
            first = there.contiguous().view(torch.int32) >> 16
            index = torch.where(first < 0, -1 - (first & 0x7FFF), first) + _HALF
            self.counts += torch.bincount(index, minlength=2 * _HALF).cpu()

    def within(self, share: float, centre: float = 0.0) -> float:
        """The least t >= 0 for which ``share`` of all values have |x - centre| <= t; 0 where nothing was added."""
        wanted = share * self.count
        below = self._below()
        high = self._largest() + abs(centre)
        return _least(lambda t: self._mass(below, centre - t, centre + t) >= wanted, 0.0, high)

    def quantile(self, share: float) -> float:
        """The least value that ``share`` of all do not exceed; 0 where nothing was added."""
        if not self.count:
            return 0.0
        below, top, wanted = self._below(), self._largest(), share * self.count
        return _least(lambda v: self._mass(below, -top, v) >= wanted, -top, top)

    def peak(self) -> float:
        """Where a Gaussian kernel density (Silverman's bandwidth) over the middle 99 % is highest.

        Silverman, "Density Estimation", 1986, equation 3.31, with the spread of the quartiles.
        """
        if not self.count:
            return 0.0
        marks = [self.quantile(q) for q in (0.005, 0.25, 0.75, 0.995)]
        low, high = marks[0], marks[3]
        if high <= low:
            return low
        grid = np.linspace(low, high, _GRID + 1)
        held = np.interp(grid, EDGES, self._below()) + self.zeros * (grid >= 0)
        mass, middle = np.diff(held), 0.5 * (grid[1:] + grid[:-1])
        spread = (marks[2] - marks[1]) / 1.34 or (high - low) / 4
        width = max(0.9 * spread * self.count**-0.2, (high - low) / _GRID)
        reach = min(_GRID // 2, max(1, math.ceil(4 * width * _GRID / (high - low))))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * (high - low) / _GRID / width) ** 2)
        return float(middle[np.convolve(mass, kernel, "same").argmax()])

    def _below(self) -> np.ndarray:
        """[2^16 + 1]: how many values that are not 0 lie below each edge."""
        return np.concatenate([[0], np.cumsum(self.counts.numpy())]).astype(np.float64)

    def _mass(self, below: np.ndarray, low: float, high: float) -> float:
        """How many values lie in [low, high]."""
        inside = np.interp(high, EDGES, below) - np.interp(low, EDGES, below)
        return float(inside) + self.zeros * (low <= 0 <= high)

    def _largest(self) -> float:
        """The upper edge of the outermost bin that holds a value."""
        there = self.counts.nonzero().flatten().tolist()
        return float(max(abs(EDGES[there[0]]), abs(EDGES[there[-1] + 1]))) if there else 0.0


def _least(holds: object, low: float, high: float) -> float:
    """The least number in [low, high] for which ``holds`` says True; it does for ``high`` and stays so."""
    assert callable(holds)
    if holds(low):
        return low
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
