"""From JSON lines to accuracy.md and accuracy.json: tables, gates, relations. Holds no path of any machine."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.claims import claims
from benchmarks.accuracy.grid import Row
from benchmarks.accuracy.relations import FAILS, MISSING, SPREADS, Costs, Relation, judge, spread, together
from benchmarks.accuracy.run import Line, Task, code, done
from sparsec.evaluate import paired

LABELS = ("50%", "60%", "70%", "75%", "8:16", "4:8", "2:4", "64:2:8")
UNIT = {"causal": "nats a token more than dense", "encoder": "1 - cosine to the dense embedding"}
LEAST_DRAWS = 3


Found = Mapping[tuple[str, int], Line]  # (row, draw) -> what was measured of it


def report(wanted: Sequence[Task], lines: Sequence[Line], command: str) -> dict[str, Any]:
    """What accuracy.json holds. ``wanted``: every task of this benchmark, measured or not."""
    return report_of(wanted, lines, command, model_report)


def report_of(
    wanted: Sequence[Task],
    lines: Sequence[Line],
    command: str,
    of_model: Callable[[Mapping[str, Any], Sequence[Task], Found], dict[str, Any]],
) -> dict[str, Any]:
    """A report of every model with facts: what ``of_model`` says of (its facts, its tasks, what was measured), and how
    much of what was wanted that is."""
    there = done(lines)
    facts = {line["fixture"]: line["facts"] for line in lines if "facts" in line}
    errors = {(line["fixture"], line["row"]): line["error"] for line in lines if "error" in line}
    models = []
    for key in dict.fromkeys(task.fixture.key for task in wanted):
        mine = [task for task in wanted if task.fixture.key == key]
        if key not in facts:
            continue
        found = {(task.row.name, task.draw): there[task.key] for task in mine if task.key in there}
        models.append(
            {
                "facts": dict(facts[key]),
                **of_model(facts[key], mine, found),
                "refused": {name: why for (k, name), why in errors.items() if k == key and (name, 0) not in found},
                "measured": len(found),
                "wanted": len(mine),
                "other_code": sum(line["code"] != code() for line in found.values()),
            }
        )
    return {"version": 1, "command": command, "environment": environment(), "models": models}


def environment() -> dict[str, str]:
    import torch

    import sparsec

    return {"sparsec": sparsec.__version__, "torch": torch.__version__, "python": platform.python_version()}


def rows_of(tasks: Sequence[Task], found: Found) -> Iterator[tuple[Row, list[Line]]]:
    """Each row once, with its lines by draw."""
    for row in {task.row.name: task.row for task in tasks}.values():
        yield row, [line for (name, _), line in sorted(found.items()) if name == row.name]


def fixed_rows(tasks: Sequence[Task]) -> frozenset[str]:
    """The rows that are the same whatever is drawn."""
    return frozenset(task.row.name for task in tasks if not task.row.draws_differ)


def model_report(facts: Mapping[str, Any], tasks: Sequence[Task], found: Found) -> dict[str, Any]:
    costs, fixed = {key: line["costs"] for key, line in found.items()}, fixed_rows(tasks)
    judged = gates(facts, costs)
    failed = [gate["name"] for gate in judged if gate["passed"] is False]
    related = [relation_report(r, costs, fixed, failed) for r in claims() if r.model == facts["kind"]]
    shown = [row_report(row, lines) for row, lines in rows_of(tasks, found)]
    return {"gates": judged, "rows": [row for row in shown if row], "relations": related}


def row_report(row: Row, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Mean cost over draws with its 95 % interval over windows; ``spread``: standard deviation over draws."""
    if not lines:
        return None
    windows = [statistics.fmean(values) for values in zip(*(line["costs"] for line in lines), strict=True)]
    cost, interval = paired(windows)
    between = spread({(row.name, line["draw"]): line["costs"] for line in lines}, row.name)
    return {
        "name": row.name,
        "recipe": dict(row.recipe),
        "draws": len(lines),
        "draws_differ": row.draws_differ,
        "cost": round(cost, 5),
        "interval": [round(x, 5) for x in interval] if interval else None,
        "spread": None if between is None else round(between, 5),
        "zeros": lines[0]["achieved"],
        "bits": lines[0]["bits"],
        "seconds": round(statistics.median(line["seconds"] for line in lines), 1),
    }


