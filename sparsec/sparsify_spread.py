"""Which sparsity an allocator gives each layer of a stage, as its mask step can use it.

In: the stage, its jobs, and either the blocks of the dense model or one block that is about to be compressed. Out:
layer -> sparsity. Layers to which ``overrides`` gives a sparsity or a pattern of their own keep it: they are neither
measured nor counted in the mean. For N:M the shares are moved to whole numbers of M, none of them to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from sparsec.blockwise import BlockRun
from sparsec.passes.masks.allocate.contract import Allocation, Dense, Learns, Measured
from sparsec.passes.masks.allocate.spread import keep_of_m
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.prunable import Job
from sparsec.recipe_steps import pattern_of
from sparsec.sparsify_layer import state_of
from sparsec.stages import Stage

if TYPE_CHECKING:
    import torch

Sparsities = Mapping[str, "float | torch.Tensor"]
Share = TypeVar("Share", "float", "float | torch.Tensor")


def learner_of(stage: Stage) -> Learns | None:
    method = stage.allocate.method_object() if stage.allocate else None
    return method if isinstance(method, Learns) else None


def spread_over(stage: Stage, jobs: Mapping[str, Job]) -> dict[str, Job]:
    """The jobs that the allocator of a stage decides for."""
    mask = stage.mask
    if stage.allocate is None or mask is None:
        return {}
    said = (mask.sparsity, pattern_of(mask))
    return {name: job for name, job in jobs.items() if (job.step.sparsity, pattern_of(job.step)) == said}


def left_out(stage: Stage, jobs: Mapping[str, Job]) -> list[str]:
    """A note on the layers that keep what overrides says, where there are any."""
    own = [name for name in jobs if name not in spread_over(stage, jobs)]
    if stage.allocate is None or not own:
        return []
    return [f"{stage.allocate.method}: overrides decides for {_some(own)}, with no part in its mean"]


def unlearned(stage: Stage, jobs: Mapping[str, Job]) -> list[str]:
    """A note on layers outside the list of blocks, whose sparsity no block can learn."""
    names = list(spread_over(stage, jobs))
    if stage.allocate is None or learner_of(stage) is None or not names:
        return []
    return [f"{stage.allocate.method} learns inside blocks; {_some(names)} outside of them got {_mean(stage):g}"]


def measured(
    stage: Stage, jobs: Mapping[str, Job], walk: Iterable[BlockRun], whole: Callable[[], BlockRun]
) -> Allocation:
    """What an allocator that measures the dense model decides. ``whole``: the model, for layers outside its blocks."""
    assert stage.allocate is not None
    method, jobs = stage.allocate.method_object(), spread_over(stage, jobs)
    if not jobs:
        return Allocation({})
    found = []
    names = set(jobs)
    for run in walk:
        mine = [n for n in jobs if n.startswith(f"{run.name}.") or n == run.name]
        names -= set(mine)
        found.append(_measure(method, run, {n: jobs[n] for n in mine}))
    if names:
        found.append(_measure(method, whole(), {n: job for n, job in jobs.items() if n in names}))
    allocation = method.allocate([m for m in found if m.layers], _mean(stage))
    return Allocation(_in_groups(stage, allocation.sparsity, jobs), allocation.notes)


def _measure(method: Any, run: BlockRun, jobs: Mapping[str, Job]) -> Measured:
    stats = run.collect(_modules(run, jobs), method.needs) if jobs else {}
    dense = [Dense(n, job.layer.matrix.float(), stats[n]) for n, job in jobs.items()]
    sizes = tuple((n, job.layer.weight.numel()) for n, job in jobs.items())
    times = None
    if method.keeps == "time":
        from sparsec.expected_time import seconds_of

        times = seconds_of({n: job.layer.matrix for n, job in jobs.items()}, method.target, method.rows)
    return Measured(run.name, sizes, method.measure(dense) if dense else {}, times)


def learned(stage: Stage, jobs: Mapping[str, Job], run: BlockRun) -> Sparsities:
    """What an allocator that learns decides for the layers of one block, dense still; {} where none learns."""
    learner, jobs = learner_of(stage), spread_over(stage, jobs)
    if learner is None or not jobs:
        return {}
    assert stage.allocate is not None
    stats = run.collect(_modules(run, jobs), tuple(stage.allocate.method_object().needs))
    run.layers = [state_of(job, stats[n], _mean(stage)) for n, job in jobs.items()]
    found = learner.learn(run, _mean(stage))
    run.layers = []
    return _in_groups(stage, found, jobs)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _modules(run: BlockRun, jobs: Mapping[str, Job]) -> dict[str, nn.Module]:
    return {n: run.module.get_submodule(n.removeprefix(run.name).removeprefix(".")) for n in jobs}


def _mean(stage: Stage) -> float:
    assert stage.mask is not None
    return float(stage.mask.sparsity or 0.0)


def _in_groups(stage: Stage, sparsity: Mapping[str, Share], jobs: Mapping[str, Job]) -> dict[str, Share | float]:
    """Shares that the pattern can hold: of N:M whole numbers of M, of which at least one is kept."""
    assert stage.mask is not None
    pattern = MaskPattern.parse(pattern_of(stage.mask))
    if pattern.kind != "nm":
        return dict(sparsity)
    m = pattern.params[1]
    shares = {name: float(share) for name, share in sparsity.items()}  # rows: ``stages_of`` refuses them
    kept = keep_of_m(shares, {name: jobs[name].layer.weight.numel() for name in shares}, m)
    return {name: 1.0 - n / m for name, n in kept.items()}
