"""An explanation as one page: works from ``file://``, without network, and without JavaScript up to the row details.

In: an Explanation. Out: HTML. Everything in it comes from ``to_dict()``, which the page also holds as its only
``application/json`` block; every text is escaped, and no weight is in it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.report_data import Cost, duration, megabytes, percent, read_bytes, short_format
from sparsec.report_fold import Group

if TYPE_CHECKING:
    import jinja2

    from sparsec.explain import Explanation

TEXT_ROWS = 60  # of the table in the text to paste into an issue
LEAST = 0.006  # thinner bar segments are drawn together as "others"


@dataclass(frozen=True)
class Segment:
    """A piece of a bar: ``width`` in percent of the pair's longer bar, ``kind`` a pattern's name for its colour."""

    label: str
    title: str
    kind: str
    width: float
    href: str


@dataclass(frozen=True)
class Bar:
    name: str
    total: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and the number it sorts by where the text does not begin with it."""

    text: str
    value: float | str = ""


def to_html(report: Explanation, compare: Explanation | None = None) -> str:
    """The page. ``compare``: an earlier report, shown as a difference."""
    from sparsec.report_dict import difference_lines
    from sparsec.report_text import to_text

    body = report.to_dict(compare)
    groups = report.groups
    context = {
        "d": body,
        "tiles": tiles(report),
        "charts": [
            (batch, bars(report, groups, i)) for i, batch in enumerate(report.batches) if report.expected(batch)
        ],
        "kinds": sorted({kind(layer.record.decision.at(a.rows).format) for layer in report.layers for a in layer.at}),
        "columns": columns(report),
        "rows": [row(report, group, i) for i, group in enumerate(groups)],
        "measured": report.measured() is not None,
        "text": to_text(report, compare, most=TEXT_ROWS),
        "difference": list(difference_lines(body["compare"])) if compare else [],
        "reproduce": reproduce(report),
        "data": script_json(body),
    }
    return template("explain.html.j2").render(context)


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``<``, ``>`` or ``&``, which JSON can spell otherwise."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page of this package: every text is escaped, and a name that nobody set is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsec", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def tiles(report: Explanation) -> list[tuple[str, str, str]]:
    """The numbers of the header: (what, number, remark)."""
    from sparsec.report_text import interval, ways

    if not report.layers:
        return []
    first = report.batches[0]
    others = [(b, cost) for b in report.batches[1:] if (cost := report.expected(b))]
    expected, measured = report.expected(), report.measured()
    made = []
    if whole := report.whole:
        times = f"{duration(whole.ours_s)} instead of {whole.engine}'s {duration(whole.dense_s)}"
        made.append(
            ("whole model", f"{whole.speedup:.2f}x", f"{interval(whole)}, measured at batch {whole.batch}; {times}")
        )
    if measured:
        made.append(("measured, linear layers", f"{measured.speedup:.2f}x", f"{interval(measured)} at batch {first}"))
    if expected:
        rest = ", ".join(f"{cost.speedup:.2f}x at {b}" for b, cost in others)
        made.append(
            ("expected, linear layers", f"{expected.speedup:.2f}x", f"at batch {first}" + (f"; {rest}" if rest else ""))
        )
    facts = {(layer.name, layer.record.fact.key): layer for layer in report.layers}.values()
    size, kept = sum(x.record.fact.n * x.record.fact.k for x in facts), sum(x.record.fact.nnz for x in facts)
    made.append(("zeros", percent(1 - kept / max(size, 1), 1), "of the weights of linear layers"))
    sparse, panels = ways(report)
    beside = f", {panels} dense in panels" if panels else ""
    made.append(("run sparse", f"{sparse} of {len(report.layers)}", f"linear layers at batch {first}{beside}"))
    dense, ours = (sum(pair[i] for pair in map(read_bytes, facts)) for i in (0, 1))
    made.append(("weights read", f"{megabytes(ours)}", f"instead of {megabytes(dense)} for a pass"))
    return made


def kind(format: str) -> str:
    """The family of a format, which has a colour: ``nm:2:4+fp32`` -> ``nm``."""
    return format.partition("+")[0].partition(":")[0]


