"""Neuron sets: which neurons of an MLP a request needs, decided once, in a buffer.

In: y [..., tokens, K], what the reader of an MLP reads, call by call. A call with more than one token a sequence is a
prompt and begins a request; calls with one token go on with it. Out: where(neurons, y, 0). The set is the values of a
bool buffer, never a shape, so another request needs no recompilation. The sequences of a batch share one set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from sparsec.passes.gates.forms import Gate, tokens_of


class Neurons(Gate):
    """``neurons``: bool [channels], all True until the first prompt. ``choose`` decides from a prompt."""

    fields: ClassVar[tuple[str, ...]] = ("channels",)
    request = True
    neurons: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("neurons", torch.ones(channels, dtype=torch.bool))

    def choose(self, prompt: torch.Tensor) -> None:
        """Set ``neurons`` from the activations [..., tokens, K] of a prompt."""
        raise NotImplementedError

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """The prompt itself is not gated: its neurons are what the set is chosen from."""
        count = tokens_of(y)
        if self.tokens == "last-half" and count > 1:
            prompt, late = y[..., : count // 2, :], y[..., count // 2 :, :]
            self.choose(prompt.detach())
            return torch.cat([prompt, self.zeroed(late, None)], -2)
        if count > 1:
            self.choose(y.detach())
            return y
        return self.zeroed(y, x)

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        return torch.where(self.neurons, y, 0)

    def reset(self) -> None:
        """Forget the request: every neuron stays until the next prompt."""
        self.neurons.fill_(True)


def chosen(score: torch.Tensor, kept: int) -> torch.Tensor:
    """Bool like score [K]: the ``kept`` largest, of equals the first."""
    order = score.sort(descending=True, stable=True).indices[:kept]
    return torch.zeros_like(score, dtype=torch.bool).scatter(0, order, True)


class CoreNeurons(Neurons):
    """The ``kept`` neurons that are most often among the ``each`` largest |y| of a token; ties go by mean |y|."""

    kind = "core neurons"
    fields = ("channels", "kept", "each")

    def __init__(self, channels: int, kept: int, each: int) -> None:
        super().__init__(channels)
        if not (1 <= kept <= channels and 1 <= each <= channels):
            raise ValueError(f"{kept} neurons, {each} of each token, cannot be chosen from {channels}")
        self.kept, self.each = kept, each

    def choose(self, prompt: torch.Tensor) -> None:
        size = prompt.float().abs().reshape(-1, self.channels)
        largest, index = size.topk(self.each, -1)
        counts = torch.zeros_like(size).scatter(-1, index, (largest > 0).float()).sum(0)
        mean = size.mean(0)
        self.neurons.copy_(chosen(counts + mean / (2 * mean.max() + 1e-30), self.kept))

    @property
    def words(self) -> str:
        return f"the prompt's {self.kept} core neurons"


class FirstNeurons(Neurons):
    """Neurons whose root mean square over the ``first`` tokens of a request is above ``threshold`` (fp32 []).

    Those tokens are not gated, all later ones are, of the prompt too. ``first`` 0: the whole prompt. ``energy``: sum
    over tokens of y^2 so far, fp32 [channels]; ``seen``: of how many, fp32 [].
    """

    kind = "first neurons"
    fields = ("channels", "first")
    exact = ("threshold", "energy", "seen")
    threshold: torch.Tensor
    energy: torch.Tensor
    seen: torch.Tensor

    def __init__(self, channels: int, first: int) -> None:
        super().__init__(channels)
        self.first = first
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("energy", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros(()))

    def choose(self, prompt: torch.Tensor) -> None:
        rows = prompt if not self.first else prompt[..., : self.first, :]
        self.energy.copy_(_energy(rows))
        self.seen.fill_(float(tokens_of(rows)))
        self._decide()

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        count = tokens_of(y)
        if self.tokens == "last-half" or not self.first or count <= 1:
            return super().forward(y, x)
        self.choose(y.detach())
        if count <= self.first:
            return y
        return torch.cat([y[..., : self.first, :], torch.where(self.neurons, y[..., self.first :, :], 0)], -2)

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if not self.first or tokens_of(y) > 1:
            return torch.where(self.neurons, y, 0)
        open_ = self.seen < self.first  # the prompt was shorter: this token still counts, and is not gated
        self.energy.add_(torch.where(open_, _energy(y.detach()), 0))
        self.seen.add_(open_.float())
        self._decide()
        return torch.where(self.neurons | open_, y, 0)

    def _decide(self) -> None:
        self.neurons.copy_((self.energy / self.seen.clamp(min=1)).sqrt() > self.threshold)

    def reset(self) -> None:
        super().reset()
        self.energy.zero_()
        self.seen.zero_()

    @property
    def words(self) -> str:
        of = f"first {self.first} tokens" if self.first else "prompt"
        return f"rms over the {of} > {self.threshold.item():.4g}"


def _energy(y: torch.Tensor) -> torch.Tensor:
    """Sum over tokens, mean over sequences, of y^2: fp32 [K]."""
    square = y.float().square()
    if square.dim() < 2:
        return square
    return square.reshape(-1, square.shape[-2], square.shape[-1]).mean(0).sum(0)


class ToldNeurons(Neurons):
    """A set that ``Shadow`` writes, earlier in the same call; the prompt is gated too."""

    kind = "told neurons"

    def choose(self, prompt: torch.Tensor) -> None:
        """Nothing: it was told."""

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return Gate.forward(self, y, x)

    @property
    def words(self) -> str:
        return "neurons that the first MLP's predictor tells"


class Shadow(Gate):
    """One network that tells the neurons of every MLP, from what the first one reads in a prompt.

    The mean over the prompt's tokens goes through two layers to a score for each neuron of each follower, of which
    the ``kept`` largest stay. It stands after the first linear of the first MLP, which it leaves as it is.
    ``followers``: the readers, whose gates are ``ToldNeurons``; ``widths`` and ``kept``: of each, whole numbers.
    """

    kind = "shadow"
    fields = ("reads", "hidden", "followers", "widths", "kept")
    request = True
    zeroes = False

    def __init__(self, reads: int, hidden: int, followers: list[str], widths: list[int], kept: list[int]) -> None:
        super().__init__()
        self.reads, self.hidden = reads, hidden
        self.followers, self.widths, self.kept = list(followers), list(widths), list(kept)
        self.net = nn.Sequential(nn.Linear(reads, hidden), nn.ReLU(), nn.Linear(hidden, sum(widths)))
        self.told: list[ToldNeurons] = []

    def link(self, at: Mapping[str, Gate]) -> None:
        """Find the followers by name. Raises ValueError where one is missing or of another width."""
        told = []
        for name, width in zip(self.followers, self.widths, strict=True):
            gate = at.get(name)
            if not isinstance(gate, ToldNeurons) or gate.channels != width:
                raise ValueError(f"{name} has no set of {width} neurons that a predictor could tell")
            told.append(gate)
        self.told = told

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        assert x is not None
        count = tokens_of(x)
        if count > 1:
            self.tell(x[..., : count // 2, :] if self.tokens == "last-half" else x)
        return y

    def tell(self, prompt: torch.Tensor) -> None:
        """Write the sets of all followers from x [..., tokens, K] of a prompt."""
        scores = self.net(prompt.detach().reshape(-1, self.reads).mean(0)).float()
        for gate, score, kept in zip(self.told, scores.split(self.widths), self.kept, strict=True):
            gate.neurons.copy_(chosen(score, kept))

    @property
    def words(self) -> str:
        return f"predictor of the neurons of {len(self.followers)} MLPs"


def reset_neurons(model: nn.Module) -> None:
    """Forget the request in every neuron set of a model; a new prompt does so by itself."""
    for module in model.modules():
        if isinstance(module, Neurons):
            module.reset()
