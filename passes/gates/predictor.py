"""Predictors: which neurons a token needs, told from what the MLP reads, before any neuron is computed.

In: x [..., K], what a linear reads, and y [..., N], what it gives. Out: where(mask(x), y, 0). ``Signs`` counts signs
that agree, ``LowRank`` is a small network that ``train`` fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from sparsec.passes.gates.forms import Gate

_BATCH = 128  # tokens of a step
_RATE = 1e-3


class Predictor(Gate):
    """``reads``: K. ``channels``: N. ``mask`` says which neurons are computed."""

    def __init__(self, reads: int, channels: int) -> None:
        super().__init__()
        self.reads, self.channels = reads, channels

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Bool [..., N] of x [..., K]."""
        raise NotImplementedError

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return torch.where(self.mask(x), y, 0)


class Signs(Predictor):
    """A neuron goes where more than ``alpha`` times as many signs of x and its weights differ as agree.

    ``signs``: uint8 [N, ceil(K / 8)], bit j % 8 of byte j // 8 is set where w_j < 0. ``alpha``: fp32 []. Zeros count
    as positive. Source: Shin et al., "SparseInfer", 2024, section 4: XOR of sign bits and a population count; here a
    product of signs, which counts the same.
    """

    kind = "signs"
    fields = ("reads", "channels")
    exact = ("alpha",)
    signs: torch.Tensor
    alpha: torch.Tensor

    def __init__(self, reads: int, channels: int) -> None:
        super().__init__(reads, channels)
        self.register_buffer("signs", torch.zeros(channels, (reads + 7) // 8, dtype=torch.uint8))
        self.register_buffer("alpha", torch.ones(()))

    @classmethod
    def of(cls, weight: torch.Tensor, alpha: float = 1.0) -> Signs:
        """Of a weight [N, K]."""
        n, k = weight.shape
        gate = cls(k, n)
        bits = F.pad((weight < 0).to(torch.uint8), (0, -k % 8)).view(n, -1, 8)
        gate.signs.copy_((bits << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8))
        gate.alpha.fill_(alpha)
        return gate

    def disagreeing(self, x: torch.Tensor) -> torch.Tensor:
        """How many signs differ, whole numbers as fp32 [..., N]."""
        bits = (self.signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
        ours = 1.0 - 2.0 * bits.flatten(-2)[:, : self.reads].float()
        return 0.5 * (self.reads - F.linear(torch.where(x < 0, -1.0, 1.0), ours))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        negative = self.disagreeing(x)
        return negative <= self.alpha * (self.reads - negative)

    @property
    def words(self) -> str:
        return f"signs, alpha {self.alpha.item():.4g}"


class LowRank(Predictor):
    """A neuron stays where its logit, out(down(x)), is above ``threshold`` (fp32 [])."""

    kind = "low rank"
    fields = ("reads", "channels", "rank")
    exact = ("threshold",)
    threshold: torch.Tensor

    def __init__(self, reads: int, channels: int, rank: int) -> None:
        super().__init__(reads, channels)
        self.rank = rank
        self.down = nn.Linear(reads, rank, bias=False)
        self.out = nn.Linear(rank, channels)
        self.register_buffer("threshold", torch.zeros(()))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.down(x))
        return found

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x) > self.threshold

    @property
    def words(self) -> str:
        return f"low rank {self.rank}, logit > {self.threshold.item():.4g}"


def train(network: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: nn.Module, epochs: int, seed: int) -> None:
    """Fit ``network`` to give y [T, N] of x [T, K] by Adam; the same seed gives the same bits on one machine.

    Its parameters ask for no gradient afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), y.clone()  # of inference mode they could not be differentiated through
        parameters = [p.requires_grad_(True) for p in network.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=_RATE)
        for _ in range(epochs):
            for rows in _batches(len(x), generator):
                optimizer.zero_grad()
                found = loss(network(x[rows]), y[rows])
                found.backward()
                optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _batches(rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    yield from torch.split(torch.randperm(rows, generator=generator), _BATCH)


def seeded(network: nn.Module, seed: int) -> None:
    """Start values that depend on the seed alone: uniform within 1 / sqrt(fan in), biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
                if module.bias is not None:
                    module.bias.zero_()
