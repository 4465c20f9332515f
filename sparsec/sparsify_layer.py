"""One layer of ``sparsify``: a job and its statistics in, its mask chosen and written, a row of the report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.errors import UnprunableLayer
from sparsec.passes.masks.block import LayerState
from sparsec.passes.masks.contract import Choose, Pruned, Scores, Statistics, pattern_of, prune
from sparsec.passes.masks.magnitude import Magnitude
from sparsec.passes.masks.norms import finite
from sparsec.passes.masks.outliers import Outliers, with_outliers
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector, select_pool
from sparsec.passes.quantize.inputs import TOP, inputs_of, refusal, set_inputs
from sparsec.prunable import Job
from sparsec.recipe_steps import Values
from sparsec.recipe_steps import pattern_of as pattern_in
from sparsec.sparsify_report import PrunedLayer


def state_of(job: Job, stats: Statistics, sparsity: float | torch.Tensor) -> LayerState:
    share = float(sparsity.mean()) if isinstance(sparsity, torch.Tensor) else sparsity
    pattern = MaskPattern.parse(pattern_in(job.step))
    if pattern.kind == "nm" and pattern.sparsity != share:  # an allocator's: see ``sparsify_spread``
        m = pattern.params[1]
        kept = max(1, round(m * (1.0 - share)))
        pattern = MaskPattern("nm", (kept, m)) if kept < m else MaskPattern()
    dense = job.layer.matrix.float().clone()
    choose = chooser(job, sparsity, pattern)
    return LayerState(job.layer.name, job.layer.matrix, dense, stats, choose, job.step.method_object(), share)


def prune_state(job: Job, state: LayerState) -> None:
    """Choose one layer's mask and write its weight; ``state.keep`` is the mask."""
    method: Any = Magnitude() if unknown_inputs(state) else state.method
    pruned = prune(method, state.dense, state.stats, Finite(state.choose, job.layer.name))
    state.keep = pruned.keep
    write(job, written(state.weight, pruned))  # not of the fp32 copy: kept weights of float64 stay what they are


def unknown_inputs(state: LayerState) -> str:
    """Why the method of a layer has nothing to go by; "" where it has."""
    if not state.method.needs or state.method.role == "quantize":  # rounding needs no scores
        return ""
    if not int(state.stats["tokens"]):
        return "no token reached it"  # an expert
    zero = "xxt" in state.method.needs and not bool(state.stats["xxt"].diagonal().any())
    return "all of its inputs were zero" if zero else ""


def round_inputs(job: Job, module: nn.Module, stats: Statistics) -> tuple[str, tuple[str, ...]]:
    """Make a layer round its inputs where its step says so; gives what ``inputs_of`` says now, and notes."""
    said = getattr(job.step, "activations", "none")
    if said == "none":
        return inputs_of(module), ()
    if why := refusal(module):
        return "", (f"its inputs stay as they are: {why}",)
    if said == "int8":
        set_inputs(module, "int8")
        return inputs_of(module), ()
    top = float(finite(stats, "absmax").max())
    if not 0 < top / TOP < float("inf"):
        set_inputs(module, "int8")
        return inputs_of(module), ("it read nothing but zeros, so its inputs are rounded per token",)
    set_inputs(module, f"int8:{top / TOP!r}")
    return inputs_of(module), ()


def row_of(
    job: Job, state: LayerState, sample: torch.Tensor, number: int, notes: Sequence[str], inputs: str = ""
) -> PrunedLayer:
    new = state.weight.float()
    size, lost = torch.linalg.vector_norm(state.dense), torch.linalg.vector_norm(state.dense - new)
    out = torch.linalg.vector_norm(sample @ state.dense.t()).item() if len(sample) else 0.0
    moved = torch.linalg.vector_norm(sample @ (state.dense - new).t()).item() if len(sample) else 0.0
    unseen = (f"{why}: pruned by magnitude",) if (why := unknown_inputs(state)) else ()
    return PrunedLayer(
        **{**_about(job, number), "asked": state.sparsity},
        achieved=1.0 - new.count_nonzero().item() / new.numel(),
        error=(lost / size).item() if size else 0.0,
        output_error=(moved / out if out else 0.0) if len(sample) else None,
        inputs=inputs,
        notes=(*job.notes, *unseen, *notes),
    )


