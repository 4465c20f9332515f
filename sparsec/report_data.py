"""What a report is made of. In: records of a compilation and the batches asked for. Out: layers with their times.

A layer's *expected* times come from the cost model (or from the tuner's record where the decision was measured); its
*measured* times from running it in this process. They are different fields and never mixed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparsec.facts import Candidate, Decision, Range, Rates, Site, WeightFact
from sparsec.formats import VALUE_BYTES, Format, storage_bytes
from sparsec.passes.decide.words import gates
from sparsec.records import CompileRecord, LayerRecord


@dataclass(frozen=True)
class Cost:
    """Seconds of one call: dense, and as sparsec runs the layer (equal where it stays dense)."""

    dense_s: float
    ours_s: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense."""
        return self.dense_s / self.ours_s if self.ours_s > 0 else 1.0


@dataclass(frozen=True)
class Measured(Cost):
    """Timed in interleaved rounds: dense is the minimum, ours is dense over the median ratio of the rounds.

    [low, high] is the 95 % interval of that ratio.
    """

    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class Whole(Measured):
    """A call of the whole model as ``sparsec bench`` times it: compiled by ``base`` and by sparsec, in turns.

    ``base``: ``inductor``, or ``eager`` where there is no compiler. ``batch``: of the inputs it was called with.
    """

    base: str = "inductor"
    batch: int = 1

    @property
    def engine(self) -> str:
        """The base's name in a sentence."""
        return "Inductor" if self.base == "inductor" else "eager PyTorch"


