"""Timing a report's model in this process: what ``measure=True`` adds.

In: an Explanation and its model. Out: the same with measured times. Each distinct layer is timed as it would run
against ``F.linear`` (or ``F.conv2d``), in turns in one run, on random x of the right shape. Identical layers (up to
TOGETHER) are called one after the other, so that no weight sits in the nearest cache by itself. The whole model is
timed on the given inputs by the function that ``sparsec bench`` uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsec import whole_model
from sparsec.facts import Conv
from sparsec.formats import Format
from sparsec.measure_conv import image
from sparsec.passes.graph import DTYPES
from sparsec.report_data import AtBatch, Cost, Layer, Measured, Whole, percent
from sparsec.report_fold import Group, total
from sparsec.runtime.direct import convolve
from sparsec.timing import interleave, speedup

if TYPE_CHECKING:
    from sparsec.explain import Explanation, Progress

TOGETHER = 8
ROUNDS = 25
SECONDS = 1.0  # per layer and batch
WHOLE_SECONDS = 10.0  # for the rounds of the whole model, once it is compiled; never below five rounds
WHOLE_STEPS = 10  # of progress
APART = 0.05  # outputs that differ by this share of the largest value are worth a sentence; rounding stays below
MOST_ROWS = 4096  # more rows take time and memory and change no ratio: both sides are linear there
BUSY = (
    "the times measured here are several times those expected, so other programs kept the cores busy; "
    "run again on an idle machine"
)
TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Weights:
    """One layer's parameters: weight [N, K] and bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def measured(
    report: Explanation, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], tell: Progress
) -> Explanation:
    """Time every distinct layer at every batch, and the whole model on the given inputs."""
    layers_steps = len(report.groups) * len(report.batches)
    steps = layers_steps + WHOLE_STEPS

    def tell_whole(what: str, share: float) -> None:
        tell(layers_steps + int(WHOLE_STEPS * share), steps, f"the whole model: {what}")

    report = with_layers(report, model, lambda done, name: tell(done, steps, name))
    report = with_whole(report, model, args, kwargs, tell_whole)
    tell(steps, steps, "")
    return replace(report, helps=(*report.helps, *losses(report)))


def with_layers(report: Explanation, model: torch.nn.Module, tell: Callable[[int, str], None]) -> Explanation:
    """Add the times of the layers. ``tell``: how many were timed, and the next one's name."""
    layers = list(report.layers)
    done = itertools.count()
    notes = list(report.notes)
    with torch.no_grad():
        for group in report.groups:
            weights = [w for layer in group.layers[:TOGETHER] if (w := find(model, layer)) is not None]
            if not weights:
                notes.append(f"{group.name} could not be timed: its weight was not found in the model by that name")
                next(done)
                continue
            for i in range(len(report.batches)):
                tell(next(done), group.name)
                found = time_group(group, weights, group.first.at[i], report.options.policy.target)
                for index in group.members:
                    layers[index] = _with(layers[index], i, found)
    if busy(report.expected(), layers):
        notes.append(BUSY)
    if any(at.rows > MOST_ROWS for layer in layers for at in layer.at):
        notes.append(f"times of more than {MOST_ROWS} rows are those of {MOST_ROWS} rows, scaled")
    return replace(report, layers=tuple(layers), notes=tuple(notes))


def with_whole(
    report: Explanation,
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tell: whole_model.Tell = lambda what, share: None,
) -> Explanation:
    """Add the times of the whole model. What goes wrong becomes a note: the report is there without them."""
    from sparsec.explain import batch_of, causes, first_line

    try:
        timed = _time_whole(report, model, args, kwargs, tell)
    except Exception as error:
        cause = causes(error)[-1]
        said = f"the whole model could not be measured: {type(cause).__name__}: {first_line(cause)}"
        return replace(report, notes=(*report.notes, said))
    ratio, dense = timed.ratio, timed.dense.best
    whole = Whole(dense, dense / ratio.value, ratio.low, ratio.high, timed.base, batch_of(args, kwargs))
    notes = [*report.notes, *timed.notes]
    if timed.difference > APART:
        notes.append(
            f"the outputs of the two engines differ by {percent(timed.difference)} of the largest value"
            + (
                "; the model is in training mode, where layers may draw at random"
                if getattr(model, "training", False)
                else ""
            )
        )
    return replace(report, whole=whole, notes=tuple(notes))