def relation_report(
    relation: Relation, costs: Costs, fixed: frozenset[str], failed: Sequence[str] = ()
) -> dict[str, Any]:
    """``failed``: gates that the model did not pass; then its numbers are shown and rank nothing."""
    found = [judge(pair, costs, fixed) for pair in relation.pairs]
    return {
        "text": relation.text,
        "said": relation.said,
        "verdict": f"not judged: gate {', '.join(failed)}" if failed else together(found),
        "hard": relation.hard,
        "draws": min((f.draws for f in found if f.verdict != MISSING), default=0),
        "fixed": all(p.a in fixed and p.b in fixed for p in relation.pairs),
        "pairs": [f.to_dict() for f in found],
    }


def gates(facts: Mapping[str, Any], costs: Costs) -> list[dict[str, Any]]:
    """What a model has to pass before it may rank methods. ``passed`` is None where it was not measured."""

    def mean(name: str) -> float | None:
        means = [statistics.fmean(values) for (row, _), values in sorted(costs.items()) if row == name]
        return statistics.fmean(means) if means else None

    def gate(name: str, text: str, value: float | None, least: float) -> dict[str, Any]:
        passed = None if value is None else value >= least
        return {"name": name, "text": text, "value": None if value is None else round(value, 4), "passed": passed}

    made = []
    if facts["kind"] == "causal":
        better = facts["trigram"] - facts["dense"]
        made = [
            gate("g1", "the dense model beats a trigram model of the calibration text by 0.3 nats", better, 0.3),
            gate("g2", "random 50 % costs at least 1 nat", mean("random 50%"), 1.0),
            gate("g3", "magnitude 50 % costs at least 0.05 nats", mean("magnitude 50%"), 0.05),
        ]
    between = spread(costs, "wanda 50%")
    text = f"spread of Wanda 50 % over draws; each claim below needs a gap of {SPREADS} spreads at its own pattern"
    return [
        *made,
        {"name": "g4", "text": text, "value": None if between is None else round(between, 5), "passed": None},
    ]