@dataclass(frozen=True)
class AtBatch:
    """One layer at one batch: ``rows`` is M, the rows of x; ``decision`` is ``dense`` or the name of a format.

    ``break_even``: share of zeros from which sparse would win at these rows; None where no share does or none is known.
    ``rival``: the best sparse format where dense was chosen by the cost model, with its expected speedup.
    """

    batch: int
    rows: int
    decision: str
    kernel: str
    expected: Cost | None
    measured: Measured | None = None
    break_even: float | None = None
    rival: str = ""
    rival_speedup: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One weight at one place of the graph. The plain attributes are those at the first batch of the report.

    ``rates``: measured zeros of x; ``needed``: of what says where the result is read; None where nobody measured.
    """

    record: LayerRecord
    at: tuple[AtBatch, ...]
    rates: Rates | None = None
    needed: Rates | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.record.fact.n, self.record.fact.k

    @property
    def density(self) -> float:
        """Share of non-zeros, 0 to 1."""
        return self.record.fact.density

    @property
    def pattern(self) -> str:
        """What the zeros look like: ``dense``, ``unstructured``, ``2:4``, ``near 2:4``, ``block 16x1``, ``rows`` ..."""
        return pattern_of(self.record.fact, self.record.decision)

    @property
    def rows(self) -> int:
        """M: rows of x at the first batch."""
        return self.at[0].rows

    @property
    def decision(self) -> str:
        """``dense``, or the name of the format that runs."""
        return self.at[0].decision

    @property
    def reason(self) -> str:
        """One sentence why; it names the break-even where the layer stays dense."""
        return reason_of(self.record, self.at)

    @property
    def expected(self) -> Cost | None:
        return self.at[0].expected

    @property
    def measured(self) -> Measured | None:
        return self.at[0].measured


def layers_of(records: Sequence[CompileRecord], batches: Sequence[int], given: int) -> tuple[Layer, ...]:
    """Every layer of every record, at each batch. ``given``: the batch of the inputs the graphs were made with."""
    return tuple(_layer(record, batches, given) for graph in records for record in graph.layers)


def _layer(record: LayerRecord, batches: Sequence[int], given: int) -> Layer:
    ats = []
    for batch in batches:
        rows = rows_at(record.site, batch, given)
        chosen = record.decision.at(rows)
        at = AtBatch(batch, rows, chosen.format, chosen.kernel, expected(record.decision, rows))
        ats.append(_with_rival(at, record.decision))
    return Layer(record, tuple(ats))


def _with_rival(at: AtBatch, decision: Decision) -> AtBatch:
    best = best_sparse(decision, at.rows)
    if at.decision != "dense" or decision.source != "model" or best is None or not at.expected or best[1] <= 0:
        return at
    return replace(at, rival=best[0].format, rival_speedup=at.expected.dense_s / best[1])


def rows_at(site: Site, batch: int, given: int) -> int:
    """M for a batch: the product of x's leading sizes, scaled from the batch they were seen with.

    A symbolic size counts as the batch. At least 1.
    """
    seen = math.prod(size if isinstance(size, int) else given for size in site.x_shape[:-1])
    return max(1, math.ceil(seen * batch / max(given, 1)))


def expected(decision: Decision, rows: int) -> Cost | None:
    """The times of a decision at ``rows``; None where the decision carries neither costs nor times."""
    chosen = decision.at(rows)
    dense = _cost(decision, "dense", "", rows) or chosen.dense_s
    if dense <= 0:
        return None
    if chosen.format == "dense":
        return Cost(dense, dense)
    if decision.source == "measured" and chosen.dense_s > 0:  # the tuner's ratio beats the model's
        return Cost(dense, dense * chosen.ours_s / chosen.dense_s)
    return Cost(dense, _cost(decision, chosen.format, chosen.kernel, rows) or chosen.ours_s or dense)


def _cost(decision: Decision, format: str, kernel: str, rows: int) -> float:
    costs = [
        seconds(c, rows)
        for c in decision.candidates
        if c.format == format and (not kernel or not c.kernel or c.kernel == kernel)
    ]
    return min(costs, default=0.0)


def seconds(candidate: Candidate, rows: int) -> float:
    """The cost expression of a candidate at M = ``rows``."""
    return float(_function(candidate.cost)(rows))


@functools.lru_cache(maxsize=4096)
def _function(text: str) -> Callable[[int], float]:
    import sympy

    m = sympy.Symbol("M", positive=True)
    function: Callable[[int], float] = sympy.lambdify(m, sympy.sympify(text, locals={"M": m}), "math")
    return function


def best_sparse(decision: Decision, rows: int) -> tuple[Candidate, float] | None:
    """The fastest sparse candidate at ``rows`` and its seconds by the cost model."""
    sparse = [(c, seconds(c, rows)) for c in decision.candidates if c.format != "dense"]
    return min(sparse, key=lambda pair: pair[1], default=None)


def read_bytes(layer: Layer) -> tuple[int, int]:
    """Weight bytes read by a call at the first batch: dense, and as the layer runs."""
    dense = layer.record.fact.n * layer.record.fact.k * VALUE_BYTES.get(layer.record.site.dtype, 4)
    kept = [c.bytes for c in layer.record.decision.candidates if c.format == layer.decision]
    return dense, min(kept, default=dense) if layer.decision != "dense" else dense


def pattern_of(fact: WeightFact, decision: Decision) -> str:
    """A word for the zeros of a weight, from its facts."""
    if fact.nnz == fact.n * fact.k:
        return "dense"
    if fact.nnz == 0:
        return "all zero"
    exact = [f for f in fact.nm if f.exact and fact.density > 0.5 * f.n / f.m]  # 4:8 by chance is not a pattern
    if exact:
        best = min(exact, key=lambda f: (f.n / f.m, f.m))
        return f"{best.n}:{best.m}"
    kept = (fact.n - fact.zero_rows) * (fact.k - fact.zero_cols)
    if fact.nnz >= 0.99 * kept:
        return {(True, False): "rows", (False, True): "columns"}.get(
            (fact.zero_rows > 0, fact.zero_cols > 0), "rows+columns" if fact.zero_rows else "unstructured"
        )
    blocks = [f for f in fact.blocks if f.rows * f.cols > 1 and f.nonzero < f.total and f.fill > 0.99]
    if blocks:
        largest = max(blocks, key=lambda f: f.rows * f.cols)
        return f"block {largest.rows}x{largest.cols}"
    return near_of(fact, decision).partition("(")[0].strip() or "unstructured"


def near_of(fact: WeightFact, decision: Decision) -> str:
    """The decision's ``near N:M (...)``, unless zeros spread at random would come as near: 90 % zero is near 4:8."""
    found = re.match(r"near (\d+):(\d+)", decision.near)
    nm = fact.nm_fact(int(found[1]), int(found[2])) if found else None
    if nm is None:
        return decision.near
    d = fact.density
    chance = sum(math.comb(nm.m, i) * d**i * (1 - d) ** (nm.m - i) for i in range(nm.n + 1, nm.m + 1))
    return decision.near if d > 0.5 * nm.n / nm.m and 1 - nm.share < 0.5 * chance else ""


