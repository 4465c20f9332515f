"""What a family of GPU kernels is: how a weight is packed, how plain torch unpacks it, which launches compute with it.

One family a file. A pack is made by torch operations, so it is made where the weight lies; ``unpack`` is its proof and
shares no code with the kernels. ``launches`` gives the calls of one product as data (``launch.py``): a GPU runs them,
Triton's interpreter runs them on CPU tensors, and they compile to machine code for any architecture without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from sparsec.codegen.spec import Packed
from sparsec.codegen.triton.launch import Runs
from sparsec.formats import Format

Config: TypeAlias = "Mapping[str, int]"  # tile sizes, splits, warps: what tuning may choose
Gate: TypeAlias = "float | torch.Tensor | None"


@dataclass(frozen=True)
class Call:
    """act(x @ W.T + bias) -> y. x: [M, K], y: [M, N], both with unit inner stride and of one dtype; bias: [N] or None.

    M is at least 1. ``capability``: of the GPU, 90 for sm_90.

    The rest is for loops that read a part of the weight. ``gate``: what drops values of x: None drops exact zeros, a
    number is one threshold, a tensor [K] one for each channel. ``needed``: [any, N], in whose columns of zeros are
    the outputs that nobody reads. ``weight``: W itself [N, K], unit inner stride, for a kernel without a pack.
    ``count``: int32 [1] on x's device, which is told how many columns or outputs were left; None: nobody asks.
    """

    x: torch.Tensor
    y: torch.Tensor
    bias: torch.Tensor | None = None
    act: str = ""
    capability: int = 90
    gate: Gate = None
    needed: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    count: torch.Tensor | None = None

    @property
    def m(self) -> int:
        return int(self.x.shape[0])


class Family(Protocol):
    """``loops``: names of its ways to compute, with the most rows of x each takes (0: any number).

    ``formats``: one of each format it packs, by name, for tests and offline compiling (``samples.py``).
    """

    kind: str
    formats: Sequence[str]
    loops: Mapping[str, int]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        """Pack a [N, K] weight; raises PatternMismatch where it does not hold the pattern or the values."""
        ...

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The [N, K] weight back, bit by bit, by plain torch."""
        ...

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """The space that tuning may search, the best guess first; never empty."""
        ...

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> Sequence[Runs]:
        """What computes one product. Raises ValueError for an M above what the loop takes."""
        ...
