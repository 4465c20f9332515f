"""``make readme``: put the numbers of the last ``make bench`` and ``make demo`` between the markers of README.md.

In: bench_report/report.json and demo_report/report.json. Out: README.md, where only marked parts change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Cases of the table, in order, as regular expressions on case names; wins, draws and losses alike.
SHOWN = (
    r"4096x4096 bf16 M=1 cold (50|80|90)% t\d",
    r"11008x4096 bf16 M=1 cold 80% t\d",
    r"4096x4096 fp32 M=1 cold (50|80|90)% t\d",
    r"4096x4096 bf16 M=8 cold 80% t\d",
    r"4096x4096 bf16 M=64 cold 50% t\d",
    r"minilm 1x16 fp32 (0|80|90)% t\d",
    r"minilm 32x16 fp32 50% t\d",
)
PEERS = {"freezing": "Inductor, frozen", "inductor": "Inductor", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = fill(text, "bench", bench_table(read(ROOT / "bench_report" / "report.json", "make bench")))
    text = fill(text, "explain", explain_text(read(ROOT / "demo_report" / "report.json", "make demo")))
    readme.write_text(text, encoding="utf-8")
    print(f"wrote {readme}")


def read(path: Path, command: str) -> dict[str, Any]:
    if not path.exists():
        raise SystemExit(f"readme: there is no {path}; run {command} first.")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``. Raises ValueError without the markers."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"README.md has no <!-- {name} --> part")
    return pattern.sub(lambda m: f"{m.group(1)}{content.rstrip()}\n{m.group(2)}", text)


def bench_table(report: Mapping[str, Any]) -> str:
    """A markdown table of the shown cases, and how and where they were measured."""
    most = max(row["case"]["threads"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["case"]["threads"] == most and row["ratio"]]
    shown = [row for pattern in SHOWN for row in rows if re.fullmatch(pattern, row["name"])]
    head = (
        "layer or model",
        "zeros",
        "best dense peer",
        "sparsec",
        "vs best dense (95 % interval)",
        "vs Inductor",
        "what ran",
    )
    lines = [head, ("---",) * len(head), *(table_row(row) for row in shown)]
    env = report["environment"]
    where = (
        f"`make bench` on {env['cpu']} ({env['isa']}, {most} threads), torch {env['torch']}, "
        f"onnxruntime {env['onnxruntime']}. Medians of rounds in which the engines took turns; layers walk through "
        "more weights than the caches hold."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{where}"


def table_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    case, peer, ratio, inductor = row["case"], row["best_dense"], row["ratio"], row["ratio_to_inductor"]
    what = (
        f"MiniLM, batch {case['batch']} x {case['tokens']} tokens, {case['dtype']}"
        if case["kind"] == "encoder"
        else f"{case['n']}x{case['k']}, {case['dtype']}, {rows_of(case['m'])}"
    )
    return (
        what,
        f"{case['sparsity']:.0%}",
        f"{duration(row['engines'][peer]['us']['median'])} ({PEERS.get(peer, peer)})",
        duration(row["engines"]["sparsec"]["us"]["median"]),
        f"**{ratio['value']:.2f}x** ({ratio['low']:.2f} - {ratio['high']:.2f})",
        f"{inductor['value']:.2f}x" if inductor else "",
        row["engines"]["sparsec"]["path"],
    )


def rows_of(m: int) -> str:
    return "1 row" if m == 1 else f"{m} rows"


def duration(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.0f} us"


def explain_text(report: Mapping[str, Any]) -> str:
    """The explain table of the demo's encoder as a text block."""
    lines: Sequence[str] = report["encoder"]["explain"]["text"].rstrip().splitlines()
    return "\n".join(["```text", *lines, "```"])


if __name__ == "__main__":
    main()