def reason_of(record: LayerRecord, at: Sequence[AtBatch]) -> str:
    """The decision's sentence, what pattern the weight nearly has, and where the decision would flip."""
    decision = record.decision
    flips = decision.ranged and any(a.decision == "dense" for a in at)
    said = decision.reason.strip().rstrip(".") or "no reason was recorded; please report this"
    if flips and at[0].decision == "dense":  # the recorded sentence speaks of the rows that run sparse
        said = f"{ranges_in_words(decision.ranges)}; this call has {rows_in_words(at[0].rows)}"
    elif flips:
        said = f"{said}; break-even: {ranges_in_words(decision.ranges)}"
    near = near_of(record.fact, decision)
    held = held_again(record, at[0].rows)
    parts = [said, *gates(decision.gated), held, near if near not in said else "", *quantised_in_words(record)]
    if record.fact.nonfinite:
        return "; ".join([*filter(None, parts), "no break-even while they are there"])
    if at[0].decision == "dense":
        parts.append(break_even(decision, at[0], "break-even" in said))
    if at[0].rival:
        little = ", too little to be sure of a gain" if at[0].rival_speedup > 1 else ""
        parts.append(f"{short_format(at[0].rival)} would run at {at[0].rival_speedup:.2f}x{little}")
    return "; ".join(part for part in parts if part)


def held_again(record: LayerRecord, rows: int) -> str:
    """What the memory of a second order of the weight is, where calls with as many rows may skip columns."""
    packs = {Format.parse(r.format) for r in record.decision.gated if r.kernel == "skip" and r.holds(rows)}
    size = sum(storage_bytes(format, record.fact) for format in packs)
    return f"for that its columns are held apart, in {megabytes(size)} more" if size else ""


def quantised_in_words(record: LayerRecord) -> list[str]:
    """What of a layer is quantised: its activations, and the values of its weight."""
    words = []
    kind, _, rest = record.site.x.partition(":")
    if kind:
        how = "dynamic per token" if not rest or rest.startswith("min=") else "one static scale"
        words.append(f"{kind} activations, {how}")
    values = record.fact.values
    if values.kind == "grid":
        bits = 4 if values.bits <= 4 else 8
        where = f"in groups of {values.group}" if values.group else "per row"
        words.append(f"weights on int{bits} grid, {where}")
    elif values.kind == "ternary":
        words.append("ternary weights")
    if record.site.w:
        words.append("the graph computes them from stored integers")
    return words


def break_even(decision: Decision, at: AtBatch, said: bool) -> str:
    """The share of zeros from which sparse would win, in words. ``said``: that at one row is named already."""
    if at.break_even is not None and (at.rows > 1 or not said):
        where = "here" if decision.ranged else f"at {rows_in_words(at.rows)}"
        return f"{'' if said else 'break-even is '}{percent(at.break_even)} zero {where}"
    if said:
        return ""
    if decision.ranged:
        return "no break-even here"
    if decision.break_even is None:
        return "no break-even: dense wins at every sparsity for this shape"
    return f"break-even is {percent(decision.break_even)} zero at 1 row"


def rows_in_words(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"


def ranges_in_words(ranges: Sequence[Range]) -> str:
    """``bitmap up to 64 rows, dense above``."""
    words: list[str] = []
    for r in merge_ranges(ranges):
        if r.m_hi is None:
            words.append(f"{short_format(r.format)} above" if words else f"{short_format(r.format)} at any rows")
        else:
            words.append(f"{short_format(r.format)} up to {rows_in_words(r.m_hi)}")
    return ", ".join(words)


def merge_ranges(ranges: Sequence[Range]) -> list[Range]:
    """Neighbours that run the same format become one; which loop runs is a detail."""
    merged: list[Range] = []
    for r in ranges:
        if merged and merged[-1].format == r.format:
            merged[-1] = replace(merged[-1], m_hi=r.m_hi)
        else:
            merged.append(r)
    return merged


def short_format(name: str) -> str:
    """``bitmap+fp32`` -> ``bitmap``: the value type is the layer's own and need not be repeated; codes are named."""
    pattern, _, values = name.partition("+")
    return pattern if values in VALUE_BYTES else name


def percent(share: float, digits: int = 0) -> str:
    """``50 %``; never rounds something to nothing or to all."""
    value = 100 * share
    least = 10.0**-digits
    if 0 < value < least / 2:
        return f"<{least:g} %"
    if 100 - least / 2 < value < 100:
        return f">{100 - least:g} %"
    return f"{value:.{digits}f} %"


def duration(s: float) -> str:
    """``41 us``, ``2.1 ms``: two to three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        value = s / scale
        if value >= 0.9995 or unit == "us":
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    raise AssertionError


def count(number: float) -> str:
    """``10.6 M``, ``1.24 B``, ``812``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def megabytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
