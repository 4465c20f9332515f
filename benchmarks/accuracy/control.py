"""The control: a mask that knows nothing. Known to recipes only while a benchmark runs, never to users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sparsec.passes.masks import METHODS

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Statistics

RANDOM = "random"


@dataclass(frozen=True)
class Random:
    """Keep weights at random: the control that says what a method's knowledge is worth."""

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "control"
    cost: ClassVar[str] = "nothing"

    seed: int = field(default=0, metadata={"doc": "of the masks"})

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        """Uniform numbers [N, K]; layers of one shape differ, since the weights are part of the seed."""
        import torch

        bits = weight.detach().float().cpu().reshape(-1)[:1024].view(torch.int32).sum().item()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(bits)) % 2**31)  # it reads 32 bits
        return torch.rand(weight.shape, generator=generator)


@contextmanager
def known() -> Iterator[None]:
    """Inside, recipes may name ``random``."""
    METHODS[RANDOM] = "benchmarks.accuracy.control:Random"
    try:
        yield
    finally:
        METHODS.pop(RANDOM, None)
