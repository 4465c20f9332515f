"""Channel permutation for N:M and V:N:M: strong in-features are spread over groups, folded into what feeds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from sparsec.errors import BadRecipe
from sparsec.passes.masks.block import Block, LayerState
from sparsec.passes.masks.contract import Scores
from sparsec.passes.masks.norms import column_norm
from sparsec.passes.masks.pattern import VNM_COLUMNS, MaskPattern
from sparsec.passes.reparam.contract import Folded
from sparsec.passes.reparam.fold import Edit
from sparsec.passes.reparam.neighbours import Feed, Wiring, wiring
from sparsec.passes.reparam.probe import Probe
from sparsec.passes.reparam.search import deal, reassign, swap
from sparsec.passes.reparam.states import briefly, local_states, write_all


@dataclass(frozen=True)
class Permute:
    """Reorder channels so that an N:M or V:N:M pattern keeps more.

    Maximises the sum of the kept scores of the mask step's method under its pattern (a method without scores of its
    own is taken for Wanda: |W| * |X_j|). ``ria``: features ranked by summed score are dealt snake-wise into M strips,
    then each strip is dealt anew by a linear assignment (Zhang et al., "Plug-and-Play", 2024, section 3.3).
    ``e-sparse``: dealt by norm without turning, then swapped greedily within blocks of ``block`` features (Li et al.,
    "E-Sparse", 2023, section 3.2). For V:N:M (Zhao et al., 2024) the same search runs on scores summed over V rows
    with four columns kept of M, which is what decides its columns.

    Differs from RIA's code: the assignment is an auction within 0.1 % of the optimum; the search reads at most
    ``rows`` rows, evenly spaced; an order is taken only where the whole layer keeps more by it (and, for V:N:M, where
    the layers whose rows move lose no more than that). Only orders that can be written into the layers before are
    looked for: whole MLPs, and the channels inside a head.
    """

    role: ClassVar[str] = "reparam"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    source: ClassVar[str] = "Zhang et al., 2024 (RIA); Li et al., 2023 (E-Sparse)"
    cost: ClassVar[str] = "one pass over the data, and seconds to minutes a layer"

    search: Literal["ria", "e-sparse"] = field(default="ria", metadata={"doc": "how orders are looked for"})
    refine: bool = field(default=True, metadata={"doc": "linear assignment (ria) or swaps (e-sparse) after dealing"})
    block: Annotated[int, Field(ge=2)] = field(
        default=256, metadata={"doc": "features that e-sparse swaps among each other"}
    )
    rows: Annotated[int, Field(ge=1)] = field(default=512, metadata={"doc": "rows of scores that the search reads"})
    residual: bool = field(default=False, metadata={"doc": "also permute where a gather would stay (not yet possible)"})

    def __post_init__(self) -> None:
        if self.residual:
            raise BadRecipe(
                detail="residual of permute is true, but orders that leave a gather in the model are not built; "
                "leave it out to get those that fold"
            )

    def apply(self, block: Block) -> Folded:
        """Permute what can be permuted; see ``Reparam``."""
        patterns = {state.name: _pattern(state) for state in block.layers}
        grouped = {name for name, pattern in patterns.items() if pattern is not None}
        if not grouped:
            return Folded(notes=(f"{block.name}: no layer has an N:M or V:N:M pattern, so their order is left alone",))
        probe = Probe(block)
        found, states = wiring(probe), local_states(probe)
        edits: list[Edit] = []
        kept: list[tuple[str, float, float]] = []
        notes = list(found.notes)
        held: set[str] = set()
        for feed in found.feeds:
            state = states.get(feed.consumer)
            if state is None or state.name not in grouped or not feed.movable:
                continue
            if masked := _held(probe, feed):
                held.add(state.name)
                notes.append(f"{state.name}: an earlier step gave {masked} a mask that its order would break")
                continue
            chosen = self._best(feed, found, states, state)
            kept.append((state.name, chosen.before, chosen.after))
            edits += chosen.edits
        foldable = {name for name, _, _ in kept} | held
        left = [state.name for state in block.layers if state.name in grouped and state.name not in foldable]
        if left:
            notes.append(f"{block.name}: orders of {briefly(block, left)} would need a gather and are left alone")
        if not write_all(probe, states, edits):
            notes.append(f"{block.name}: the orders changed the block's outputs, so none was written")
            return Folded(gathers=len(left), kept=tuple((n, b, b) for n, b, _ in kept), notes=tuple(notes))
        folded = tuple(probe.name(edit.layer) for edit in edits if edit.side == "in")
        return Folded(folded, len(left), tuple(kept), tuple(notes))

    def _best(self, feed: Feed, found: Wiring, states: Mapping[str, LayerState], state: LayerState) -> _Chosen:
        """The order found for one layer, or no edits where the pattern would not keep more by it."""
        pattern = _pattern(state)
        assert pattern is not None
        score = scores_of(state)
        before = share(state, score)
        searched, n, m = _reduced(score, pattern, self.rows, state.method.norm)
        order = feed.order([self._order(torch.cat(list(searched[:, g].unbind(2))), n, m) for g in feed.groups])
        after = share(state, score[:, order.to(score.device)])
        edits = feed.permute(order, found.heights)
        lost = sum(_lost(states[e.layer], e) for e in edits if e.side == "out" and e.layer in states)
        if after <= before or after - before < lost:
            return _Chosen(before, before, [])
        return _Chosen(before, after, edits)

    def _order(self, score: torch.Tensor, n: int, m: int) -> torch.Tensor:
        """An order of the columns of a score [R, T]."""
        if score.shape[1] < 2 * m:  # one whole group: nothing to choose
            return torch.arange(score.shape[1])
        order = deal(score, m, snake=self.search == "ria")
        if not self.refine:
            return order
        if self.search == "ria":
            return reassign(score, order, n, m)
        return swap(score, order, n, m, block=self.block)


def _held(probe: Probe, feed: Feed) -> str:
    """Layers that the feed would reorder and that hold a mask of an earlier step in that order; empty: none."""
    sides = [(feed.consumer, "in"), *((source.name, "out") for source in feed.sources)]
    found = [layer for layer, side in sides if (probe.name(layer), side) in probe.block.held]
    return briefly(probe.block, list(dict.fromkeys(found)))


@dataclass(frozen=True, eq=False)
class _Chosen:
    before: float
    after: float
    edits: list[Edit]


def scores_of(state: LayerState) -> torch.Tensor:
    """[N, K] of the step's mask method, or Wanda's where it has none or its statistics are not there yet."""
    method, stats = state.method, state.stats
    with torch.no_grad():
        if isinstance(method, Scores) and all(name in stats for name in method.needs):
            return method.score(state.weight.float(), stats)
        score = state.weight.float().abs()
        return score * column_norm(stats).to(score) if bool(stats["sum_x2"].any()) else score


def share(state: LayerState, score: torch.Tensor) -> float:
    """The share of a score's sum that the layer's pattern keeps, 0 to 1 (1 for an all-zero score)."""
    total = float(score.double().sum())
    return float(score[state.choose(score)].double().sum()) / total if total > 0 else 1.0


def _lost(state: LayerState, edit: Edit) -> float:
    """What a layer whose rows move loses: nothing where rows do not share a pattern."""
    pattern = _pattern(state)
    if pattern is None or pattern.kind != "vnm" or edit.order is None:
        return 0.0
    score = scores_of(state)
    return share(state, score) - share(state, score[edit.order.to(score.device)])


def _pattern(state: LayerState) -> MaskPattern | None:
    """The layer's pattern where the order of columns matters to it and a search exists."""
    pattern = getattr(state.choose, "pattern", None)
    return pattern if isinstance(pattern, MaskPattern) and pattern.kind in ("nm", "vnm") else None


def _reduced(score: torch.Tensor, pattern: MaskPattern, rows: int, norm: str) -> tuple[torch.Tensor, int, int]:
    """The scores that an order is searched on, and n and m: for V:N:M, sums over V rows with four of M kept."""
    n, m = pattern.params[-2:]
    if pattern.kind == "vnm" and m > VNM_COLUMNS:
        worth = score.square() if norm == "l2" else score
        score, n = torch.stack([part.sum(0) for part in torch.split(worth, pattern.params[0])]), VNM_COLUMNS
    if len(score) > rows:
        score = score[torch.linspace(0, len(score) - 1, rows).round().long().to(score.device)]
    return score, n, m
