"""What a value method is: a frozen dataclass that moves the weights of a layer onto a grid.

In: one weight [N, K] and the statistics it asked for. Out: ``Pruned``, whose ``values`` lie on the grid and whose
``keep`` is True where they are not zero. The model keeps plain floating-point weights: each is
``(q - zero) * scale`` of small integers q, so any eager program runs it, and the compiler finds the grid by itself.

A method with ``activations`` may also ask that inputs are rounded at run time (``inputs.py``), and one with ``folds``
that a rewrite of ``reparam`` runs before it.

A zero weight must stay zero, or pruning before would be undone: grids have zero on them (methods.md section 7.1,
item 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from sparsec.passes.masks.contract import Choose, Pruned, Statistics


class Quantizes(Protocol):
    """``role`` is "quantize"; ``update`` is that of ``masks.contract.Updates``, with a ``choose`` that keeps all."""

    role: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    scope: ClassVar[str]
    norm: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """The weights on their grid. Must not change ``weight``."""
        ...


@dataclass(frozen=True)
class Grid:
    """Integers of ``bits`` with a scale, and a zero where not ``symmetric``, for each ``group`` in-features of a row.

    ``group`` 0: a whole row shares them; a last group may be shorter.
    """

    bits: int
    group: int = 0
    symmetric: bool = True

    def parts(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, scale and zero of weight [N, K], each fp32 [N, groups, group]; scale and zero have 1 for group.

        Symmetric: scale = max|w| / (2^(bits-1) - 1), q = round(w / scale), zero = 0. Otherwise the range
        [min(w, 0), max(w, 0)] has 2^bits - 1 steps and zero is a whole number, so that 0 is on the grid.
        """
        w = self._grouped(weight)
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            scale = _steps(w.abs().amax(-1, keepdim=True), top)
            return (w / scale).round().clamp(-top, top), scale, torch.zeros_like(scale)
        top = 2**self.bits - 1
        low, high = w.amin(-1, keepdim=True).clamp(max=0.0), w.amax(-1, keepdim=True).clamp(min=0.0)
        scale = _steps(high - low, top)
        zero = (-low / scale).round().clamp(0, top)
        return ((w / scale).round() + zero).clamp(0, top), scale, zero

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """(q - zero) * scale, fp32 [N, K]."""
        q, scale, zero = self.parts(weight)
        n, k = weight.shape
        return ((q - zero) * scale).reshape(n, -1)[:, :k]

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        n, k = weight.shape
        size = self.group or k
        padded = torch.nn.functional.pad(weight.float(), (0, -k % size))  # zeros change no maximum and no minimum
        return padded.reshape(n, -1, size)


def _steps(width: torch.Tensor, top: int) -> torch.Tensor:
    """Width / top, and 1 where that is no number to divide by: groups of zeros, or of numbers too small for fp32."""
    scale = width / top
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
