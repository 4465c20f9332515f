"""One format for every M: what a weight is packed as when its dense twin goes.

In: facts, rates, a policy. Out: a ``WholePlan``: the format whose worst moments cost least, which loop serves which M,
and from which M dense would have been faster. Above some M no loop that skips zeros keeps up with a dense product; then
the weight is decoded block by block for one (loop ``unpack``), which costs dense plus the decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sparsec.facts import WeightFact
from sparsec.formats import VALUE_BITS, VALUE_BYTES, Format, storage_bytes, stored_values, value_kind
from sparsec.options import Policy
from sparsec.passes.decide.candidates import Way, allowed, dense_way, formats_of, ways_for
from sparsec.passes.decide.cost import Cost, Line, Piece, turning_points
from sparsec.targets.base import Rates

UNPACK = "unpack"
# Formats are compared by their times relative to dense at these M, each counting as much: decoding tokens one by one
# and reading prompts are both to be served by the one pack that is left.
COMPARED_AT = (1, 4, 16, 64, 256, 1024)
SWITCH = 1.02  # another loop is another kernel to compile


@dataclass(frozen=True)
class WholePlan:
    """``routes``: ((from M, loop), ...), ascending, the first from 0. ``dense_from``: the least M at which dense would
    have been faster, None where there is none. ``worst``: how many times slower than dense it gets, at ``worst_at``;
    below 1 where it is always faster. ``score``: mean time relative to dense over COMPARED_AT. ``x``: "int8" where the
    loops are those of integer kernels, which read other packs of the same format.
    """

    format: str
    routes: tuple[tuple[int, str], ...]
    dense_from: int | None
    worst: float
    worst_at: int
    score: float
    x: str = ""

    @property
    def pack(self) -> str:
        """What is packed: the format, and what its kernels round x to (``bitmap+int8/int8``)."""
        return f"{self.format}/{self.x}" if self.x else self.format


def formats_for(fact: WeightFact, dtype: str, rates: Rates, policy: Policy, x: str = "") -> dict[str, list[Way]]:
    """The packs (``WholePlan.pack``) that are smaller than the dense weight, with their loops. ``x``: as ``decide``."""
    found: dict[str, list[Way]] = {}
    dense = dense_way(fact, dtype, rates)
    for way in ways_for(fact, dtype, rates, policy, x):
        _, rounds, to = way.kernel.partition("/")
        if not way.panel and dense is not None and way.bytes < dense.bytes:
            found.setdefault(f"{way.format}{rounds}{to}", []).append(way)
    return found


def best_whole(
    fact: WeightFact,
    dtype: str,
    rates: Rates,
    policy: Policy,
    unpack_s: float | None = None,
    x: str = "",
    only: str = "",
) -> WholePlan | None:
    """The plan of the best format; None where no sparse format holds, is allowed and is smaller.

    ``unpack_s``: seconds of decoding the whole weight; by default guessed from the bytes that move. ``x``: "int8" where
    the layer rounds x to it. ``only``: the one pack (``WholePlan.pack``) that comes into question.
    """
    dense = dense_way(fact, dtype, rates)
    if dense is None:
        return None
    plans = []
    for name, ways in formats_for(fact, dtype, rates, policy, x).items():
        if only and name != only:
            continue
        guess = 2 * (dense.bytes + ways[0].bytes) / rates.bandwidth
        plans.append((plan_of(name, ways, dense, guess if unpack_s is None else unpack_s), ways[0].bytes))
    return min(plans, key=lambda p: (round(p[0].score, 3), p[1], p[0].format))[0] if plans else None


def formats_by_size(fact: WeightFact, dtype: str, policy: Policy) -> list[Format]:
    """The formats that a weight holds and the policy allows, the fewest bytes first, as far as facts tell them; those
    that take as many as dense are left out. For what no speed is asked of: rows of an embedding."""
    found = {}
    for format in formats_of(fact, dtype):
        if not allowed(format, policy.formats) or format.pattern.kind == "dense":
            continue
        plain = storage_bytes(Format(format.pattern, dtype), fact)
        saved = VALUE_BYTES[dtype] - VALUE_BITS[value_kind(format.values)[0]] / 8
        found[format] = plain - stored_values(format.pattern, fact) * saved
    whole = fact.n * fact.k * VALUE_BYTES[dtype]
    return sorted((f for f in found if found[f] < whole), key=lambda f: (found[f], str(f)))


def plan_of(name: str, ways: Iterable[Way], dense: Way, unpack_s: float) -> WholePlan:
    """Which loop of one pack serves which M; ``name``: ``WholePlan.pack``."""
    format, rounds, x = name.partition("/")
    costs = {way.kernel: way.cost for way in ways} | {UNPACK + rounds + x: plus(dense.cost, unpack_s)}
    starts = sorted(set(turning_points([dense.cost, *(c.times(f) for c in costs.values() for f in (1.0, SWITCH))])))
    routes: list[tuple[int, str]] = []
    worst, worst_at, dense_from = 0.0, 1, None
    for m in starts:
        last = routes[-1][1] if routes else ""
        loop = min(costs, key=lambda way: costs[way].at(m) * (1.0 if way == last else SWITCH))
        if loop != last:
            routes.append((m if routes else 0, loop))
        ratio = costs[loop].at(m) / dense.cost.at(m)
        if ratio > 1 and dense_from is None:
            dense_from = m
        if ratio > worst:
            worst, worst_at = ratio, m
    logs = [math.log(min(c.at(m) for c in costs.values()) / dense.cost.at(m)) for m in COMPARED_AT]
    return WholePlan(format, tuple(routes), dense_from, worst, worst_at, math.exp(sum(logs) / len(logs)), x)


def plus(cost: Cost, seconds: float) -> Cost:
    """A cost with something done before it."""
    return Cost(
        tuple(Piece(p.lo, p.hi, tuple(Line(line.a + seconds, line.b) for line in p.lines)) for p in cost.pieces)
    )