def _about(job: Job, number: int) -> dict[str, Any]:
    layer, step = job.layer, job.step
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "method": step.method,
        "pattern": pattern_in(step),
        "values": step.grid if isinstance(step, Values) else "",
        "scope": str(step.scope),
        "asked": float(step.sparsity or 0.0),
        "step": number,
        "tied": layer.tied,
    }


def chooser(job: Job, sparsity: float | torch.Tensor, pattern: MaskPattern | None = None) -> Choose:
    """One layer's pattern, quota and scope, and its outliers aside. ``pattern``: where it is not the step's."""
    step = job.step
    norm = step.method_object().norm
    select = Selector(pattern or MaskPattern.parse(pattern_in(step)), sparsity, str(step.scope), norm)
    return with_outliers(select, Outliers.parse(step.outliers))


def choosers_of(jobs: Sequence[Job]) -> dict[Job, Choose]:
    """A ``Choose`` for each job. Jobs of scope global with the same settings share a threshold."""
    choosers: dict[Job, Choose] = {}
    pools: dict[tuple[Any, MaskPattern, float, Outliers | None], list[Job]] = {}
    for job in jobs:
        pattern, step = MaskPattern.parse(pattern_in(job.step)), job.step
        method, sparsity = step.method_object(), float(step.sparsity or 0.0)
        if step.scope == "global" and pattern.sparsity is None:
            pools.setdefault((method, pattern, sparsity, Outliers.parse(step.outliers)), []).append(job)
        else:
            choosers[job] = chooser(job, sparsity)
    for (method, pattern, sparsity, outliers), members in pools.items():
        scores = [_scorer(method, job, outliers) for job in members]
        selectors = select_pool(scores, pattern, sparsity, norm=method.norm)
        choosers.update(zip(members, [with_outliers(one, outliers) for one in selectors], strict=True))
    return choosers


def _scorer(method: Scores, job: Job, outliers: Outliers | None) -> Callable[[], torch.Tensor]:
    def score() -> torch.Tensor:
        with torch.no_grad():
            found = method.score(job.layer.matrix, {})
            return found if outliers is None else outliers.rest(found)

    return score


def prune_job(job: Job, stats: Statistics, choose: Choose, number: int) -> PrunedLayer:
    """Make one layer's mask, then write it; gives its row of the report."""
    layer = job.layer
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
        weight = layer.matrix
        pruned = prune(job.step.method_object(), weight, stats, Finite(choose, layer.name))
        new = written(weight, pruned)
        size = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        lost = torch.linalg.vector_norm(weight - new, dtype=torch.float64).item()
        weight.copy_(new)
        achieved = 1.0 - new.count_nonzero().item() / new.numel()
    empty = ("every weight of it is zero now",) if achieved == 1.0 else ()
    error = lost / size if size else 0.0
    return PrunedLayer(**_about(job, number), achieved=achieved, error=error, notes=(*job.notes, *empty))


def write(job: Job, new: torch.Tensor) -> None:
    """In place; inference tensors may only be written in inference mode."""
    with torch.inference_mode(job.layer.weight.is_inference()), torch.no_grad():
        job.layer.matrix.copy_(new)


def written(weight: torch.Tensor, pruned: Pruned) -> torch.Tensor:
    """The new weight: kept values, and +0.0 (never -0.0) where the mask prunes."""
    values = weight if pruned.values is None else pruned.values.to(weight.dtype)
    return values.masked_fill(~pruned.keep, 0.0)


@dataclass(frozen=True)
class Finite:
    """``Choose`` that refuses scores which are not numbers."""

    choose: Choose
    name: str

    @property
    def pattern(self) -> MaskPattern:
        return pattern_of(self.choose)

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        if bool(score.isnan().any()):
            raise UnprunableLayer(name=self.name, why="its scores are not numbers", help="Check the calibration data.")
        return self.choose(score, start)
