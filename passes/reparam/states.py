"""The two views of a block's layers joined: modules by their name inside the block, and their ``LayerState``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.passes.masks.block import Block, LayerState
from sparsec.passes.reparam.fold import Edit, matrix, settle, written
from sparsec.passes.reparam.probe import Probe


def local_states(probe: Probe) -> dict[str, LayerState]:
    """Local name -> state, for layers of the step; told by the weight's memory, so that names need not agree."""
    by_place = {(s.weight.data_ptr(), tuple(s.weight.shape)): s for s in probe.block.layers}
    found = {}
    for name, module in probe.layers.items():
        weight = matrix(module)
        if weight is not None and (state := by_place.get((weight.data_ptr(), tuple(weight.shape)))):
            found[name] = state
    return found


def write_all(probe: Probe, states: Mapping[str, LayerState], edits: Sequence[Edit]) -> bool:
    """Write the edits for good and bring the states up to date; False where the block's outputs would change."""
    with written(probe.modules, edits) as keep:
        if not probe.unchanged():
            return False
        keep()
    settle(states, edits)
    return True


def briefly(block: Block, names: Sequence[str]) -> str:
    """Layers as a sentence about the block calls them: without the block's own name."""
    return ", ".join(name.removeprefix(f"{block.name}.") for name in names)
