"""The files of a run: ``gpu-<model>.json`` (valid after every row, one line a row), ``.md`` and ``.png`` beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsec.cache import write_atomic

Found = Mapping[str, Any]
SAME_RUN = ("gpu", "isa", "sparsec", "torch", "triton", "cusparselt")  # what rows of one file have in common
HEADERS = (
    "row", "best dense, us", "ours, us", "ours / dense", "target", "against others", "TB/s", "of a copy", "MB",
    "pack, s", "max error", "relative", "same bits", "kernel",
)  # fmt: skip


class Results:
    """Rows of one GPU. ``resume``: keep those of a file that the same software measured on the same GPU."""

    def __init__(self, folder: Path, environment: Mapping[str, Any], resume: bool = False) -> None:
        self.environment = dict(environment)
        self.path = folder / f"gpu-{slug(environment['gpu'])}.json"
        self.rows: list[Found] = []
        if resume and self.path.exists():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if all(before["environment"].get(key) == self.environment.get(key) for key in SAME_RUN):
                self.rows = [row for row in before["rows"] if "failed" not in row]

    @property
    def done(self) -> list[str]:
        return [str(row["name"]) for row in self.rows]

    def add(self, row: Found) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        text = f'{{"environment": {json.dumps(self.environment)},\n"rows": [\n{lines}\n]}}\n'
        write_atomic(self.path, text.encode())
        write_atomic(self.path.with_suffix(".md"), markdown(self.environment, self.rows).encode())

    def draw(self) -> bool:
        return draw(self.environment, self.rows, self.path.with_suffix(".png"))


def slug(name: str) -> str:
    """``h200`` of ``H200``, ``rtx-4090`` of ``RTX 4090``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cells(row: Found) -> list[str]:
    if "failed" in row:
        return [row["name"], *["-"] * (len(HEADERS) - 2), f"failed: {row['failed']}"]
    dense, best = row["engines"].get(row["dense"]), row["engines"].get(row["best"])
    first = f"{dense['us']:.1f} {row['dense']}" if dense else "-"
    if not best:
        return [row["name"], first, *["-"] * (len(HEADERS) - 3), "none: see the notes"]
    ratio = row["ratios"].get("dense")
    others = [f"{than} {found[0]:.2f}x" for than, found in row["ratios"].items() if than != "dense"]
    return [
        row["name"], first, f"{best['us']:.1f}",
        f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})" if ratio else "-",
        "; ".join(aimed(t) for t in row["targets"]), "; ".join(others), f"{best['tb_s']:.2f}",
        f"{best['of_copy']:.0%}" if best["of_copy"] else "-", f"{best['bytes'] / 1e6:.1f}", f"{best['pack_s']:.2f}",
        f"{best['max_error']:.2g}", f"{best['relative_error']:.1e}", "yes" if best["same_bits"] else "NO", row["best"],
    ]  # fmt: skip


def aimed(target: Mapping[str, Any]) -> str:
    must = f"T {target['must']:g}" if target["must"] else ""
    stretch = f"S {target['stretch']:g}" if target["stretch"] else ""
    than = "" if target["than"] == "dense" else f" over {target['than']}"
    return f"{' '.join(s for s in (must, stretch) if s)}{than}: {target['verdict']}"


def markdown(environment: Mapping[str, Any], rows: Sequence[Found]) -> str:
    lines = [HEADERS, ["---"] * len(HEADERS), *(cells(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([f"# {environment['gpu']}", "", *footer(environment, rows), "", table, "", *notes(rows), ""])


def footer(environment: Mapping[str, Any], rows: Sequence[Found]) -> list[str]:
    env = environment
    counts = tally(rows)
    library = f"cuSPARSELt {env['cusparselt']}" if env.get("cusparselt") else "no cuSPARSELt"
    said = ", ".join(f"{counts[v]} {v}" for v in ("stretch", "reached", "below stretch", "missed", "not measured"))
    return [
        "Medians of rounds in which all run in turn; weights cold (copies of more than three times the L2 cache), "
        "calls in CUDA graphs of at least 20, bf16 x, ratios with 95 % intervals. Best dense: the faster of cuBLAS and "
        "Inductor max-autotune in the same rounds. TB/s: weight as stored, x and y. Errors against fp32.",
        "",
        f"{env['gpu']} ({env['isa']}, {env['sms']} SMs, L2 {env['l2_bytes'] >> 20} MB, a copy {env['copy_tb_s']} TB/s, "
        f"{env['sm_clock'] or 'clock not known'}); torch {env['torch']}, CUDA {env['cuda']}, Triton {env['triton']}, "
        f"{library}, sparsec {env['sparsec']}. Targets: {said}.",
        *(["", f"{env['cusparselt_note']}."] if env.get("cusparselt_note") else []),
    ]  # fmt: skip


def tally(rows: Sequence[Found]) -> dict[str, int]:
    counts = dict.fromkeys(("stretch", "reached", "below stretch", "missed", "not measured"), 0)
    for row in rows:
        for target in row.get("targets", ()):
            counts[target["verdict"]] += 1
    return counts


def notes(rows: Sequence[Found]) -> list[str]:
    """Each sentence once, with the rows it belongs to."""
    where: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes", ()):
            where.setdefault(note, []).append(row["name"])
    return [
        f"- {note} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for note, names in where.items()
    ]


def draw(environment: Mapping[str, Any], rows: Sequence[Found], path: Path) -> bool:
    """Bars: ours over the best dense, targets as ticks. False without matplotlib or ratios."""
    rows = [row for row in rows if row.get("ratios", {}).get("dense")]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = [row["ratios"]["dense"] for row in rows]
    errors = [[abs(r[0] - r[1]) for r in ratios], [abs(r[2] - r[0]) for r in ratios]]
    axes.barh(range(len(rows)), [r[0] for r in ratios], xerr=errors, height=0.7, color="#4c78a8", ecolor="0.3")
    for i, row in enumerate(rows):
        for target in (t for t in row["targets"] if t["than"] == "dense"):
            for value, color in ((target["must"], "#e45756"), (target["stretch"], "#54a24b")):
                if value:
                    axes.plot([value] * 2, [i - 0.4, i + 0.4], color=color, linewidth=2)
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than the best dense product, {environment['gpu']} (red: target, green: stretch)")
    figure.savefig(path, dpi=130)
    return True
