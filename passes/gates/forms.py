"""Gates as modules: plain PyTorch that zeroes some activations, and what says of one how to make it again.

In: activations y [..., K] (and x, what the layer before them read). Out: the same shape and dtype, with zeros. Each
class is a form of ``contract.py``. Thresholds stay fp32 whatever dtype the model is moved to, so a cast does not change
what is kept by more than the rounding of the activations themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

PHASES = ("all", "decode", "prefill")
TOKENS = ("all", "last-half")
KINDS: dict[str, str] = {
    "threshold": "sparsec.passes.gates.forms:Threshold",
    "mode": "sparsec.passes.gates.forms:Centred",
    "top-k": "sparsec.passes.gates.forms:TopK",
    "n:m": "sparsec.passes.gates.forms:GroupTopK",
    "signs": "sparsec.passes.gates.predictor:Signs",
    "low rank": "sparsec.passes.gates.predictor:LowRank",
    "core neurons": "sparsec.passes.gates.neurons:CoreNeurons",
    "first neurons": "sparsec.passes.gates.neurons:FirstNeurons",
    "told neurons": "sparsec.passes.gates.neurons:ToldNeurons",
    "shadow": "sparsec.passes.gates.neurons:Shadow",
}


class Gate(nn.Module):
    """``phase``: ``decode`` acts on calls with one token a sequence only, ``prefill`` on those with more.

    ``tokens``: of an evaluation, see ``layers.gated_tokens``; ``last-half`` leaves the first half of each sequence as
    it is. ``request``: what is zeroed is decided once a request, from its first call. ``zeroes``: it zeroes
    something itself (both of the class).
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()  # arguments that make it again, JSON types; buffers are filled after
    exact: ClassVar[tuple[str, ...]] = ()  # buffers that keep their dtype
    request: ClassVar[bool] = False
    zeroes: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.phase = "all"
        self.tokens = "all"

    def forward(self, y: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        if self.phase == "decode" and tokens_of(y) != 1:
            return y
        if self.phase == "prefill" and tokens_of(y) == 1:  # compared one by one: a bool and a symbol are not equal
            return y
        if self.tokens == "last-half":
            half = tokens_of(y) // 2
            late = None if x is None else x[..., half:, :]
            return torch.cat([y[..., :half, :], self.zeroed(y[..., half:, :], late)], -2)
        return self.zeroed(y, x)

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """The form itself."""
        raise NotImplementedError

    def link(self, at: Mapping[str, Gate]) -> None:
        """Find other gates by the names of the layers whose input they gate; most have none to find."""

    @property
    def words(self) -> str:
        """What it does, as tables say it."""
        return self.kind

    @property
    def said(self) -> dict[str, Any]:
        """JSON types from which ``made`` makes it again, but for the values of its buffers."""
        return {"kind": self.kind, "phase": self.phase, **{name: getattr(self, name) for name in self.fields}}

    def extra_repr(self) -> str:
        return self.words if self.phase == "all" else f"{self.words}, {self.phase}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in self.exact}
        done = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return done


def tokens_of(y: torch.Tensor) -> int:
    """Tokens of each sequence in y [..., tokens, K]; of [K] it is one."""
    return int(y.shape[-2]) if y.dim() > 1 else 1


def made(said: Mapping[str, Any]) -> Gate:
    """A gate of which ``said`` tells, its buffers not yet filled. Raises ValueError for what no gate is."""
    options = dict(said)
    kind, phase = options.pop("kind", None), options.pop("phase", "all")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of gate; known are {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    cls: type[Gate] = getattr(importlib.import_module(module), name)
    if set(options) != set(cls.fields) or phase not in PHASES:
        raise ValueError(f"a gate of kind {kind} is told by {', '.join(('phase', *cls.fields))}, not {said}")
    gate = cls(**options)
    gate.phase = phase
    return gate


def width_of(gate: Gate) -> int | None:
    """The width of y that a gate was made for; None where any will do."""
    return getattr(gate, "channels", None) or None


class Threshold(Gate):
    """where(|y| > t, y, 0); t fp32 [] or, with ``channels``, [K]. NaN is not greater than anything: it becomes 0."""

    kind = "threshold"
    fields = ("channels",)
    exact = ("threshold",)
    threshold: torch.Tensor

    def __init__(self, channels: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("threshold", torch.zeros(channels) if channels else torch.zeros(()))

    @classmethod
    def at(cls, threshold: torch.Tensor | float) -> Threshold:
        """With these thresholds, [] or [K], numbers of 0 or more. Raises ValueError for others."""
        value = torch.as_tensor(threshold, dtype=torch.float32)
        if not bool((value >= 0).all()) or bool(value.isinf().any()):
            raise ValueError(f"the threshold is {threshold}, and must be a number of 0 or more")
        gate = cls(len(value) if value.dim() else 0)
        gate.threshold.copy_(value)
        return gate

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        return torch.where(y.abs() > self.threshold, y, 0)

    @property
    def words(self) -> str:
        return f"|x| > {self.threshold.item():.4g}" if not self.channels else "|x| > t of each channel"


class Centred(Gate):
    """where(|y - c| > t, y - c, 0); c and t fp32 []. The bias of the layer that reads it must hold W c."""

    kind = "mode"
    exact = ("threshold", "centre")
    threshold: torch.Tensor
    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(()))

    @classmethod
    def at(cls, centre: float, threshold: float) -> Centred:
        """Raises ValueError where the two are no finite numbers, or the threshold is below 0."""
        Threshold.at(threshold)
        if not abs(centre) < float("inf"):
            raise ValueError(f"the centre is {centre}, and must be a finite number")
        gate = cls()
        gate.centre.fill_(centre)
        gate.threshold.fill_(threshold)
        return gate

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        off = y - self.centre
        return torch.where(off.abs() > self.threshold, off, 0)

    @property
    def words(self) -> str:
        return f"|x - {self.centre.item():.4g}| > {self.threshold.item():.4g}"


class TopK(Gate):
    """The ``k`` largest |y| of each token stay. Raises ValueError at its first call where y is narrower."""

    kind = "top-k"
    fields = ("k",)

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is {k}, and must be 1 or more")
        self.k = k

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        if y.shape[-1] < self.k:
            raise ValueError(f"k is {self.k}, and activations are only {y.shape[-1]} wide")
        _, index = y.abs().topk(self.k, -1)
        return torch.zeros_like(y).scatter(-1, index, y.gather(-1, index))

    @property
    def words(self) -> str:
        return f"top {self.k} of |x|"


class GroupTopK(Gate):
    """N:M: of each ``m`` neighbours in y the ``n`` largest |y| stay. The width must be a multiple of m."""

    kind = "n:m"
    fields = ("n", "m")

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        if not 0 < n <= m:
            raise ValueError(f"{n}:{m} keeps {n} of {m}")
        self.n, self.m = n, m

    def zeroed(self, y: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        groups = y.view(*y.shape[:-1], y.shape[-1] // self.m, self.m)
        _, index = groups.abs().topk(self.n, -1)
        return torch.zeros_like(groups).scatter(-1, index, groups.gather(-1, index)).reshape(y.shape)

    @property
    def words(self) -> str:
        return f"{self.n}:{self.m} of |x|"
