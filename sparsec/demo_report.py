"""What the demo leaves: text on the terminal, and a folder with report.json, speedup.png and index.html.

In: the dict of ``sparsec.demo.run_demo``. Out: strings and files; nothing here measures.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
HALVES = ("encoder", "wide")
BUSY = 0.3  # of the ratio; on an idle machine intervals are a few percent wide
COLUMNS = ("zeros", "case", "Inductor ms", "sparsec ms", "speedup", "95 % interval", "what sparsec ran")


def halves(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, half) for each part that ran."""
    titles = {"encoder": "Encoder {model}", "wide": "Wide stack: {model}, one token of one user"}
    return [
        (titles[name].format(model=report[name]["model"]), report[name])
        for name in HALVES
        if name in report and "rows" in report[name]
    ]


def cells(row: Row) -> tuple[str, ...]:
    ratio = row["ratio"]
    return (
        f"{row['zeros']:.0%}",
        row["case"],
        f"{row['inductor_ms']['median']:.2f}",
        f"{row['ours_ms']['median']:.2f}",
        f"{ratio['value']:.2f}x",
        f"{ratio['low']:.2f} - {ratio['high']:.2f}",
        row["path"],
    )


def quality_lines(half: Mapping[str, Any]) -> list[str]:
    """One sentence a density about cosine similarity."""
    lines = []
    for entry in half["quality"]:
        masked = f"{entry['to_masked']['min']:.6f} to the same pruned model run dense (lowest)"
        dense = f", {entry['to_dense']['mean']:.3f} to the unpruned model (mean)" if "to_dense" in entry else ""
        lines.append(f"{entry['sparsity']:.0%} pruned: cosine {masked}{dense}")
    return lines


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """Everything that went another way than planned, each sentence once."""
    found = list(report["notes"])
    for name in HALVES:
        half = report.get(name, {})
        found += [half["skipped"]] if "skipped" in half else []
        found += [note for row in half.get("rows", ()) for note in row["notes"]]
        ratios = [row["ratio"] for row in half.get("rows", ())]
        if any(ratio["high"] - ratio["low"] > BUSY * ratio["value"] for ratio in ratios):
            found.append("something else ran on this machine meanwhile: the intervals are wide; run it again when idle")
    return list(dict.fromkeys(found))


def next_command(report: Mapping[str, Any]) -> str:
    return f"sparsec explain {shlex.quote(report['model'])} --html explain.html"


def print_report(report: Mapping[str, Any], console: Any, folder: Path) -> None:
    """Tables, explain text, similarity and where the files are, on a rich console."""
    from rich.table import Table

    for title, half in halves(report):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("case", COLUMNS[-1]) else "right")
        for row in half["rows"]:
            table.add_row(*cells(row))
        console.print(table)
        for line in quality_lines(half):
            console.print(line)
        if "explain" in half:
            console.print(f"\nsparsec.explain at {half['explain']['sparsity']:.0%} zeros, {half['explain']['case']}:")
            console.print(half["explain"]["text"], markup=False, soft_wrap=True)
        console.print()
    for note in notes_of(report):
        console.print(f"note: {note}", markup=False)
    console.print(
        "Speedup is Inductor's time over sparsec's, call by call in one process: the median and its 95 % interval.\n"
        f"Report: {folder / 'index.html'} ({report['seconds']:.0f} s)\nNext: {next_command(report)}",
        markup=False,
    )


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json, speedup.png where matplotlib is installed, and index.html; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "report.json"
    data.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    picture = folder / "speedup.png"
    picture.unlink(missing_ok=True)
    drawn = draw(report, picture)
    page = folder / "index.html"
    page.write_text(render_html(report, picture if drawn else None), encoding="utf-8")
    return [data, *([picture] if drawn else []), page]


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Speedup over zeros, a line a case with its interval. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    parts = halves(report)
    if not parts:
        return False
    figure = Figure(figsize=(5.4 * len(parts), 4.2), layout="constrained")
    for axes, (title, half) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for case in dict.fromkeys(row["case"] for row in half["rows"]):
            draw_case(axes, case, [row for row in half["rows"] if row["case"] == case])
        axes.axhline(1.0, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="zeros in the weights, %", ylabel="speedup over Inductor", title=title.replace(", ", ",\n", 1))
        axes.title.set_size(9)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return True


def draw_case(axes: Any, case: str, rows: Sequence[Row]) -> None:
    values = [row["ratio"]["value"] for row in rows]
    below = [row["ratio"]["value"] - row["ratio"]["low"] for row in rows]
    above = [row["ratio"]["high"] - row["ratio"]["value"] for row in rows]
    axes.errorbar(
        [100 * row["zeros"] for row in rows],
        values,
        yerr=[below, above],
        marker="o",
        markersize=4,
        capsize=3,
        label=case,
    )


def render_html(report: Mapping[str, Any], picture: Path | None) -> str:
    """One file without network: tables as HTML, the plot inline, the data as one JSON block."""
    from sparsec.report_html import script_json, template

    return template("demo.html.j2").render(
        environment=report["environment"],
        halves=[(title, half, quality_lines(half)) for title, half in halves(report)],
        columns=COLUMNS,
        cells=cells,
        notes=notes_of(report),
        next_command=next_command(report),
        picture=base64.b64encode(picture.read_bytes()).decode() if picture else "",
        data=script_json(report),
    )