def bars(report: Explanation, groups: Sequence[Group], index: int) -> list[Bar]:
    """Two bars for one batch: where the time of the linear layers goes in dense, and as they run."""
    measured = report.measured() is not None
    whole = report.measured(report.batches[index]) or report.expected(report.batches[index])
    if whole is None or whole.dense_s <= 0:
        return []
    made = []
    longest = max(whole.dense_s, whole.ours_s)
    for name in ("dense", "sparsec"):
        times = [(i, g, _seconds(g.cost(index, measured), name)) for i, g in enumerate(groups)]
        segments = [_segment(i, g, s, longest, index, name) for i, g, s in times if s / longest >= LEAST]
        small = sum(s for _, _, s in times if s / longest < LEAST)
        if small > 0:
            number = sum(s / longest < LEAST for _, _, s in times)
            label = f"{number} more row{'s' if number > 1 else ''}"
            segments.append(Segment("", f"{label}: {duration(small)}", "others", 100 * small / longest, "#layers"))
        all_of = whole.dense_s if name == "dense" else whole.ours_s
        made.append(Bar(name, duration(all_of), tuple(segments)))
    return made


def _seconds(cost: Cost | None, name: str) -> float:
    if cost is None:
        return 0.0
    return cost.dense_s if name == "dense" else cost.ours_s


def _segment(i: int, group: Group, seconds: float, longest: float, index: int, name: str) -> Segment:
    width = 100 * seconds / longest
    runs = "dense" if name == "dense" else group.first.at[index].decision
    tail = ".".join(group.name.split(".")[-2:])
    label = next((text for text in (tail, group.name.split(".")[-1]) if 0.72 * len(text) + 1.6 < width), "")
    title = f"{group.name}: {duration(seconds)}, runs {short_format(runs)}"
    return Segment(label, title, kind(runs), width, f"#row-{i}")


def columns(report: Explanation) -> list[tuple[str, str]]:
    """Header cells: (text, explanation)."""
    measured = report.measured() is not None
    first, *rest = report.batches
    made = [
        ("layer", "name, and why it runs as it does"),
        ("shape", "out_features x in_features"),
        ("zero", "share of weights that are exactly zero"),
        ("pattern", "what the zeros look like"),
        ("runs", f"format at batch {first}"),
        ("dense", "one call, dense"),
        ("ours", "one call, as it runs"),
    ]
    if measured:
        made += [("expected", "dense / ours by the cost model"), ("measured", "dense / ours, timed")]
    else:
        made += [("speedup" if not rest else f"x{first}", f"dense / ours by the cost model at batch {first}")]
    made += [(f"x{b}", f"dense / ours at batch {b}") for b in rest]
    return [*made, ("share", "of the time of all linear layers as they run")]


def row(report: Explanation, group: Group, index: int) -> dict[str, Any]:
    """A table row with its sort keys."""
    layer, n = group.first, len(group.layers)
    measured = report.measured() is not None
    expected, real = group.cost(0), group.cost(0, measured=True)
    shown = real if measured else expected
    cells = [
        Cell(f"{layer.shape[0]} x {layer.shape[1]}", layer.shape[0] * layer.shape[1]),
        Cell(group.zero),
        Cell(layer.pattern),
        Cell(short_format(layer.decision)),
        Cell(duration(shown.dense_s / n), f"{shown.dense_s / n:.4g}") if shown else Cell("-"),
        Cell(duration(shown.ours_s / n), f"{shown.ours_s / n:.4g}") if shown else Cell("-"),
        _ratio(expected),
        *([_ratio(real)] if measured else []),
        *(_ratio(group.cost(i, measured)) for i in range(1, len(report.batches))),
        Cell(percent(group.share), round(group.share, 5)),
    ]
    return {
        "id": f"row-{index}",
        "index": index,
        "name": group.name,
        "count": n,
        "reason": group.reason,
        "activation": group.activation,
        "kind": kind(layer.decision),
        "cells": cells,
        "share": round(100 * group.share, 2),
    }


def _ratio(cost: Cost | None) -> Cell:
    return Cell(f"{cost.speedup:.2f}x") if cost else Cell("-")


def reproduce(report: Explanation) -> str:
    """The command that makes this report again, where the model can be named in one."""
    batches = ",".join(map(str, report.batches))
    if not report.spec:
        return f"sparsec.explain(model, *inputs, batch=[{batches}])"
    tokens = f" --tokens {report.tokens}" if report.tokens else ""
    measure = " --measure" if report.measured() or report.whole else ""
    return f"sparsec explain {report.spec} --batch {batches}{tokens}{measure} --html report.html"
