"""The table of quantised weights. In: rows of a report. Out: headers and cells.

Its columns differ from the other table: peers round x in ways of their own, so errors stand beside the times, and a
stack is told in tokens per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import GATED
from benchmarks.engines import ENGINES

Row = Mapping[str, Any]

REACHED = ("vs best peer", "target", "error", "peer's error", "tokens/s", "byte limit", "path", "peer's path")


def is_quantised(row: Row) -> bool:
    """Not activation sparsity, whose rows are in the other table whatever their weights."""
    return bool(row["case"].get("weights")) and row["case"]["kind"] not in GATED


def columns(rows: Sequence[Row], engines: Sequence[str]) -> list[str]:
    """The case, a time for each engine that ran at all, and what sparsec reached."""
    return ["quantised", *(name for name in engines if any(name in row["engines"] for row in rows)), *REACHED]


def cells(row: Row, headers: Sequence[str]) -> list[str]:
    """One row as text; times are medians in microseconds and ``*`` marks the best peer."""
    ours, peer = row["engines"].get("sparsec"), row["engines"].get(row["best_dense"])
    ratio, limit = row["ratio"], row["byte_limit"]
    return [
        row["name"].removeprefix("quantised "),
        *(_time(row, name) for name in headers[1 : -len(REACHED)]),
        f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "-",
        f"{row['target']:.2f} {row['verdict']}".strip() if row["target"] else "",
        _error(ours),
        _error(peer),
        tokens(row),
        f"{limit:.2f}x" if limit else "",
        ours["path"] if ours else row["declined"].get("sparsec", ""),
        peer["path"] if peer else "",
    ]


def tokens(row: Row) -> str:
    """Of sparsec and of the best peer, for a stack; a call of it is one token."""
    if row["case"]["kind"] != "stack":
        return ""
    shown = [row["engines"].get(name) for name in ("sparsec", row["best_dense"])]
    return " / ".join(f"{1e6 / engine['us']['median']:.1f}" if engine else "-" for engine in shown)


def _time(row: Row, name: str) -> str:
    if name not in row["engines"]:
        return "-"
    return f"{row['engines'][name]['us']['median']:.0f}{'*' if name == row['best_dense'] else ''}"


def _error(engine: Mapping[str, Any] | None) -> str:
    return f"{engine['error']:.1e}" if engine else ""


def notes(rows: Sequence[Row]) -> list[str]:
    """What the table means, and in what the peers differ; nothing without rows."""
    if not rows:
        return []
    ran = {name for row in rows for name in row["engines"]}
    peers = ", ".join(name for name, engine in ENGINES.items() if engine.dense and name in ran)
    return [
        f"Quantised: weights lie on a grid; x=int8 rounds x token by token. Peers ({peers}) read the same grid or its "
        "floats. Errors: largest difference to float torch on that grid with x as it is, over the largest value. "
        "Tokens/s: sparsec / best peer. Targets: against the best peer."
    ]
