"""A list of tensors that keeps a budget of bytes in memory and the rest on disk."""

from __future__ import annotations

import errno
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from sparsec.errors import SpillFailed


class Spilled:
    """Append tensors, read them by position. The files are gone with the list. Raises SpillFailed on a full disk."""

    def __init__(self, budget: int, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._budget = budget
        self._held: list[torch.Tensor | Path] = []
        self._folder: str | None = None
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if size <= self._budget:
            self._budget -= size
            self._held.append(tensor.detach())
            return
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="sparsec-")
            # a TemporaryDirectory warns of every list that is not closed by hand, and lists of tensors never are
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = Path(self._folder) / f"{len(self._held)}.pt"
        try:
            torch.save(tensor.detach().clone(), path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            path.unlink(missing_ok=True)
            raise SpillFailed(folder=self._folder, detail=_why(error, tensor, self._folder)) from error
        self._held.append(path)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> torch.Tensor:
        held = self._held[index]
        return torch.load(held, weights_only=True) if isinstance(held, Path) else held


def _why(error: Exception, tensor: torch.Tensor, folder: str) -> str:
    """torch says of a full disk where in its own code the write came to an end."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    with suppress(OSError):
        full = full or shutil.disk_usage(folder).free < tensor.numel() * tensor.element_size()
    if full or "unexpected pos" in str(error) or "PytorchStreamWriter" in str(error):
        return "the disk is full" if full else "writing stopped half way; the disk may be full"
    return (str(error).splitlines() or [type(error).__name__])[0]
