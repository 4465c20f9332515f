"""Weight equalisation: per-channel scales between activations and weights, folded into what feeds a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.passes.masks.block import Block, LayerState
from sparsec.passes.masks.contract import Statistics
from sparsec.passes.masks.norms import finite
from sparsec.passes.reparam.contract import Folded
from sparsec.passes.reparam.fold import Edit, matrix
from sparsec.passes.reparam.neighbours import Wiring, wiring
from sparsec.passes.reparam.probe import Probe
from sparsec.passes.reparam.states import briefly, local_states, write_all

_LEAST = 1e-5  # both clamps of SmoothQuant's code


@dataclass(frozen=True)
class Equalize:
    """Even out channels by scales folded into the layer before.

    s_j = max|X_j|^alpha / max_i|W_ij|^(1 - alpha), the second maximum over all layers that read X; x / s and W * s.
    Source: Xiao et al., "SmoothQuant", 2023, equation 4, as the first step of the 8:16 suite (arXiv 2507.03052).
    Defaults: alpha 0.5, both denominator and s at least 1e-5, as in SmoothQuant's code.

    Differs from that code: (1) a channel that is never active, or whose weights are all zero, keeps its scale (the
    clamps would give it 1e-5 or 1e5); (2) scales are rounded to powers of two unless ``exact`` is false, so that
    folding rounds nothing in any dtype; (3) they are folded wherever a scale was seen to pass (norm -> layers, up ->
    down, v -> o, fc1 -> ReLU -> fc2), not only into norms, unless ``norms_only``.
    Scores of |x| |w| alone (Wanda) do not change by it; magnitude, and RIA, which takes the root of |x|, do.
    """

    role: ClassVar[str] = "reparam"
    needs: ClassVar[tuple[str, ...]] = ("absmax",)
    source: ClassVar[str] = "Xiao et al., 2023, eq. 4; arXiv 2507.03052"
    cost: ClassVar[str] = "one pass over the data"

    alpha: Annotated[float, Field(ge=0, le=1)] = field(
        default=0.5, metadata={"doc": "0: weights decide alone, 1: activations"}
    )
    exact: bool = field(default=True, metadata={"doc": "round scales to powers of two, which folds without rounding"})
    norms_only: bool = field(default=False, metadata={"doc": "fold into norms only, as SmoothQuant does"})

    def apply(self, block: Block) -> Folded:
        """Scale what can be scaled; see ``Reparam``. Raises NonFinite where absmax is not."""
        probe = Probe(block)
        found, states = wiring(probe), local_states(probe)
        edits = [*self._of_norms(probe, found, states)]
        edits += [] if self.norms_only else self._of_feeds(probe, found, states)
        folded = tuple(probe.name(e.layer) for e in edits if e.side == "in")
        left = [state.name for state in block.layers if state.name not in folded]
        notes = list(found.notes)
        if left:
            notes.append(f"{block.name}: nothing takes a scale for {briefly(block, left)}")
        if not write_all(probe, states, edits):
            return Folded(notes=(*notes, f"{block.name}: scales changed the block's outputs, so none was written"))
        return Folded(folded, notes=tuple(notes))

    def scale(self, stats: Statistics, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """s [K], fp32, for layers with these weights [N, K] that read the inputs of ``stats``."""
        active = finite(stats, "absmax")
        heavy = torch.stack([w.abs().amax(0).float().to(active.device) for w in weights]).amax(0)
        return self._scale(active, heavy)

    def _scale(self, active: torch.Tensor, heavy: torch.Tensor) -> torch.Tensor:
        scale = active.pow(self.alpha) / heavy.clamp_min(_LEAST).pow(1.0 - self.alpha)
        scale = scale.clamp_min(_LEAST)
        if self.exact:
            scale = scale.log2().round().exp2()
        return scale.masked_fill((active == 0) | (heavy == 0), 1.0)

    def _of_norms(self, probe: Probe, found: Wiring, states: Mapping[str, LayerState]) -> list[Edit]:
        edits = []
        for feed in found.norms:
            known = [states[name] for name in feed.consumers if name in states]
            if known:
                weights = [_matrix(probe, name) for name in feed.consumers]
                edits += feed.scale(self.scale(known[0].stats, weights).cpu())
        return edits

    def _of_feeds(self, probe: Probe, found: Wiring, states: Mapping[str, LayerState]) -> list[Edit]:
        """Copies of a unit share one scale: the largest activation and weight of them decide."""
        edits = []
        for feed in found.feeds:
            if feed.scaling is None or feed.consumer not in states:
                continue
            state = states[feed.consumer]
            active = state.stats["absmax"].float().cpu().clone()
            heavy = _matrix(probe, feed.consumer).abs().amax(0).float().cpu()
            for units in feed.groups:
                active[units] = active[units].amax(1, keepdim=True).expand(units.shape)
                heavy[units] = heavy[units].amax(1, keepdim=True).expand(units.shape)
            edits += feed.scale(self.scale({"absmax": active}, [heavy[None]]), found.heights)
        return edits


def _matrix(probe: Probe, layer: str) -> torch.Tensor:
    weight = matrix(probe.layers[layer])
    assert weight is not None
    return weight
