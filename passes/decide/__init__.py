"""Which format runs a weight, for which M: facts and measured rates in, a ``Decision`` that covers every M out.

Dense is always a candidate and wins ties: a sparse format must be expected to gain ``min_speedup``, and where nothing
was measured on this very weight, a margin on top. With measurements they alone decide.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import partial

from sparsec.facts import Decision, NMFact, Range, WeightFact
from sparsec.formats import VALUE_BYTES, Pattern
from sparsec.options import Policy
from sparsec.passes.decide import words
from sparsec.passes.decide.candidates import (
    MODEL_MARGIN,
    PARTS_OF_WEIGHT,
    SWITCH_FORMAT,
    SWITCH_LOOP,
    Way,
    allowed,
    dense_way,
    our_ways,
    plain_panel,
    ways_for,
)
from sparsec.passes.decide.cost import NEVER_S, turning_points
from sparsec.passes.decide.gates import gated
from sparsec.passes.decide.measured import Measured, bucket, by_measurement
from sparsec.targets.base import Rates, Target

_HALVINGS = 14
Gates = tuple[tuple[str, float | None], ...]

__all__ = ["MODEL_MARGIN", "bucket", "decide", "dense_decision"]


def decide(
    fact: WeightFact,
    dtype: str,
    target: Target,
    rates: Rates,
    policy: Policy,
    measured: Measured | None = None,
    x: str = "",
    gates: Gates = (),
) -> Decision:
    """Decide one weight for x of ``dtype`` (``fp32`` or ``bf16``) on ``target``.

    ``x``: "int8" where the graph rounds x to it. ``gates``: loops that may skip a part of the weight, and the share
    that zeros of activations leave (None: not known). ``measured``: (format name, loop, M bucket) -> times faster than
    dense; see ``bucket``; of loops that skip with the share that ``gates`` says. Never raises for a weight: what cannot
    run sparse is a dense decision with its reason.
    """
    asked = _Question(fact, dtype, rates, policy, x)
    if not asked.dense:
        return dense_decision(f"no kernel for {dtype} on {target.name} yet", "model")
    plain = _by_model(replace(fact, key="", thumbnail=(), row_hist=()), dtype, rates, policy, x)
    measured = measured or {}
    whole = {key: ratio for key, ratio in measured.items() if key[1] not in PARTS_OF_WEIGHT}
    if not whole or len(plain.candidates) == 1 or asked.refusal():
        return _with_gates(asked, plain, gates, measured)
    ranges = by_measurement(plain.ranges, asked.dense, asked.ways(), whole, policy.min_speedup)
    decision = replace(plain, ranges=ranges, source="measured")
    decision = replace(decision, reason=_measured_reason(asked, plain, decision, whole))
    return _with_gates(asked, decision, gates, measured)


def _with_gates(asked: _Question, decision: Decision, gates: Gates, measured: Measured) -> Decision:
    """The decision with what serves calls that activation sparsity makes cheap."""
    if not gates or asked.fact.nonfinite:
        return decision
    dense = asked.dense
    assert dense is not None
    ways = {(w.format, w.kernel): w for w in (dense, *asked.ways())}

    def other(m: int) -> float:
        now = decision.at(m)
        way, ratio = ways.get((now.format, now.kernel)), measured.get((now.format, now.kernel, bucket(m)))
        return dense.cost.at(m) / ratio.value if ratio else way.cost.at(m) if way else now.ours_s

    def took(loop: str, format: str, m: int) -> float | None:
        ratio = measured.get((format, loop, m))
        return dense.cost.at(m) / ratio.low if ratio else None

    found: list[Range] = []
    for loop, left in gates:
        known = asked.fact, asked.dtype, asked.rates, asked.policy
        found += gated(*known, loop, left, other, partial(took, loop))
    return replace(decision, gated=tuple(found))


def dense_decision(reason: str, source: str = "fallback") -> Decision:
    """Dense for every M. ``source``: ``fallback`` for a failure, ``model`` for a choice."""
    return Decision(ranges=(Range(1, None, "dense", "", 0.0, 0.0),), reason=reason, source=source)


@functools.lru_cache(maxsize=4096)
def _by_model(fact: WeightFact, dtype: str, rates: Rates, policy: Policy, x: str) -> Decision:
    asked = _Question(fact, dtype, rates, policy, x)
    dense, ways, refusal = asked.dense, asked.ways(), asked.refusal()
    assert dense is not None
    all_dense = (Range(1, None, "dense", "", dense.cost.at(1), dense.cost.at(1)),)
    ranges = all_dense if refusal else cheapest(dense, ways, policy.min_speedup)
    decision = Decision(
        ranges=ranges,
        reason=refusal,
        break_even=asked.break_even(),
        source="model" if policy.min_speedup or refusal else "forced",
        candidates=(dense.candidate(), *(w.candidate() for w in ways)),
        near=words.near(fact),
        help=asked.help(ranges[0]),
    )
    return decision if refusal else replace(decision, reason=asked.reason(decision))


def cheapest(dense: Way, ways: list[Way], least: float) -> tuple[Range, ...]:
    """Ranges of M covering 1 to infinity: the cheapest of our ways that beat dense ``least`` times and their margin
    on top, else dense.

    ``least`` 0 leaves dense out. Equal costs go to dense, then to fewer bytes. Going up in M, a way that would
    need another kernel or another pack than the last one must be cheaper by SWITCH_LOOP or SWITCH_FORMAT.
    """
    factors = (1.0, SWITCH_LOOP, SWITCH_FORMAT)
    starts = set(turning_points([w.price.times(f) for w in ways for f in factors]))
    if least:
        starts |= set(turning_points([dense.cost, *(w.cost.times(least * w.margin) for w in ways)]))
    ranges: list[Range] = []
    last: Way | None = None
    for lo in sorted(starts):
        limit = dense.cost.at(lo) if least else NEVER_S
        good = [w for w in ways if w.cost.at(lo) * (least * w.margin or 1.0) < limit]
        chosen = min(good, key=partial(_order, m=lo, last=last), default=dense)
        last = chosen if chosen.ours else last
        if ranges and (ranges[-1].format, ranges[-1].kernel) == (chosen.format, chosen.kernel):
            continue
        if ranges:
            ranges[-1] = replace(ranges[-1], m_hi=lo - 1)
        ranges.append(Range(lo, None, chosen.format, chosen.kernel, dense.cost.at(lo), chosen.cost.at(lo)))
    return tuple(ranges)


def _order(way: Way, m: int, last: Way | None) -> tuple[float, int, str, str]:
    """Smaller is better; ``last``: the one of our ways that is used at a smaller M."""
    return way.price.at(m) * way.change(last), way.bytes, way.format, way.kernel


@dataclass(frozen=True)
class _Question:
    """One weight on one machine under one policy, and what can be asked about it."""

    fact: WeightFact
    dtype: str
    rates: Rates
    policy: Policy
    x: str = ""

    @property
    def dense(self) -> Way | None:
        return dense_way(self.fact, self.dtype, self.rates) if self.dtype in VALUE_BYTES else None

    @property
    def threshold(self) -> float:
        """How many times faster than dense the model must expect a sparse format to be."""
        return (self.policy.min_speedup or 1.0) * MODEL_MARGIN

    def ways(self) -> list[Way]:
        return ways_for(self.fact, self.dtype, self.rates, self.policy, self.x)

    def refusal(self) -> str:
        """Why no format of ours comes into question at all, or nothing."""
        if self.fact.nonfinite:
            return words.not_finite(self.fact)
        if not self.rates.kernels:
            return words.not_allowed(self.policy.formats) if self.policy.formats else words.NO_KERNELS
        if self.ways():
            return ""
        if self.full:
            return words.NO_ZEROS
        larger = our_ways(self.fact, self.dtype, self.rates, self.policy.formats, any_size=True, x=self.x)
        return words.not_smaller(self.fact) if larger else words.not_allowed(self.policy.formats)

    @property
    def full(self) -> bool:
        return self.fact.nnz == self.fact.n * self.fact.k

    def break_even(self) -> float | None:
        """The share of zeros, spread at random, from which a sparse format wins at M = 1; None where none does.

        Found by halving, as close as percents are printed: what memory hides of a kernel's arithmetic depends on how
        much is kept, so that its cost is no line.
        """
        positions = self.fact.n * self.fact.k
        if self.dense is None or positions < 3:  # half of one or two weights is all of them, which no bitmap is for
            return None
        kept, more = 0, positions + 1
        if not self._wins(kept):
            return None
        while more - kept > max(1, positions >> _HALVINGS):
            middle = (kept + more) // 2
            kept, more = (middle, more) if self._wins(middle) else (kept, middle)
        return 1 - min(kept / positions, 1.0)

    def _wins(self, nnz: int) -> bool:
        """Whether a format for any zeros were fast enough at M = 1, and smaller, if the weight kept ``nnz`` values."""
        imagined = replace(self.fact, nnz=nnz, nm=(), blocks=())
        names = tuple(name for name in ("bitmap", "index") if allowed(Pattern(name), self.policy.formats))
        if not names:
            return False
        assert self.dense is not None
        dense, goal = self.dense, self.dense.cost.at(1) / self.threshold
        ways = our_ways(imagined, self.dtype, self.rates, names, any_size=True, x=self.x)
        return any(way.bytes <= dense.bytes and way.cost.at(1) <= goal for way in ways)

    def reason(self, decision: Decision) -> str:
        first = decision.ranges[0]
        assert self.dense is not None
        own = next((r for r in decision.ranges if r.format != "dense"), first)
        sparse = next((r for r in decision.ranges if r.format != "dense" and not plain_panel(r.format)), None)
        if sparse and sparse is not first:
            return words.skips(self.fact, sparse.m_lo, own.m_lo if plain_panel(own.format) else 0)
        if plain_panel(own.format):
            return words.panels(self.full, own.m_lo)
        if self.full and not decision.ours:
            return words.NO_ZEROS
        if first.format != "dense":
            read = next(c.bytes for c in decision.candidates if c.format == first.format)
            return words.reads(read, self.dense.bytes)
        if decision.break_even is not None:
            return words.break_even(decision.break_even)
        slow = self.rates.overhead * self.threshold < self.dense.cost.at(1)
        return words.NEVER if slow else words.too_small(self.fact)

    def help(self, now: Range) -> str:
        """What another mask of the same weight would give at M = 1, where that is clearly more than now."""
        assert self.dense is not None
        if self.fact.nonfinite or not self.rates.kernels:
            return ""
        least = max(self.threshold, 1.05 * now.dense_s / now.ours_s if now.ours_s else 1.0)
        tries = []
        if self.fact.sparsity <= 0.55 and not any(f.exact for f in self.fact.nm):
            two_four = replace(self.fact, nnz=self.fact.n * self.fact.k // 2, nm=(NMFact(2, 4, 1, 0),), blocks=())
            tries.append(("2:4", self._gain(two_four, "nm")))
        if now.format == "dense" or plain_panel(now.format):
            for share in (0.5, 0.7, 0.9):
                imagined = replace(self.fact, nnz=round((1 - share) * self.fact.n * self.fact.k), nm=(), blocks=())
                if share > self.fact.sparsity:
                    tries.append((f"{share:.0%} zero".replace("%", " %"), self._gain(imagined, "")))
        return words.would_give([(what, gain) for what, gain in tries if gain > least][:2])

    def _gain(self, imagined: WeightFact, kind: str) -> float:
        assert self.dense is not None
        ways = our_ways(imagined, self.dtype, self.rates, self.policy.formats, x=self.x)
        costs = [w.cost.at(1) for w in ways if w.format.startswith(kind) and not w.panel]
        return self.dense.cost.at(1) / min(costs) if costs else 0.0


def _measured_reason(asked: _Question, plain: Decision, now: Decision, measured: Measured) -> str:
    """The sentence of a measured decision: its first measured M, and what was found there."""
    dense, ways, full = asked.dense, asked.ways(), asked.full
    assert dense is not None
    known = {(w.format, w.kernel): w for w in ways}
    at = min(m for _, _, m in measured)
    found = {(f, loop): r.value for (f, loop, m), r in measured.items() if m == at and (f, loop) in known}
    ran = now.at(at)
    if ran.format != "dense":
        ratio = found.get((ran.format, ran.kernel), ran.dense_s / ran.ours_s if ran.ours_s else 1.0)
        way = known[ran.format, ran.kernel]
        why = words.panels(full) if way.panel else words.reads(way.bytes, dense.bytes)
        return f"{why}; {words.measured(ratio, at)}"
    if not found:
        return plain.reason
    (format_name, _), ratio = max(found.items(), key=lambda item: item[1])
    return words.no_gain(format_name, ratio, at)
