"""Folding: layers that say the same become one row. In: layers or refusals. Out: groups, the slowest first.

Two layers fold when their names differ only in numbers (``layers.0.q_proj``, ``layers.1.q_proj``) and shape, pattern,
decisions and the sentence agree but for its numbers, which become ranges (``97.1 to 97.3 %``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsec.facts import Declined
from sparsec.report_activation import in_words
from sparsec.report_data import Cost, Layer, Measured, percent

SPREAD = 0.05  # layers whose share of zeros differs by more than this do not fold
_NUMBER = re.compile(r"\d{1,3}(?: \d{3})+(?!\d)|\d+(?:\.\d+)?(?:e-?\d+)?")  # 1 812, 97.3, 1e-5


@dataclass(frozen=True)
class Group:
    """Layers in one row. Times are sums over the members; ``share`` is of the time of all layers as they run."""

    name: str
    members: tuple[int, ...]
    layers: tuple[Layer, ...]
    reason: str
    share: float
    activation: str = ""  # what is known of zeros in x, and of results that nobody reads

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def zero(self) -> str:
        """``50 %`` or ``48-53 %``."""
        lows = percent(min(1 - layer.density for layer in self.layers))
        highs = percent(max(1 - layer.density for layer in self.layers))
        return lows if lows == highs else f"{lows.removesuffix(' %')}-{highs}"

    def cost(self, index: int = 0, measured: bool = False) -> Cost | None:
        """Summed seconds at one batch, or None where a member has none."""
        return total(self.layers, index, measured)


def total(layers: Sequence[Layer], index: int, measured: bool = False) -> Cost | Measured | None:
    """Sums over layers at one batch; None unless every layer has that kind of time.

    The interval of a measured sum takes all members at their low end, then all at their high end: wide, never narrow.
    """
    costs = [layer.at[index].measured if measured else layer.at[index].expected for layer in layers]
    known = [c for c in costs if c is not None]
    if not known or len(known) < len(costs):
        return None
    dense, ours = sum(c.dense_s for c in known), sum(c.ours_s for c in known)
    if not measured:
        return Cost(dense, ours)
    ends = [[c.dense_s / end(c) for c in known if isinstance(c, Measured)] for end in (_low, _high)]
    return Measured(dense, ours, dense / sum(ends[0]), dense / sum(ends[1]))


def _low(cost: Measured) -> float:
    return cost.low


def _high(cost: Measured) -> float:
    return cost.high


def fold(layers: Sequence[Layer]) -> tuple[Group, ...]:
    """Groups by time share at the first batch, measured where all layers are; the largest first."""
    same: dict[object, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        runs = tuple(a.decision for a in layer.at)
        text = _NUMBER.sub("#", f"{layer.reason} {in_words(layer)}")
        site = layer.record.site
        rows = tuple(a.rows for a in layer.at)
        kind = site.kind, site.dtype, site.conv
        same[(template(layer.name), layer.shape, layer.pattern, runs, rows, text, kind)].append(index)
    measured = total(layers, 0, measured=True) is not None
    whole = total(layers, 0, measured)
    groups = []
    for members in (part for indices in same.values() for part in _close(indices, layers)):
        inside = tuple(layers[i] for i in members)
        cost = total(inside, 0, measured)
        share = cost.ours_s / whole.ours_s if cost and whole and whole.ours_s > 0 else 0.0
        reason, activation = (merge_numbers([say(layer) for layer in inside]) for say in (_reason, in_words))
        name = merge_names([layer.name for layer in inside])
        groups.append(Group(name, tuple(members), inside, reason, share, activation))
    return tuple(sorted(groups, key=lambda g: -g.share))


def _reason(layer: Layer) -> str:
    return layer.reason


def _close(indices: Sequence[int], layers: Sequence[Layer]) -> list[list[int]]:
    """Cut into parts whose density differs by at most SPREAD."""
    parts: list[list[int]] = []
    for index in sorted(indices, key=lambda i: layers[i].density):
        if parts and layers[index].density - layers[parts[-1][0]].density <= SPREAD:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [sorted(part) for part in parts]


def template(name: str) -> str:
    """``layers.3.q_proj`` -> ``layers.#.q_proj``: only whole path components count as numbers."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def merge_names(names: Sequence[str]) -> str:
    """One name for many: ``layers.0..5.q_proj``; ``*`` where the numbers are no plain list."""
    distinct = sorted(set(names), key=_natural)
    if len({template(n) for n in distinct}) > 1:
        return ", ".join(distinct)
    columns = list(zip(*(n.split(".") for n in distinct), strict=True))
    numbers = [sorted({int(v) for v in column}) if column[0].isdigit() else None for column in columns]
    combinations = 1
    for values in numbers:
        combinations *= len(values) if values else 1
    parts = []
    for column, values in zip(columns, numbers, strict=True):
        if not values or len(values) == 1:
            parts.append(column[0])
        else:
            text = runs_of(values)
            parts.append(text if combinations == len(distinct) and len(text) <= 16 else "*")
    return ".".join(parts)


def runs_of(values: Iterable[int]) -> str:
    """``0..5,8``."""
    runs: list[list[int]] = []
    for v in values:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return ",".join(str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in name.split(".")]


def merge_numbers(texts: Sequence[str]) -> str:
    """One sentence for sentences that differ only in numbers; differing numbers become ``low to high``."""
    columns = list(zip(*(_NUMBER.findall(t) for t in texts), strict=False))
    spans = iter(columns)

    def span(match: re.Match[str]) -> str:
        column = sorted(next(spans), key=_value)
        return column[0] if _value(column[0]) == _value(column[-1]) else f"{column[0]} to {column[-1]}"

    return _NUMBER.sub(span, texts[0])


def _value(number: str) -> float:
    return float(number.replace(" ", ""))


@dataclass(frozen=True)
class Refusal:
    """Operations that were not taken, by reason."""

    reason: str
    count: int
    names: tuple[str, ...]
    ops: tuple[str, ...]


def not_taken(declined: Iterable[Declined]) -> tuple[Refusal, ...]:
    """By reason, the most frequent first; names fold as those of layers do."""
    by_reason: dict[str, list[Declined]] = defaultdict(list)
    for d in declined:
        by_reason[d.reason.strip() or "no reason was recorded; please report this"].append(d)
    refusals = []
    for reason, group in by_reason.items():
        by_template: dict[str, list[str]] = defaultdict(list)
        for d in group:
            name = d.fqn or d.node
            if name:
                by_template[template(name)].append(name)
        names = tuple(merge_names(names) for names in by_template.values())
        refusals.append(Refusal(reason, len(group), names, tuple(sorted({d.op for d in group if d.op}))))
    return tuple(sorted(refusals, key=lambda r: (-r.count, r.reason)))
