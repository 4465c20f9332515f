"""What would help: the decisions that other weights, or other patterns, would get on this machine.

In: an Explanation. Out: the same with break-even points at the rows asked for, and with sentences that name a change
and what the linear layers would gain by it. Nothing is guessed: every number is the decision function's own answer for
a weight of the same shape with more zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsec.facts import Decision, WeightFact
from sparsec.report_data import Layer, expected, percent
from sparsec.report_fold import Group, merge_numbers

if TYPE_CHECKING:
    from sparsec.explain import Explanation

Decide = Callable[[WeightFact, str], Decision]

TRIED = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of zeros that pruning methods reach
WORTH = 0.03  # a group below this share of the time is not worth a sentence
GAIN = 1.03  # nor is a change of the total below this
MOST = 5


def what_if(report: Explanation) -> Explanation:
    """Add break-even points and the sentences of what would help. A failure here costs these, never the report."""
    decide = decider(report)
    if decide is None:
        return replace(report, helps=tuple(said(report.groups)))
    solved: dict[tuple[tuple[int, int], str, int], float | None] = {}
    layers = tuple(_with_break_even(layer, decide, solved) for layer in report.layers)
    report = replace(report, layers=layers)
    return replace(report, helps=(*prunings(report, decide), *said(report.groups))[: 2 * MOST])


def decider(report: Explanation) -> Decide | None:
    """The decision function with this machine's rates bound, or None where these cannot be had."""
    try:
        import torch

        from sparsec import targets
        from sparsec.cache import cache_dir
        from sparsec.measure import rates
        from sparsec.passes.decide import decide

        policy = report.options.policy
        target = targets.resolve(policy.target)
        known = rates(target, torch.get_num_threads(), cache_dir(policy.cache_dir))
    except Exception:
        return None
    return lambda fact, dtype: decide(fact, dtype, target, known, policy)


def pruned(fact: WeightFact, share: float) -> WeightFact:
    """Facts of a weight of the same shape with ``share`` of it zero at random."""
    kept = round((1 - share) * fact.n * fact.k)
    per_row = kept // max(fact.n, 1)
    return replace(
        fact,
        nnz=kept,
        row_nnz_min=per_row,
        row_nnz_max=-(-kept // max(fact.n, 1)),
        zero_rows=0,
        zero_cols=0,
        nonfinite=0,
        nm=(),
        vnm=(),
        blocks=(),
    )


def _with_break_even(
    layer: Layer, decide: Decide, solved: dict[tuple[tuple[int, int], str, int], float | None]
) -> Layer:
    if layer.record.decision.sparse:
        return layer
    ats = []
    for at in layer.at:
        key = (layer.shape, layer.record.site.dtype, at.rows)
        if key not in solved:
            solved[key] = break_even_at(layer.record.fact, layer.record.site.dtype, at.rows, decide)
        ats.append(replace(at, break_even=solved[key]))
    return replace(layer, at=tuple(ats))


def break_even_at(fact: WeightFact, dtype: str, rows: int, decide: Decide) -> float | None:
    """The least share of zeros, to a percent, that is decided sparse at M = ``rows``; None where none is."""

    def wins(share: float) -> bool:
        return decide(pruned(fact, share), dtype).at(rows).format != "dense"

    low, high = 0, 99  # a weight without zeros is dense; more zeros never make sparse slower
    if not wins(high / 100):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle / 100) else (middle, high)
    return high / 100


def prunings(report: Explanation, decide: Decide) -> list[str]:
    """Which layers' pruning would buy most: one sentence per group, and one for all of them, by gain."""
    now = report.expected()
    if now is None or now.ours_s <= 0:
        return []
    rows = report.layers[0].rows
    at = f"at batch {report.batches[0]}"
    saved: list[tuple[float, str]] = []
    groups = [g for g in report.groups if g.share >= WORTH and not g.first.record.fact.nonfinite]
    for group in groups:
        found = _cheapest_gain(group, decide)
        if found is None:
            continue
        share, seconds = found
        better = now.dense_s / (now.ours_s - seconds)
        if better / now.speedup >= GAIN:
            text = (
                f"prune {group.name} to {percent(share)} zero (now {group.zero}): "
                f"the linear layers go from {now.speedup:.2f}x to {better:.2f}x {at}"
            )
            saved.append((seconds, text))
    saved.sort(key=lambda pair: -pair[0])
    texts = [text for _, text in saved[:MOST]]
    if len(saved) > 1 and sum(s for s, _ in saved) < now.ours_s:
        better = now.dense_s / (now.ours_s - sum(s for s, _ in saved))
        texts.append(f"all {len(saved)} of these together: {better:.2f}x {at}")
    return texts or _why_not(report, rows)


def _cheapest_gain(group: Group, decide: Decide) -> tuple[float, float] | None:
    """The least of TRIED that gains most of what TRIED can, and the seconds it saves over all members."""
    layer = group.first
    cost = group.cost()
    if cost is None:
        return None
    each = cost.ours_s / len(group.layers)
    gains = []
    for share in TRIED:
        if share < 1 - layer.density + 0.05:
            continue
        then = expected(decide(pruned(layer.record.fact, share), layer.record.site.dtype), layer.rows)
        if then is not None and then.ours_s < each:
            gains.append((share, (each - then.ours_s) * len(group.layers)))
    if not gains:
        return None
    most = max(gain for _, gain in gains)
    return next((share, gain) for share, gain in gains if gain >= 0.5 * most)


def _why_not(report: Explanation, rows: int) -> list[str]:
    """More zeros would not help: say at which rows they would."""
    if any(layer.decision != "dense" for layer in report.layers):
        return []
    pays = [r.m_hi for layer in report.layers for r in layer.record.decision.ranges if r.format != "dense" and r.m_hi]
    if pays:
        return [f"fewer rows of x per call: these weights pay up to {max(pays)} rows, and a call has {rows}"]
    return []


def said(groups: Sequence[Group]) -> list[str]:
    """What the decisions themselves propose, folded as the rows are."""
    texts = []
    for group in groups:
        proposals = [layer.record.decision.help.rstrip(".") for layer in group.layers if layer.record.decision.help]
        if proposals and group.share >= WORTH:
            texts.append(f"{group.name}: {merge_numbers(proposals)}")
    return texts[:MOST]
