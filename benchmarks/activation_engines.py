"""Programs whose activations hold zeros, in plain torch. In: a ``Case`` of ``benchmarks.activation_cases``. Out: a
``Built`` whose error is the difference to the same program in eager torch.

The engine ``unseen`` is sparsec on a program that gives the same values by arithmetic in which nobody can see the
zeros: the dense peer of the same kernels. In a stack it runs the blocks without thresholds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import BYTES, Case
from benchmarks.engines import DTYPES, Built
from benchmarks.quantised_targets import VALUE_BYTES
from benchmarks.quantised_weights import PROJECTIONS, projections, quantised, through

CALIBRATION = 8  # tokens from which the thresholds of a stack are taken: their quantiles need no more


def relu(z: Tensor, seen: bool) -> Tensor:
    """The same values either way, each exactly."""
    return F.relu(z) if seen else (z + z.abs()) * 0.5


class Down(nn.Module):
    """linear(relu(z)) for each z; with fewer weights than inputs they take turns."""

    def __init__(self, weights: list[Tensor], seen: bool) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.seen = seen

    def forward(self, *zs: Tensor) -> list[Tensor]:
        return [F.linear(relu(z, self.seen), self.weights[i % len(self.weights)]) for i, z in enumerate(zs)]


class Up(Down):
    """relu(z) * linear(x) for each pair (z, x)."""

    def forward(self, *pairs: Tensor) -> list[Tensor]:
        zs, xs = pairs[::2], pairs[1::2]
        return [
            relu(z, self.seen) * F.linear(x, self.weights[i % len(self.weights)])
            for i, (z, x) in enumerate(zip(zs, xs, strict=True))
        ]


class MLP(nn.Module):
    """down(relu(gate(x) + shift) * up(x)) for each x."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, shift: float, seen: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w, requires_grad=False) for w in (gate, up, down))
        self.shift, self.seen = shift, seen

    def forward(self, *xs: Tensor) -> list[Tensor]:
        gates = [relu(F.linear(x, self.gate) + self.shift, self.seen) for x in xs]
        return [F.linear(g * F.linear(x, self.up), self.down) for g, x in zip(gates, xs, strict=True)]


class Block(nn.Module):
    """A decoder block as in ``quantised_weights``, with a threshold in front of every layer.

    ``zeros``: while it is set, each threshold is taken from the tokens that are read, as TEAL does.
    """

    zeros: float | None = None

    def __init__(self, layers: dict[str, Tensor], seen: bool) -> None:
        super().__init__()
        self.layers = nn.ParameterDict({name: nn.Parameter(w, requires_grad=False) for name, w in layers.items()})
        for name in PROJECTIONS:
            self.register_buffer(f"t_{name}", torch.zeros(()))
        self.seen = seen

    def product(self, name: str, x: Tensor) -> Tensor:
        threshold = getattr(self, f"t_{name}")
        if self.zeros is not None:
            threshold.copy_(x.float().abs().flatten().quantile(self.zeros))
        kept = torch.where(x.abs() > threshold, x, 0) if self.seen else x
        return F.linear(kept, self.layers[name])

    def forward(self, x: Tensor) -> Tensor:
        return through({name: partial(self.product, name) for name in PROJECTIONS}, x)


def build(compile_: Callable[[nn.Module], Callable[..., Any]], path: str, case: Case, seen: bool = True) -> Built:
    """``compile_`` on the program of the case."""
    model, xs = program(case, seen)
    wanted, found = model(*xs), compile_(model)
    error = _difference(found(*xs), wanted)
    return Built(lambda: found(*xs), path, error)


def program(case: Case, seen: bool) -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    dtype = DTYPES[case.dtype]
    shift = -statistics.NormalDist().inv_cdf(case.zeros) if case.zeros else 6.0  # so many of a normal are below

    def normal(width: int) -> Tensor:
        return torch.randn(case.m, width, generator=generator)

    if case.kind == "down":
        return Down(_cold(case), seen), [(normal(case.k) + shift).to(dtype) for _ in range(case.calls)]
    if case.kind == "up":
        pairs = [((normal(case.n) + shift).to(dtype), normal(case.k).to(dtype)) for _ in range(case.calls)]
        return Up(_cold(case), seen), [x for pair in pairs for x in pair]
    if case.kind == "mlp":
        wide, narrow = (_dense(case, *shape) for shape in ((case.n, case.k), (case.k, case.n)))
        return MLP(wide, wide.roll(37, 0), narrow, shift, seen), [normal(case.k).to(dtype)]
    blocks = list(_blocks(case, seen))
    model, token = nn.Sequential(*blocks), normal(case.k).to(dtype)
    if seen:
        _calibrate(blocks, torch.randn(CALIBRATION, case.k, generator=generator).to(dtype), case.zeros)
    return model, [token]


def _calibrate(blocks: list[Block], tokens: Tensor, zeros: float) -> None:
    for block in blocks:
        block.zeros = zeros
        tokens = block(tokens)
        block.zeros = None


def _dense(case: Case, n: int, k: int) -> Tensor:
    """A weight [n, k], on the grid of the case where it has one."""
    if case.weights:
        on_grid: Tensor = quantised(case, n, k).dense(DTYPES[case.dtype])
        return on_grid
    generator = torch.Generator().manual_seed(n * 31 + k)
    return (torch.randn(n, k, generator=generator) / math.sqrt(k)).to(DTYPES[case.dtype])


def _cold(case: Case) -> list[Tensor]:
    width = VALUE_BYTES.get(case.weights, BYTES[case.dtype])
    base = _dense(case, case.n, case.k)
    return [base.roll(37 * i, 0) for i in range(case.distinct(case.n * case.k * width * max(1 - case.zeros, 0.1)))]


def _blocks(case: Case, seen: bool) -> Iterator[Block]:
    for layers in projections(case, partial(_dense, case), lambda weight, by: weight.roll(by, 0)):
        yield Block({name: weight * _scale(name) for name, weight in layers.items()}, seen)


def _scale(name: str) -> float:
    """What is added to the stream is small beside it, as where models are initialised by their depth; else a value that
    falls on the other side of a threshold moves everything after it. A power of two keeps the grid."""
    return 0.25 if name in ("o", "down") else 1.0


def _difference(found: Any, wanted: Any) -> float:
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
    return max(float((f.float() - w.float()).abs().max() / w.float().abs().max()) for f, w in pairs)
