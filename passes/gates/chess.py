"""CHESS: thresholds of each channel in the MLP, by what its gate is multiplied with; in attention before q and o."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from sparsec.passes.gates.forms import Threshold
from sparsec.passes.gates.histogram import Histogram
from sparsec.passes.gates.thresholds import UNREACHED, ZEROS, gate_inputs

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.mlps import Mlp


@dataclass(frozen=True)
class CHESS:
    """Zero neurons by |gate| times the mean |up| of their channel; in attention, inputs of q and o.

    g_i 1[|g_i| > t_i], t_i = T / E|u_i|, u = x W_up, T the quantile of |g_i| E|u_i| over tokens and channels: what goes
    is what changes the product least. In attention |x| > t before the query and the output projection only. Source: He
    et al., "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification", 2024,
    sections 4.1 and 4.2. An MLP without a gate has no up: one threshold, as ``cats`` has.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons", "inputs")
    source: ClassVar[str] = "He et al., 2024"
    cost: ClassVar[str] = "six forwards"

    attention: bool = field(default=True, metadata={"doc": "false: the MLP only"})

    def gate(self, block: GateBlock) -> None:
        """First attention, which feeds the MLP."""
        if self.attention:
            gate_inputs(block, sorted(block.queries_and_outputs))
        for mlp in block.mlps:
            self._mlp(block, mlp)

    def _mlp(self, block: GateBlock, mlp: Mlp) -> None:
        at, up = (mlp.act, _ups(block, mlp)) if mlp.gated else (mlp.reader, torch.ones(mlp.neurons))
        seen = Histogram()

        def see(g: torch.Tensor) -> None:
            seen.add(g * up.to(g.device))

        block.watch({at: see}, "out" if mlp.gated else "in")
        if not seen.count:
            block.leave(at, UNREACHED)
            return
        share = block.sites[mlp.reader].share
        level = seen.within(share)
        # a channel whose up is always zero gives nothing: any finite gate may go
        each = torch.where(up > 0, level / up.clamp(min=1e-30), torch.finfo(torch.float32).max)
        gate = Threshold.at(each.clamp(max=torch.finfo(torch.float32).max) if mlp.gated else level)
        notes = [ZEROS] if seen.zeros == seen.count else []
        block.put(at, "activation" if mlp.gated else "input", gate, share, notes)


def _ups(block: GateBlock, mlp: Mlp) -> torch.Tensor:
    """[neurons] fp32: mean over tokens of |up|. Fused gate and up: up is the half that is not activated."""
    total, count = torch.zeros(mlp.neurons), 0

    def see(u: torch.Tensor) -> None:
        nonlocal count
        total.add_(u[:, -mlp.neurons :].abs().sum(0).cpu())
        count += len(u)

    by: dict[str, Callable[[torch.Tensor], None]] = {mlp.writers[-1]: see}
    block.watch(by, "out")
    return total / max(count, 1)
