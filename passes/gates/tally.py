"""How well a predictor does. In: which neurons it keeps, and which are active. Out: recall, precision."""

from __future__ import annotations

import torch


class Tally:
    """Counts over everything that was added."""

    def __init__(self) -> None:
        self.kept = self.active = self.both = self.all = 0

    def add(self, kept: torch.Tensor, active: torch.Tensor) -> None:
        """Two bool tensors of one shape."""
        self.kept += int(kept.sum())
        self.active += int(active.sum())
        self.both += int((kept & active).sum())
        self.all += kept.numel()

    @property
    def recall(self) -> float:
        """Share of the active neurons that are kept; 1 where none is active."""
        return self.both / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """Share of the kept neurons that are active; 1 where none is kept."""
        return self.both / self.kept if self.kept else 1.0

    @property
    def zeros(self) -> float:
        """Share of all neurons that are not active."""
        return 1.0 - self.active / self.all if self.all else 0.0

    @property
    def sentence(self) -> str:
        return (
            f"it keeps {self.recall:.1%} of the active neurons, and {self.precision:.1%} of what it keeps is active "
            f"({self.zeros:.1%} of all are not)"
        )
