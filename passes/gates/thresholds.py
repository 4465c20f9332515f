"""What methods with thresholds share: histograms of what layers read, and thresholds put where a share falls below.

In: a block, names of layers that read one and the same tensor. Out: gates in the block, each with a quantile of |x|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.passes.gates.contract import GateBlock, Side
from sparsec.passes.gates.forms import Threshold
from sparsec.passes.gates.histogram import Histogram

UNREACHED = "no token reached it, so nothing says where its threshold lies"
ZEROS = "it read nothing but zeros, which stay zeros at any threshold"


def histograms(block: GateBlock, names: Sequence[str], side: Side = "in") -> dict[str, Histogram]:
    """Of everything that each of these modules reads or gives, in one run of the block."""
    found = {name: Histogram() for name in names}
    block.watch({name: found[name].add for name in names}, side)
    return found


def gate_inputs(block: GateBlock, only: Sequence[str] | None = None, shares: Mapping[str, float] | None = None) -> None:
    """Threshold what each site reads, in the order in which they run, so that each is calibrated on what the gates
    before it leave.

    ``only``: some of the sites. ``shares``: of each, instead of the sparsity that the recipe asks for.
    """
    for names in block.groups():
        names = [name for name in names if only is None or name in only]
        if not names:
            continue
        seen = histograms(block, names[:1])[names[0]]
        for name in names:
            put_threshold(block, name, seen, block.sites[name].share if shares is None else shares[name])


def put_threshold(block: GateBlock, name: str, seen: Histogram, share: float) -> None:
    """Gate the input of one layer so that ``share`` of what was seen becomes zero; a row says why where it cannot."""
    if not seen.count:
        block.leave(name, UNREACHED)
        return
    notes = [ZEROS] if seen.zeros == seen.count else []
    block.put(name, "input", Threshold.at(seen.within(share)), share, notes)
