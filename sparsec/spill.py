"""A list of tensors that keeps a budget of bytes in memory and the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from sparsec.errors import SpillFailed


class Spilled:
    """Append tensors, read them by position. The files are gone with the list. Raises SpillFailed on a full disk."""

    def __init__(self, budget: int, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._budget = budget
        self._held: list[torch.Tensor | Path] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if size <= self._budget:
            self._budget -= size
            self._held.append(tensor.detach())
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="sparsec-")
        path = Path(self._folder.name) / f"{len(self._held)}.pt"
        try:
            torch.save(tensor.detach().clone(), path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            path.unlink(missing_ok=True)
            raise SpillFailed(folder=self._folder.name, detail=str(error).splitlines()[0]) from error
        self._held.append(path)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> torch.Tensor:
        held = self._held[index]
        return torch.load(held, weights_only=True) if isinstance(held, Path) else held
