"""What would help: the decisions that other weights, or other patterns, would get on this machine.

In: an Explanation. Out: the same with break-even points at the rows asked for, and with sentences that name a change
and what the linear layers would gain by it. Nothing is guessed: every number is the decision function's own answer for
a weight of the same shape with more zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsec.facts import Decision, NMFact, Site, WeightFact
from sparsec.report_data import Layer, expected, percent
from sparsec.report_fold import Group, merge_numbers

if TYPE_CHECKING:
    from sparsec.explain import Explanation

Decide = Callable[[WeightFact, Site], Decision]  # a weight in the place of a site's own

TRIED = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of zeros that pruning methods reach
WORTH = 0.03  # a group below this share of the time is not worth a sentence
GAIN = 1.03  # nor is a change of the total below this
FAST = 1.5  # layers that gain this much already are left in peace
MOST = 6


def what_if(report: Explanation) -> Explanation:
    """Add break-even points and the sentences of what would help. A failure here costs these, never the report."""
    decide = decider(report)
    if decide is None:
        return replace(report, helps=tuple(said(report.groups)))
    solved: dict[tuple[object, ...], float | None] = {}
    layers = tuple(_with_break_even(layer, decide, solved) for layer in report.layers)
    report = replace(report, layers=layers)
    return replace(report, helps=tuple(prunings(report, decide)))


def decider(report: Explanation) -> Decide | None:
    """The decision function with this machine's rates bound, or None where these cannot be had."""
    try:
        import torch

        from sparsec import targets
        from sparsec.cache import cache_dir
        from sparsec.measure import rates_for
        from sparsec.passes.decide import decide
        from sparsec.passes.decide.conv import conv_rates

        policy = report.options.policy
        target = targets.resolve(policy.target)
        threads, cache = torch.get_num_threads(), cache_dir(policy.cache_dir)

        def decided(fact: WeightFact, site: Site) -> Decision:
            x = site.x.partition(":")[0]
            rates = conv_rates(rates_for(fact, site.dtype, target, threads, cache, policy.formats, x), site.conv)
            return decide(fact, site.dtype, target, rates, policy, x=x)

        first = report.layers[0].record
        decided(first.fact, first.site)
    except Exception:
        return None
    return decided


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


def _with_break_even(layer: Layer, decide: Decide, solved: dict[tuple[object, ...], float | None]) -> Layer:
    ats = []
    for at in layer.at:
        if at.decision != "dense":
            ats.append(at)
            continue
        fact, site = layer.record.fact, layer.record.site
        key = (layer.shape, site.dtype, site.conv, site.x, fact.values, at.rows)
        if key not in solved:
            solved[key] = break_even_at(fact, site, at.rows, decide)
        ats.append(replace(at, break_even=solved[key]))
    return replace(layer, at=tuple(ats))


def break_even_at(fact: WeightFact, site: Site, rows: int, decide: Decide) -> float | None:
    """The least share of zeros, to a percent, that is decided sparse at M = ``rows``; None where none is."""

    def wins(share: float) -> bool:
        return decide(pruned(fact, share), site).at(rows).format != "dense"

    low, high = 0, 99  # a weight without zeros is dense; more zeros never make sparse slower
    if not wins(high / 100):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle / 100) else (middle, high)
    return high / 100


@dataclass(frozen=True)
class Change:
    """Another mask for a group: what it would be, and the seconds that all its layers would save at the first batch."""

    group: Group
    to: str
    saves: float


def prunings(report: Explanation, decide: Decide) -> list[str]:
    """Which layers' pruning would buy most: all of them together first, then one by one, by gain."""
    now = report.expected()
    if now is None or now.ours_s <= 0:
        return []
    groups = [g for g in report.groups if g.share >= WORTH and not g.first.record.fact.nonfinite and _slow(g)]
    changes = sorted(filter(None, (best_change(g, decide) for g in groups)), key=lambda c: -c.saves)
    changes = [c for c in changes if now.ours_s / (now.ours_s - c.saves) >= GAIN]

    def after(saves: float) -> str:
        return f"{now.speedup:.2f}x -> {now.dense_s / (now.ours_s - saves):.2f}x" if now else ""

    texts = [f"{c.to} on {c.group.name} (now {c.group.zero} zero): {after(c.saves)}" for c in changes[:MOST]]
    if len(changes) > 1:
        most = f" (the {MOST} largest follow)" if len(changes) > MOST else ""
        texts.insert(0, f"all {len(changes)} changes together{most}: {after(sum(c.saves for c in changes))}")
    if texts:
        texts.append(
            f"(all linear layers at batch {report.batches[0]}, expected; sparsec eval says what accuracy it costs)"
        )
    return texts or _why_not(report)


def _slow(group: Group) -> bool:
    cost = group.cost()
    return cost is not None and cost.speedup < FAST


def best_change(group: Group, decide: Decide) -> Change | None:
    """The mildest change that brings most of what any can: 50 % zero before 2:4 before more zeros."""
    layer, cost = group.first, group.cost()
    if cost is None:
        return None
    n = len(group.layers)
    found = []
    for to, fact in imagined(layer.record.fact):
        then = expected(decide(fact, layer.record.site), layer.rows)
        if then is not None and then.ours_s < cost.ours_s / n:
            found.append(Change(group, to, cost.ours_s - n * then.ours_s))
    most = max((c.saves for c in found), default=0.0)
    return next((c for c in found if c.saves >= 0.5 * most), None)


def imagined(fact: WeightFact) -> Iterator[tuple[str, WeightFact]]:
    """Masks that pruning methods make and that have more zeros, or more order, than the weight has now."""
    for share in TRIED:
        if share >= fact.sparsity + 0.05:
            yield f"{percent(share)} zero", pruned(fact, share)
        if share == 0.5 and fact.sparsity < 0.55 and not any(f.exact for f in fact.nm):
            yield "2:4", replace(pruned(fact, 0.5), nm=(NMFact(2, 4, fact.n * -(-fact.k // 4), 0),))


def _why_not(report: Explanation) -> list[str]:
    """More zeros would not help: say at which rows they would."""
    if any(layer.decision != "dense" for layer in report.layers):
        return []
    rows = report.layers[0].rows
    ranges = [r for layer in report.layers for r in layer.record.decision.ranges if r.format != "dense"]
    below = [r.m_hi for r in ranges if r.m_hi and r.m_hi < rows]
    above = [r.m_lo for r in ranges if r.m_lo > rows]
    if below:
        return [f"fewer rows of x per call: these weights pay up to {max(below)} rows, and a call has {rows}"]
    if above:
        return [f"more rows of x per call: these weights pay from {min(above)} rows, and a call has {rows}"]
    return []


def said(groups: Sequence[Group]) -> list[str]:
    """What the decisions themselves propose, folded as the rows are."""
    texts = []
    for group in groups:
        proposals = [layer.record.decision.help.rstrip(".") for layer in group.layers if layer.record.decision.help]
        if proposals and group.share >= WORTH:
            texts.append(f"{group.name}: {merge_numbers(proposals)}")
    return texts[:MOST]
