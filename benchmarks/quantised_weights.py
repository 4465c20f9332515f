"""Weights on a grid, as integers and scales and as the plain floats that torch reads; the same for every engine.

A stack of decoder blocks holds its projections only: attention over one token is its value, so queries, keys and
values are added up instead. Blocks beyond the first hold the same rows in another order: other memory, same statistics.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case

GRIDS = {"int8": (8, 0), "int4g128": (4, 128)}
BITS = {"int8": 8, "int4g128": 4, "ternary": 2}
BLOCK = 16
EPSILON = 1e-6


@dataclass(frozen=True)
class Quantised:
    """``q``: int8 [n, k]. ``scale``: fp32 [n, groups], each of k // groups columns."""

    q: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """q * scale, [n, k]."""
        n, groups = self.scale.shape
        return (self.q.float().reshape(n, groups, -1) * self.scale[:, :, None]).reshape(n, -1).to(dtype)

    def rolled(self, rows: int) -> Quantised:
        return Quantised(self.q.roll(rows, 0), self.scale.roll(rows, 0)) if rows else self


def quantised(case: Case, n: int = 0, k: int = 0) -> Quantised:
    """A weight of the case, [n, k] (0: as it says): normal, cut at a magnitude or by blocks, then on its grid.

    The grid makes zeros of what is below half a step, so ``case.sparsity`` is the least.
    """
    n, k = n or case.n, k or case.k
    weight = torch.from_numpy(masked(case, n, k))
    if case.weights == "ternary":
        kept = weight != 0
        scale = weight.abs().sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return Quantised(weight.sign().to(torch.int8), torch.where(scale == 0, 1.0, scale))
    from sparsec.passes.quantize.contract import Grid

    q, scale, _ = Grid(*GRIDS[case.weights]).parts(weight)
    return Quantised(q.reshape(n, k).to(torch.int8), scale[:, :, 0].contiguous())


def masked(case: Case, n: int, k: int) -> np.ndarray:
    """fp32 [n, k] with the zeros of the case."""
    rng = np.random.Generator(np.random.SFC64(n * 31 + k))
    weight = rng.standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5)
    if case.pattern:
        kept = rng.random((-(-n // BLOCK), -(-k // BLOCK))) >= case.sparsity
        weight *= kept.repeat(BLOCK, 0).repeat(BLOCK, 1)[:n, :k]
    elif case.sparsity > 0:
        cut = statistics.NormalDist().inv_cdf((1 + case.sparsity) / 2) * k**-0.5
        weight[np.abs(weight) < cut] = 0
    return weight


def several(case: Case, bytes_each: float) -> list[Quantised]:
    """As many as fill the caches at ``bytes_each``; ``case.calls`` layers share them."""
    first = quantised(case)
    return [first.rolled(37 * i) for i in range(case.distinct(bytes_each))]


def answers(case: Case, kept: list[Quantised], xs: list[Tensor]) -> list[Tensor]:
    """What the first and the last layer of a call give in floats."""
    return [xs[i].float() @ kept[i % len(kept)].dense().t() for i in (0, case.calls - 1)]


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


W = TypeVar("W")


def projections(case: Case, base: Callable[[int, int], W], rolled: Callable[[W, int], W]) -> Iterator[dict[str, W]]:
    """The projections of one block after the other: rotations by rows of one ``base`` [n, k] of each shape."""
    shapes = dict.fromkeys("qkvo", (case.k, case.k))
    shapes |= {"gate": (case.n, case.k), "up": (case.n, case.k), "down": (case.k, case.n)}
    bases = {shape: base(*shape) for shape in dict.fromkeys(shapes.values())}
    for block in range(case.blocks):
        first = 7 * block
        yield {name: rolled(bases[shapes[name]], 37 * (first + i)) for i, name in enumerate(PROJECTIONS)}


def stack_weights(case: Case) -> Iterator[dict[str, Quantised]]:
    """The projections of one block after the other, on the grid of the case."""
    return projections(case, partial(quantised, case), Quantised.rolled)


def token(case: Case) -> Tensor:
    """The hidden state of one token, [1, k]."""
    return torch.randn(1, case.k, generator=torch.Generator().manual_seed(7))


def normalised(x: Tensor) -> Tensor:
    """x over its root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


class Block(nn.Module):
    """One decoder block; see the head of this file for what stands in for attention."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return through(self.layers, x)


def through(layers: Any, x: Tensor) -> Tensor:
    """x [1, k] through one block; ``layers``: a product for each name of PROJECTIONS."""
    n = normalised(x)
    x = x + layers["o"](layers["q"](n) + layers["k"](n) + layers["v"](n))
    n = normalised(x)
    gate = layers["gate"](n)
    y: Tensor = x + layers["down"](gate * torch.sigmoid(gate) * layers["up"](n))
    return y


def float_bytes(case: Case) -> int:
    """Of the weights of a stack as fp32."""
    return 4 * case.blocks * (4 * case.k**2 + 3 * case.n * case.k)


def available_bytes() -> float:
    """Memory that can be had without swapping; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), float("inf"))


def stack(case: Case) -> nn.Module:
    """The blocks as one module of plain layers, inputs rounded where the case says so."""
    return nn.Sequential(
        *(Block({name: layer(case, w.dense()) for name, w in block.items()}) for block in stack_weights(case))
    )


def layer(case: Case, weight: Tensor) -> nn.Module:
    """A linear layer without a bias that rounds what it reads where the case says so."""
    from sparsec.passes.quantize.inputs import set_inputs

    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    set_inputs(made, "int8" if case.x8 else "")
    return made


def stack_reference(case: Case) -> Tensor:
    """What the stack gives in floats: the weights on their grid, nothing else rounded. Holds one layer at a time."""

    def product(weight: Quantised) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, weight.dense())

    x = token(case)
    for block in stack_weights(case):
        x = through({name: product(weight) for name, weight in block.items()}, x)
    return x
