"""CATS: whatever is small after the activation of an MLP becomes zero, and its neuron need not be computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsec.passes.gates.forms import Threshold
from sparsec.passes.gates.thresholds import UNREACHED, ZEROS, histograms

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock


@dataclass(frozen=True)
class CATS:
    """Zero what is small after an MLP's activation: neurons whose up and down are then not needed.

    g 1[|g| > t], g = act(x W_gate), t the quantile of |g| over the calibration tokens; the product with up carries the
    zeros to down. In an MLP without a gate, g is what its second layer reads. Source: Lee et al., "CATS: Contextually-
    Aware Thresholding for Sparsity in Large Language Models", 2024, section 3.

    Differs from the paper's code: its histogram holds [-2, 2] and gives the left edge of a bin; here nothing is cut
    off, and |g| = t is zeroed.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("neurons",)
    source: ClassVar[str] = "Lee et al., 2024"
    cost: ClassVar[str] = "three forwards"

    def gate(self, block: GateBlock) -> None:
        """A threshold after the activation of every MLP."""
        for mlp in block.mlps:
            at = mlp.act if mlp.gated else mlp.reader
            seen = histograms(block, [at], "out" if mlp.gated else "in")[at]
            if not seen.count:
                block.leave(at, UNREACHED)
                continue
            share = block.sites[mlp.reader].share
            gate = Threshold.at(seen.within(share))
            block.put(at, "activation" if mlp.gated else "input", gate, share, _notes(seen.zeros == seen.count))


def _notes(zeros: bool) -> list[str]:
    return [ZEROS] if zeros else []
