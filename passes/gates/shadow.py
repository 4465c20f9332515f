"""ShadowLLM: one network at the first MLP tells which neurons of all MLPs a request needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from sparsec.passes.gates.neurons import Shadow, ToldNeurons
from sparsec.passes.gates.predictor import seeded, train

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.mlps import Mlp

_HELD = 0.2  # share of the segments that it is judged on, not trained


@dataclass(frozen=True)
class ShadowLLM:
    """Train one network that tells the neurons of every MLP from a prompt, by how much the loss depends on them.

    A neuron's importance in a piece of text is the mean over tokens of |A dL/dA|, A its activation and L the model's
    loss ("plainact"). The network reads the mean of what the first MLP reads, and is trained to give the importance of
    all neurons, relative to the mean of their layer; each MLP keeps the 1 - sparsity share with the largest scores for
    the whole request. Source: Akhauri et al., "ShadowLLM: Predictor-based Contextual Sparsity for Large Language
    Models", 2024, sections 3 and 4. Heads are not gated here.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons", "gradient")
    source: ClassVar[str] = "Akhauri et al., 2024"
    cost: ClassVar[str] = "a backward pass, a small training"
    whole: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    hidden: Annotated[int, Field(ge=1)] = field(default=128, metadata={"doc": "width between the two layers"})
    epochs: Annotated[int, Field(ge=1)] = field(default=30, metadata={"doc": "over the pieces of text"})
    segment: Annotated[int, Field(ge=1)] = field(default=32, metadata={"doc": "tokens of a piece of text"})

    def gate(self, block: GateBlock) -> None:
        """Neuron sets before every reader, and the network at the first MLP."""
        mlps = list(block.mlps)
        if not mlps:
            return
        x, y = _traced(block, mlps, self.segment)
        first = mlps[0]
        widths = [mlp.neurons for mlp in mlps]
        kept = [max(1, round(mlp.neurons * (1.0 - block.sites[mlp.reader].share))) for mlp in mlps]
        gate = Shadow(x.shape[1], self.hidden, [mlp.reader for mlp in mlps], widths, kept)
        cut = max(1, round(len(x) * (1.0 - _HELD)))
        seeded(gate.net, block.seed)
        with torch.no_grad():
            last = gate.net[2]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(0.1)  # so that it starts from the mean importance
            last.bias.copy_(y[:cut].mean(0))
        train(gate.net, x[:cut], y[:cut], nn.MSELoss(), self.epochs, block.seed)
        note = _judged(gate, x[cut:], y[cut:], y[:cut].mean(0)) if cut < len(x) else ""
        for mlp in mlps:
            block.put(mlp.reader, "input", ToldNeurons(mlp.neurons), block.sites[mlp.reader].share)
        weight = block.module_of(first.writers[0]).get_parameter("weight")
        notes = [note] if note else []
        block.put(first.writers[0], "output", gate.to(weight.dtype), None, notes)


def _traced(block: GateBlock, mlps: Sequence[Mlp], segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [S, K] and importances [S, sum of neurons] of every piece of text, fp32."""
    features: list[torch.Tensor] = []
    importances: list[torch.Tensor] = []
    read: dict[str, torch.Tensor] = {}
    with block.keeping([mlps[0].writers[0], *(mlp.reader for mlp in mlps)], read):
        for loss in block.losses():
            each = [read[mlp.reader] for mlp in mlps]
            slopes = torch.autograd.grad(loss, each)
            with torch.no_grad():
                sizes = [_pieces((a * g).abs(), segment) for a, g in zip(each, slopes, strict=True)]
                sizes = [size / size.mean(-1, keepdim=True).clamp(min=1e-30) for size in sizes]
                importances.append(torch.cat(sizes, -1).cpu())
                features.append(_pieces(read[mlps[0].writers[0]], segment).cpu())
    return torch.cat(features), torch.cat(importances)


def _pieces(value: torch.Tensor, segment: int) -> torch.Tensor:
    """[1, T, K] -> means over pieces of ``segment`` tokens, fp32 [S, K]; a last piece may be shorter."""
    rows = value.detach().float().reshape(-1, value.shape[-1])
    return torch.stack([piece.mean(0) for piece in torch.split(rows, segment)])


def _judged(gate: Shadow, x: torch.Tensor, y: torch.Tensor, mean: torch.Tensor) -> str:
    """How much of the importance of unseen text its sets hold, beside those of the mean over the training text."""
    with torch.no_grad():
        told = gate.net(x)
    ours = theirs = most = 0.0
    start = 0
    for width, kept in zip(gate.widths, gate.kept, strict=True):
        part = slice(start, start + width)
        ours += float(y[:, part].gather(1, told[:, part].topk(kept, -1).indices).sum())
        theirs += float(y[:, part][:, mean[part].topk(kept).indices].sum())
        most += float(y[:, part].topk(kept, -1).values.sum())
        start += width
    if not most:
        return ""
    return (
        f"on text it was not trained on its sets hold {ours / most:.1%} of the importance that the best sets hold; "
        f"one fixed set holds {theirs / most:.1%}"
    )
