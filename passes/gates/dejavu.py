"""Deja Vu: a small network in each MLP tells from its input which neurons a token needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from sparsec.passes.gates.contract import maskable
from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.predictor import LowRank, seeded, train
from sparsec.passes.gates.tally import Tally
from sparsec.passes.gates.thresholds import UNREACHED

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.mlps import Mlp

_HELD = 0.2  # share of the tokens that it is judged on, not trained


class _Logits(nn.Module):
    """The network of a ``LowRank``, as ``train`` calls it."""

    def __init__(self, gate: LowRank) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate.logits(x)


@dataclass(frozen=True)
class DejaVu:
    """Train a small network in each MLP that tells which neurons a token needs, and skip the others.

    Two linear layers of rank ``rank``, trained by binary cross entropy on which neurons are among the largest
    1 - sparsity in magnitude (of a ReLU MLP that has fewer: not zero). At run time those stay whose logit is above the
    quantile that gives the sparsity. Source: Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference
    Time", 2023, section 4.1.

    Differs from the paper's code: the second layer has a bias, since how often a neuron is active is most of what
    there is to learn; the network reads the input of its own MLP, not one of a layer before.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons",)
    source: ClassVar[str] = "Liu et al., 2023"
    cost: ClassVar[str] = "a small training each MLP"

    rank: Annotated[int, Field(ge=0)] = field(
        default=0, metadata={"doc": "width between the two layers; 0: an eighth of the features, 16 at least"}
    )
    epochs: Annotated[int, Field(ge=1)] = field(default=10, metadata={"doc": "over the tokens"})
    tokens: Annotated[int, Field(ge=16)] = field(default=16384, metadata={"doc": "calibration tokens that are used"})

    def gate(self, block: GateBlock) -> None:
        """A predictor at the layer that each activation reads."""
        for mlp in maskable(block):
            self._mlp(block, mlp)

    def _mlp(self, block: GateBlock, mlp: Mlp) -> None:
        name = mlp.writers[0]
        x, p = _seen(block, mlp, self.tokens)
        if len(x) < 2:
            block.leave(name, UNREACHED)
            return
        site = block.sites[mlp.reader]
        active = p.abs() > _level(p, site.share)
        cut = max(1, round(len(x) * (1.0 - _HELD)))
        rank = site.method.rank or max(16, x.shape[1] // 8)
        gate = LowRank(x.shape[1], mlp.neurons, rank)
        seeded(gate, block.seed)
        chance = active[:cut].float().mean(0).clamp(1e-3, 1 - 1e-3)
        with torch.no_grad():
            gate.out.bias.copy_(chance.logit())
        train(_Logits(gate), x[:cut], active[:cut].float(), nn.BCEWithLogitsLoss(), site.method.epochs, block.seed)
        with torch.no_grad():
            logits = Histogram()
            logits.add(gate.logits(x[:cut]))
            gate.threshold.fill_(logits.quantile(site.share))
            tally = Tally()
            tally.add(gate.mask(x[cut:]), active[cut:])
        weight = block.module_of(name).get_parameter("weight")
        block.put(name, "output", gate.to(weight.dtype), site.share, [tally.sentence])


def _seen(block: GateBlock, mlp: Mlp, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLP reads [T, K] and its neurons [T, N], fp32, of up to ``most`` tokens, the first ones."""
    xs: list[torch.Tensor] = []
    ps: list[torch.Tensor] = []

    def into(found: list[torch.Tensor], value: torch.Tensor) -> None:
        left = most - sum(map(len, found))
        if left > 0:
            found.append(value[:left].cpu().clone())

    block.watch({mlp.writers[0]: lambda x: into(xs, x), mlp.reader: lambda p: into(ps, p)})
    if not xs or not ps:
        return torch.zeros(0, 1), torch.zeros(0, mlp.neurons)
    return torch.cat(xs), torch.cat(ps)


def _level(p: torch.Tensor, share: float) -> float:
    seen = Histogram()
    seen.add(p)
    return seen.within(share)