def broken(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each gate that is not passed and each hard relation that does not hold."""
    said = []
    for model in report["models"]:
        name = model["facts"]["model"]
        said += [f"{name}: gate {g['name']} is not passed" for g in model.get("gates", ()) if g["passed"] is False]
        said += [
            f"{name}: {r['text']} does not hold" for r in model["relations"] if r["hard"] and r["verdict"] == FAILS
        ]
    return said


def markdown(report: Mapping[str, Any]) -> str:
    env = report["environment"]
    lines = [
        "# What pruning costs",
        "",
        f"Made by `{report['command']}` with sparsec {env['sparsec']}, torch {env['torch']}. "
        "DIR holds `tinylm` (a checkpoint folder), `calib.txt` and `test.txt`.",
        "Small models rank methods; they say nothing about models of billions of weights.",
    ]
    for model in report["models"]:
        lines += ["", *model_lines(model)]
    return "\n".join(lines) + "\n"


def model_lines(model: Mapping[str, Any]) -> list[str]:
    facts = model["facts"]
    dense = f" Dense: {facts['dense']:.3f} nats a token." if "dense" in facts else ""
    lines = [
        f"## {facts['model']}: {UNIT[facts['kind']]}",
        "",
        f"{facts['weights'] / 1e6:.1f} M weights.{dense} {facts['windows']} test windows ({facts['tokens']} tokens of "
        f"{facts['test']}); a draw is {facts['samples']} segments of {facts['seqlen']} tokens of {facts['calib']}. "
        f"{model['measured']} of {model['wanted']} runs are done."
        + (f" {model['other_code']} were measured with other sources of sparsec." if model["other_code"] else ""),
        "± is the half width of the paired 95 % interval over windows (Student's t).",
        "",
        *matrix(model["rows"]),
        "",
        *others(model["rows"]),
        "",
        "### Gates",
        "",
        *(f"- {g['name']}: {g['text']}: {gate_says(g)}" for g in model["gates"]),
        "",
        "### Relations",
        "",
        *relation_lines(model["relations"]),
    ]
    if model["refused"]:
        lines += ["", "### Refused", "", *(f"- {name}: {why}" for name, why in model["refused"].items())]
    return lines


def gate_says(gate: Mapping[str, Any]) -> str:
    value = "not measured" if gate["value"] is None else f"{gate['value']:.4f}"
    return value if gate["passed"] is None else f"{value}, {'passed' if gate['passed'] else 'NOT passed'}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def cost_of(row: Mapping[str, Any]) -> str:
    half = f" ± {(row['interval'][1] - row['interval'][0]) / 2:.3f}" if row["interval"] else ""
    return f"{row['cost']:.3f}{half}"


def parts(name: str) -> tuple[str, str]:
    method, _, label = name.rpartition(" ")
    return method, label


def matrix(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods x patterns."""
    cells = {parts(row["name"]): cost_of(row) for row in rows}
    labels = [label for label in LABELS if any(label == there for _, there in cells)]
    methods = dict.fromkeys(method for method, _ in cells)
    bits = {parts(row["name"])[1]: row["bits"] for row in rows if "(" not in row["name"]}
    body = [[f"`{method}`", *(cells.get((method, label), "") for label in labels)] for method in methods]
    return table(["method", *labels], [*body, ["*bits a weight*", *(f"{bits[label]:.2f}" for label in labels)]])


def others(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the matrix has no room for: draws, spread over them, time; bits of outliers."""

    def cells(row: Mapping[str, Any]) -> list[str]:
        spread_of = "" if row["spread"] is None else f"{row['spread']:.4f}"
        draws = str(row["draws"]) if row["draws_differ"] else "any"
        return [
            f"`{row['name']}`",
            draws,
            spread_of,
            f"{row['zeros']:.4f}",
            f"{row['bits']:.2f}",
            f"{row['seconds']:.0f}",
        ]

    inner = table(["row", "draws", "spread over draws", "zeros", "bits", "seconds"], map(cells, rows))
    return ["<details><summary>Each row</summary>", "", *inner, "", "</details>"]


def relation_lines(relations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table; ``provisional`` where fewer than three draws were compared."""
    body = []
    for relation in relations:
        few = relation["draws"] < LEAST_DRAWS and not relation["fixed"] and relation["draws"]
        verdict = f"**{relation['verdict']}**" + (f" (provisional: draws {relation['draws']})" if few else "")
        said = [pair_says(pair) for pair in relation["pairs"]]
        body.append(
            [relation["text"] + (" *" if relation["hard"] else ""), relation["said"], verdict, "<br>".join(said)]
        )
    note = (
        "Verdicts need the interval on one side of 0 in every draw, and for < a gap above g4; ≤ and = allow 5 % of the "
        "second cost. There is one training seed. Hard relations (*) fail the command where they do not hold. "
        "Numbers: mean of first - second, [outermost bounds of the draws' intervals]."
    )
    return [note, "", *table(["relation", "why expected", "verdict", "numbers"], body)]


def pair_says(pair: Mapping[str, Any]) -> str:
    if pair["verdict"] == MISSING:
        return f"{pair['pair']}: not measured"
    why = f", {pair['why']}" if pair["why"] else ""
    return f"{pair['pair']}: {pair['gap']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}] {pair['verdict']}{why}"


def write(made: Mapping[str, Any], folder: Path) -> None:
    (folder / "accuracy.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (folder / "accuracy.md").write_text(markdown(made), encoding="utf-8")