def _time_whole(
    report: Explanation,
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tell: whole_model.Tell,
) -> whole_model.BothTimed:
    from sparsec.runtime.store import borrowed

    with borrowed(model):
        return whole_model.time_both(
            model,
            lambda call: lambda: call(*args, **kwargs),
            report.options.to_dict(),
            rounds=ROUNDS,
            budget_s=WHOLE_SECONDS,
            tell=tell,
        )


def losses(report: Explanation) -> list[str]:
    """Where the cost model promised a gain and the clock says loss: what to do about it."""
    lost = [g.name for g in report.groups if (c := g.cost(0, measured=True)) and isinstance(c, Measured) and c.high < 1]
    if not lost:
        return []
    remedy = f"sparsec tune {report.spec}" if report.spec else 'options={"tune": "quick"}'
    return [f"decide by measurement ({remedy}): dense was faster here than expected on {', '.join(lost)}"]


def busy(expected: Cost | None, layers: Sequence[Layer]) -> bool:
    """Whether times are far from those of an idle machine, which the cost model's rates are.

    Dense took three times as long in all, or one layer ten times: threads that wait for a core that others hold.
    """
    found = total(layers, 0, measured=True)
    if expected is None or found is None:
        return False
    stalled = any(x.measured and x.expected and x.measured.ours_s > 10 * x.expected.ours_s for x in layers)
    return stalled or found.dense_s > 3 * expected.dense_s


def find(model: torch.nn.Module, layer: Layer) -> Weights | None:
    """A layer's weight as [N, K] and its bias, by the layer's name: a module with ``weight``, or a parameter."""
    site = layer.record.site
    owner: Any = model
    for part in filter(None, layer.name.split(".")):
        owner = getattr(owner, part, None)
    weight = owner if isinstance(owner, torch.Tensor) else getattr(owner, "weight", None)
    bias = None if isinstance(owner, torch.Tensor) else getattr(owner, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.numel() != layer.shape[0] * layer.shape[1]:
        return None
    weight = weight.detach()
    matrix = weight.t() if site.transposed else weight
    if site.conv:
        matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    if tuple(matrix.shape) != layer.shape:
        return None
    return Weights(matrix, bias.detach() if site.bias is not None and isinstance(bias, torch.Tensor) else None)


def time_group(group: Group, weights: Sequence[Weights], at: AtBatch, target: str) -> Measured:
    """Seconds of a call at one batch: dense, and as decided, with the interval of the ratio."""
    generator = torch.Generator().manual_seed(0)
    dtype = TORCH[group.first.record.site.dtype]
    rows = min(at.rows, MOST_ROWS)
    walk = conv.about(rows) if (conv := group.first.record.site.conv) else None
    if walk is None:
        x = torch.randn(rows, group.first.shape[1], generator=generator).to(dtype)
    else:
        batch, high, wide = walk.image
        rows, x = walk.rows, image(batch, group.first.shape[1] // math.prod(walk.kernel), high, wide, dtype)
    scale = at.rows / rows
    functions: dict[str, Callable[[], object]] = {"dense": _turns([_dense(w, x, walk) for w in weights])}
    if at.decision != "dense":
        functions["ours"] = _turns([_ours(w, x, at, target, walk) for w in weights])
    samples = interleave(functions, rounds=ROUNDS, budget_s=SECONDS)
    dense = samples["dense"].best * scale
    if "ours" not in samples:
        return Measured(dense, dense, 1.0, 1.0)
    ratio = speedup(samples["dense"], samples["ours"])
    return Measured(dense, dense / ratio.value, ratio.low, ratio.high)


def _dense(w: Weights, x: torch.Tensor, walk: Conv | None) -> Callable[[], object]:
    if walk is not None:
        return lambda: convolve(x, w.weight, walk, w.bias)
    return lambda: torch.nn.functional.linear(x, w.weight, w.bias)


def _ours(w: Weights, x: torch.Tensor, at: AtBatch, target: str, walk: Conv | None) -> Callable[[], object]:
    from sparsec.runtime.direct import Direct

    direct = Direct(w.weight, Format.parse(at.decision), at.kernel, w.bias, target=target, conv=walk)
    return lambda: direct(x)


def _turns(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Calls one function after the other, one a call."""
    if len(functions) == 1:
        return functions[0]
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def _with(layer: Layer, index: int, found: Measured) -> Layer:
    at = list(layer.at)
    at[index] = replace(at[index], measured=found)
    return replace(layer, at=tuple(at))
