"""SCAP: whatever is near the mode of a layer's inputs becomes zero, and the mode itself goes into the bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from sparsec.passes.gates.forms import Centred
from sparsec.passes.gates.thresholds import UNREACHED, histograms, put_threshold

if TYPE_CHECKING:
    from sparsec.passes.gates.contract import GateBlock
    from sparsec.passes.gates.histogram import Histogram

Mode: TypeAlias = Literal["zero", "median", "kde"]


@dataclass(frozen=True)
class SCAP:
    """Zero inputs that are near their mode, which is folded into the bias first.

    (x - c) 1[|x - c| > t], then W and the bias b + W c, which is W x where nothing is zeroed. c: the median of the
    layer's inputs, the peak of their density, or zero; t the quantile of |x - c|. What non-ReLU activations give has
    its mode off zero. Source: Chua et al., "Post-Training Statistical Calibration for Higher Activation Sparsity",
    2024, equations 3 to 5. Thresholds are calibrated with everything upstream gated already.
    """

    role: ClassVar[str] = "gate"
    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    source: ClassVar[str] = "Chua et al., 2024"
    cost: ClassVar[str] = "six forwards"

    mode: Mode = field(default="median", metadata={"doc": "what inputs are centred on: zero, median, kde"})

    def gate(self, block: GateBlock) -> None:
        """A centred threshold in front of every site, in the order in which they run."""
        for names in block.groups():
            seen = histograms(block, names[:1])[names[0]]
            for name in names:
                mode, share = block.sites[name].method.mode, block.sites[name].share
                if not seen.count:
                    block.leave(name, UNREACHED)
                elif (centre := _centre(seen, mode)) == 0.0:
                    put_threshold(block, name, seen, share)  # nothing to fold
                else:
                    block.put(name, "input", Centred.at(centre, seen.within(share, centre)), share)


def _centre(seen: Histogram, mode: Mode) -> float:
    if mode == "zero":
        return 0.0
    return seen.quantile(0.5) if mode == "median" else seen.peak()
