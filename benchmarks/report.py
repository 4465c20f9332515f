"""The report of a bench run. In: results. Out: report.json, table.md, speedup.png, and text on a terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import quantised_report
from benchmarks.cases import Case
from benchmarks.coordinator import Result

Row = Mapping[str, Any]


def write_report(
    results: Sequence[Result], chosen: Sequence[Case], names: Sequence[str], seconds: float, folder: Path
) -> dict[str, Any]:
    """Write all files and return what report.json holds. ``chosen``: what was to be measured."""
    report = {
        "version": 1,
        "environment": environment(),
        "engines": list(names),
        "seconds": seconds,
        "rows": [result.to_dict() for result in results],
        "missing": [case.name for case in chosen[len(results) :]],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(report), encoding="utf-8")
    draw(report, folder / "speedup.png")
    return report


def environment() -> dict[str, Any]:
    import torch

    import sparsec

    found = {"sparsec": sparsec.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = __import__(package).__version__
        except ImportError:
            found[package] = "not installed"
    return {**found, "cpu": cpu_name(), "isa": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


REACHED = ("vs best dense", "vs Inductor", "target", "byte limit", "path")
WIDTH = 260  # of the tables in a pipe
LEFT = ("case", "quantised", "path", "peer's path", "target")
NOISY = 1.6


def columns(report: Mapping[str, Any]) -> list[str]:
    """Headers: the case, a time for each engine that ran at all, and what sparsec reached."""
    rows = [row for row in report["rows"] if not quantised_report.is_quantised(row)]
    ran = [name for name in report["engines"] if any(name in row["engines"] for row in rows)]
    return ["case", *ran, *REACHED]


def tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Headers and then the rows of each table: plain weights, quantised weights; those that have rows."""
    plain = [row for row in report["rows"] if not quantised_report.is_quantised(row)]
    grids = [row for row in report["rows"] if quantised_report.is_quantised(row)]
    found = []
    if plain:
        headers = columns(report)
        found.append([headers, *(cells(row, headers) for row in plain)])
    if grids:
        headers = quantised_report.columns(grids, report["engines"])
        found.append([headers, *(quantised_report.cells(row, headers) for row in grids)])
    return found


def cells(row: Row, headers: Sequence[str]) -> list[str]:
    times = [time_of(row, name) for name in headers[1 : -len(REACHED)]]
    ratio, inductor, limit = row["ratio"], row["ratio_to_inductor"], row["byte_limit"]
    path = row["engines"].get("sparsec", {}).get("path", row["declined"].get("sparsec", ""))
    return [
        row["name"],
        *times,
        f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-",
        f"{inductor['value']:.2f}x" if inductor else "-",
        f"{row['target']:.2f} {row['verdict']}".strip() if row["target"] else "",
        f"{limit:.2f}x" if limit else "",
        path,
    ]


def time_of(row: Row, name: str) -> str:
    """Median in microseconds; ``*`` marks the best dense peer."""
    if name not in row["engines"]:
        return "-"
    return f"{row['engines'][name]['us']['median']:.0f}{'*' if name == row['best_dense'] else ''}"


def markdown(report: Mapping[str, Any]) -> str:
    text = ""
    for headers, *rows in tables(report):
        lines = [headers, ["---"] * len(headers), *rows]
        text += "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"
    return text + "\n".join(footer(report)) + "\n"


def footer(report: Mapping[str, Any]) -> list[str]:
    """How the numbers were got, and why engines are missing."""
    env = report["environment"]
    refused = sorted({f"{name}: {why}" for row in report["rows"] for name, why in row["declined"].items()})
    return [
        "Microseconds of one layer (or one encoder call), medians; * is the best dense peer. Ratios: its time over "
        "that of sparsec, round by round, with 95 % intervals. Byte limit: the ratio if reading weights were all. "
        "Targets: layers against the best dense peer, encoder against Inductor.",
        *quantised_report.notes([row for row in report["rows"] if quantised_report.is_quantised(row)]),
        f"{env['cpu']} ({env['isa']}, {env['cores']} cores), torch {env['torch']}, onnxruntime {env['onnxruntime']}, "
        f"openvino {env['openvino']}, {report['seconds']:.0f} s.",
        *busy(report),
        *([f"Not reached in the time given: {len(report['missing'])} cases."] if report["missing"] else []),
        *(f"Not run: {line}" for line in refused),
    ]


def busy(report: Mapping[str, Any]) -> list[str]:
    """A sentence where something else ran on the machine: then only the intervals say what is known."""
    rows = [[row["engines"].get(name) for name in (row["best_dense"], "sparsec")] for row in report["rows"]]
    noisy = [row for row in rows if any(e and e["us"]["q80"] > NOISY * e["us"]["min"] for e in row)]
    if not noisy:
        return []
    return [
        f"The machine was busy in {len(noisy)} of {len(rows)} rows: a fifth of the rounds of the best dense peer or of "
        f"sparsec took more than {NOISY:g} times as long as the fastest."
    ]


def print_report(report: Mapping[str, Any], console: Any) -> None:
    from rich.table import Table

    if not console.is_terminal:
        console.width = WIDTH
    for headers, *rows in tables(report):
        table = Table(box=None, pad_edge=False)
        for name in headers:
            table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in footer(report):
        console.print(line, markup=False)


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Bars: speedup of sparsec over the best dense peer, targets as ticks. False without matplotlib or ratios."""
    rows = [row for row in report["rows"] if row["ratio"]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(9, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [row["ratio"]["value"] for row in rows]
    errors = [[abs(row["ratio"]["value"] - row["ratio"][end]) for row in rows] for end in ("low", "high")]
    axes.barh(range(len(rows)), values, xerr=errors, height=0.7, color="#4c78a8", ecolor="0.3", capsize=2)
    for i, row in enumerate(rows):
        if row["target"]:
            axes.plot([row["target"]] * 2, [i - 0.4, i + 0.4], color="#e45756", linewidth=2)
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speedup of sparsec over the best dense peer (red: target)")
    figure.savefig(path, dpi=130)
    return True
