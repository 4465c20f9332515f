"""Sentences of a decision: why, how near, and what would help. Facts and costs in, text for people out."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.facts import Range, WeightFact

NO_ZEROS = "no zeros"
NO_KERNELS = "no sparse kernel can be made here; sparsec doctor says why"
NEVER = "dense is faster here at every share of zeros"


def grouped(number: int) -> str:
    """1812 as ``1 812``."""
    return f"{number:,}".replace(",", " ")


def zero(share: float) -> str:
    """A share as whole percent, never rounded up to all or down to nothing."""
    return f"{min(max(round(100 * share), 1 if share > 0 else 0), 99 if share < 1 else 100)} %"


def near(fact: WeightFact) -> str:
    """``near 2:4 (97.3 % of groups; 1 812 break it)`` for the best pattern that nearly holds, else nothing."""
    if any(f.exact for f in fact.nm):
        return ""
    found = min((f for f in fact.nm if not f.exact), key=lambda f: f.violations / f.groups, default=None)
    if found is None:
        return ""
    percent = min(round(100 * found.share, 1), 99.9)
    return f"near {found.n}:{found.m} ({percent} % of groups; {grouped(found.violations)} break it)"


def reads(read: int, dense: int) -> str:
    return f"reads {read / max(dense, 1):.2f}x the bytes"


def panels(full: bool, m: int = 1) -> str:
    """Why a weight runs dense, but by our kernel and from its own copy."""
    why = "no zeros" if full else "too few zeros to skip"
    since = f" from {m} rows of x on" if m > 1 else ""
    return f"{why}; stored in panels, which this CPU reads faster than its dense library does{since}"


def skips(fact: WeightFact, m: int, panel: int) -> str:
    """``panel``: the rows of x from which the same weight is read from panels before that; 0 where it never is."""
    below = "" if not panel else ", in panels below" if panel == 1 else f", in panels from {panel} rows on"
    return f"skips {zero(fact.sparsity)} of the multiplications from {m} rows of x on{below}"


def not_finite(fact: WeightFact) -> str:
    return f"{grouped(fact.nonfinite)} inf or NaN weights: skipping zeros could change the result"


def too_small(fact: WeightFact) -> str:
    return f"too small: at {fact.n}x{fact.k} a call costs more than sparsity saves"


def break_even(share: float) -> str:
    return f"break-even is {zero(share)} zero on this machine"


def not_smaller(fact: WeightFact) -> str:
    return f"only {zero(fact.sparsity)} zero: no format is smaller than the weight itself"


def not_allowed(formats: tuple[str, ...]) -> str:
    return f"none of the allowed formats ({', '.join(formats)}) fits this weight" if formats else "no format fits it"


def measured(ratio: float, m: int) -> str:
    return f"measured {ratio:.2f}x at M={m}"


def no_gain(format_name: str, ratio: float, m: int) -> str:
    return f"no clear gain: {format_name.partition('+')[0]} {measured(ratio, m)}"


def would_give(gains: list[tuple[str, float]]) -> str:
    """``2:4 would give 1.7x at M=1, 70 % zero 2.1x``."""
    if not gains:
        return ""
    (what, gain), *rest = gains
    more = "".join(f", {other} {value:.1f}x" for other, value in rest)
    return f"{what} would give {gain:.1f}x at M=1{more}"


def gates(found: Sequence[Range]) -> list[str]:
    """What activation sparsity brings: ``where x is zero, columns are skipped, in calls that leave out at least 31 %``.

    ``found``: the gated ranges of a decision.
    """
    said = []
    for loop, what in (
        ("skip", "where x is zero, columns are skipped"),
        ("select", "only rows that are read are computed"),
    ):
        first = next((r for r in found if r.kernel == loop), None)
        if first is not None:
            least = f", in calls that leave out at least {zero(1 - first.below)}" if first.below < 1 else ""
            said.append(what + least)
    return said
