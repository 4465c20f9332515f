"""From JSON lines to activations.md, .json and .png: what zero activations cost, and which relations hold."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.activations import CURVES, LABELS, activation_claims
from benchmarks.accuracy.report import (
    UNIT,
    Found,
    cost_of,
    fixed_rows,
    parts,
    relation_lines,
    relation_report,
    report_of,
    row_report,
    rows_of,
    table,
)
from benchmarks.accuracy.run import Line, Task

NAME = "activations"


def activation_report(wanted: Sequence[Task], lines: Sequence[Line], command: str) -> dict[str, Any]:
    """What activations.json holds."""
    return report_of(wanted, lines, command, _model)


def _model(facts: Mapping[str, Any], tasks: Sequence[Task], found: Found) -> dict[str, Any]:
    costs, fixed = {key: line["costs"] for key, line in found.items()}, fixed_rows(tasks)
    kind = tasks[0].fixture.suits or facts["kind"]
    shown = []
    for row, lines in rows_of(tasks, found):
        made = row_report(row, lines)
        if made:
            share = {key: round(statistics.fmean(line[key] for line in lines), 4) for key in ("zeros", "unread")}
            shown.append({**made, **share, "tokens": row.tokens, "late": row.late})
    relations = [relation_report(r, costs, fixed) for r in activation_claims() if r.model == kind]
    return {"rows": shown, "relations": relations}


def activation_lines(report: Mapping[str, Any]) -> str:
    env = report["environment"]
    lines = [
        "# What zero activations cost",
        "",
        f"Made by `{report['command']}` with sparsec {env['sparsec']}, torch {env['torch']}. "
        "DIR holds `tinylm`, `tinylm-relu` (checkpoint folders), `calib.txt` and `test.txt`.",
        "Small models rank methods; they say nothing about models of billions of weights.",
        "",
        f"![curves]({NAME}.png)",
    ]
    for model in report["models"]:
        lines += ["", *_lines(model)]
    return "\n".join(lines) + "\n"


def _lines(model: Mapping[str, Any]) -> Iterator[str]:
    facts = model["facts"]
    dense = f" Dense: {facts['dense']:.3f} nats a token." if "dense" in facts else ""
    yield f"## {facts['model']}: {UNIT[facts['kind']]}"
    yield ""
    yield (
        f"{dense} {facts['windows']} test windows ({facts['tokens']} tokens of {facts['test']}); a draw is "
        f"{facts['samples']} segments of {facts['seqlen']} tokens of {facts['calib']}, a quarter of which is held out. "
        f"{model['measured']} of {model['wanted']} runs are done."
        + (f" {model['other_code']} were measured with other sources of sparsec." if model["other_code"] else "")
    ).strip()
    yield "± is the half width of the paired 95 % interval over windows (Student's t)."
    yield ""
    yield from _matrix(model["rows"])
    yield ""
    yield "Share of zeros on the test windows, and of the weights of linear layers that meet nothing else:"
    yield ""
    head = ("row", "tokens gated", "scored", "zeros", "weights not needed", "draws", "seconds")
    yield from table(head, map(_cells, model["rows"]))
    if model["relations"]:
        yield ""
        yield "### Relations"
        yield ""
        yield from relation_lines(model["relations"])
    if model["refused"]:
        yield ""
        yield "### Refused"
        yield ""
        yield from (f"- {name}: {why}" for name, why in model["refused"].items())


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = "last half" if row["tokens"] == "last-half" else "all"
    scored = "last half" if row["late"] else "all"
    draws = str(row["draws"]) if row["draws_differ"] else "any"
    shares = (f"{row['zeros']:.1%}", f"{row['unread']:.1%}")
    return f"`{row['name']}`", tokens, scored, *shares, draws, f"{row['seconds']:.0f}"


def _matrix(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods x asked shares."""
    cells = {parts(row["name"]): cost_of(row) for row in rows}
    labels = [label for label in LABELS if any(label == there for _, there in cells)]
    methods = dict.fromkeys(method for method, _ in cells)
    body = [[f"`{method}`", *(cells.get((method, label), "") for label in labels)] for method in methods]
    return table(["method", *labels], body)


def curves(model: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float, float]]]:
    """Method -> (zeros, value, low, high) by rising zeros; value is perplexity, or the cost of an encoder."""
    dense = model["facts"].get("dense")

    def value(cost: float) -> float:
        return cost if dense is None else math.exp(dense + cost)

    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in model["rows"]:
        method, _ = parts(row["name"])
        if method in CURVES:
            low, high = row["interval"] or (row["cost"], row["cost"])
            found.setdefault(method, []).append((row["zeros"], value(row["cost"]), value(low), value(high)))
    none = value(0.0)
    return {method: [(0.0, none, none, none), *sorted(points)] for method, points in found.items()}


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """A panel a model: perplexity (1 - cosine of encoders) against zeros. False without matplotlib or curves."""
    shown = [(model, found) for model in report["models"] if len(found := curves(model)) > 1]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not shown:
        return False
    figure = Figure(figsize=(5 * len(shown), 3.6), layout="constrained")
    for axes, (model, found) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for method, points in found.items():
            x, y, low, high = zip(*points, strict=True)
            spans = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, yerr=spans, marker="o", markersize=3, capsize=2, linewidth=1.2, label=method)
        causal = "dense" in model["facts"]
        axes.set_title(model["facts"]["model"], fontsize=10)
        axes.set_xlabel("share of zeros on test tokens")
        axes.set_ylabel("perplexity" if causal else "1 - cosine to dense")
        axes.set_yscale("log" if causal else "linear")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def write(made: Mapping[str, Any], folder: Path) -> None:
    (folder / f"{NAME}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(activation_lines(made), encoding="utf-8")
    draw(made, folder / f"{NAME}.png")
