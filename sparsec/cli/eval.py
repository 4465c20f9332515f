"""``sparsec eval``: accuracy beside the dense model's, in lm-eval's columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsec.cli.common import emit_json, progress
from sparsec.errors import InputError

if TYPE_CHECKING:
    from sparsec.evaluate import Evaluation, Result

EXAMPLE = """\
sparsec eval tiny:llama@80 --against tiny:llama --limit 8
sparsec eval PRUNED --against DENSE --tasks ppl,kl --text test.txt --limit 60 --json"""
TASK_VERSION = "1"  # of our tasks; raised when a number's meaning changes


def command(
    model: Annotated[
        str, typer.Argument(help="The changed model: folder, file.py:factory, hub id, minilm, tiny:llama.")
    ],
    against: Annotated[str | None, typer.Option(help="The dense model it came from.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="ppl, kl, similarity, with commas; else all that fit the model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; else Python's own language reference.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-L", help="Only the first so many windows.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window (256, or the model's context).")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Windows at once; changes speed only.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; else what the checkpoint has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Perplexity, KL and embedding similarity, paired with the dense model window by window.

    "vs dense" is the mean paired difference; where its 95 % interval holds zero, the two models cannot be told apart
    by this text, and the table says so.
    """
    from sparsec.evaluate import evaluate
    from sparsec.models import load_model

    content, name = text_of(text)
    loaded = load_model(model, dtype)
    dense = load_model(against, dtype) if against else None
    wanted = [task.strip() for task in tasks.split(",") if task.strip()] if tasks else []
    with progress("sparsec eval") as step:
        found = evaluate(
            loaded, dense, content, wanted, limit=limit, window=window, batch=batch, text_name=name, step=step
        )
    if as_json:
        emit_json(found.to_dict())
        return
    for line in lines(found):
        print(line)


def text_of(path: Path | None) -> tuple[str, str]:
    """A file's text and name; without one, text that every Python has. Raises InputError."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as error:
            raise InputError(detail=f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    from pydoc_data.topics import topics  # English prose that every Python has, so that a first look needs no download

    return "\n\n".join(topics[name] for name in sorted(topics)), "Python language reference"


def lines(found: Evaluation) -> Iterator[str]:
    """The table and what it rests on."""
    from sparsec.bench_output import table

    header = ["Tasks", "Version", "n-shot", "Metric", "", "Value", "", "Stderr"]
    compared = any(r.delta is not None for r in found.results)
    extra = ["dense", "vs dense", "95 % interval", "verdict"] if compared else []
    rows = [_row(r, compared) for r in found.results]
    yield table([*header, *extra], rows, left=("Tasks", "Metric", "verdict"))
    yield ""
    n = found.results[0].n
    yield (
        f"{found.model}{f' against {found.dense}' if found.dense else ''}: {n} windows of up to {found.window} tokens "
        f"({found.tokens} in all) of {found.text}; tokens by {found.tokenizer}"
    )
    if compared:
        yield "vs dense: mean of paired differences per window; for ppl as a change of the perplexity in percent"


def _row(result: Result, compared: bool) -> list[str]:
    arrow = "↑" if result.higher_is_better else "↓"
    stderr = "N/A" if result.stderr is None else f"{result.stderr:.4f}"
    row = [result.task, TASK_VERSION, "0", result.metric, arrow, f"{result.value:.4f}", "±", stderr]
    if not compared:
        return row
    if result.delta is None:
        return [*row, "", "", "", ""]
    interval = ""
    if result.interval is not None:
        interval = f"[{_change(result, result.interval[0])}, {_change(result, result.interval[1])}]"
    return [*row, f"{result.dense:.4f}", _change(result, result.delta), interval, result.verdict]


def _change(result: Result, delta: float) -> str:
    if result.metric != "ppl":
        return f"{delta:+.4f}"
    import math

    return f"{100 * math.expm1(min(delta, 700.0)):+.2f} %"
