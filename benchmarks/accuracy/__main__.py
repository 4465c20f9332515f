"""``python -m benchmarks.accuracy``: measure what pruning costs and write the tables. See ``--help``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsec.cli.common import progress
from sparsec.errors import BadOptionValue, SparsecError

if TYPE_CHECKING:
    from benchmarks.accuracy.fixture import Fixture, Settings

EVAL = "SPARSEC_EVAL"
FOLDER = Path(__file__).resolve().parent.parent
DEFAULT_MINUTES = 15.0
ENCODER_SEQLEN = 128  # sentence encoders read short text
HELP_DIR = f"environment variable {EVAL}=DIR: DIR/tinylm, DIR/calib.txt, DIR/test.txt"


def main(
    model: Annotated[str, typer.Option(help=f"Checkpoint folder of a causal language model; or {HELP_DIR}.")] = "",
    calib: Annotated[str, typer.Option(help="Text file that calibration segments are drawn from.")] = "",
    test: Annotated[str, typer.Option(help="Text file that models are judged on.")] = "",
    encoder: Annotated[str, typer.Option(help="An encoder, judged by its embeddings; empty: none.")] = "minilm",
    draws: Annotated[int, typer.Option(min=1, help="Calibration draws a row.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Calibration segments a draw.")] = 64,
    windows: Annotated[int, typer.Option(min=2, help="Test windows.")] = 48,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a segment and of a window.")] = 256,
    minutes: Annotated[float, typer.Option(help="Start no row after this long; 0: never stop.")] = DEFAULT_MINUTES,
    only: Annotated[str, typer.Option(help="Regular expression; keeps the rows whose name it matches.")] = "",
    activations: Annotated[bool, typer.Option("--activations", help="Gates instead of masks and values.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what older sources measured.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Print what is still to be measured and stop.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of accuracy.* or activations.*")] = FOLDER,
) -> None:
    """Prune a language model and an encoder by every method, judge the results window by window, and write
    accuracy.md: a table method x pattern with paired 95 % intervals, and which relations of papers hold.

    Rows are kept in accuracy.jsonl as they are measured; the same command goes on where the last one stopped.
    --activations does the same for methods that make activations sparse, into activations.{jsonl,json,md,png}.
    Exit code 1: a model fails a gate, or a relation that has to hold does not.
    """
    from benchmarks.accuracy import activations_report, report
    from benchmarks.accuracy.activations import activation_grid
    from benchmarks.accuracy.control import known
    from benchmarks.accuracy.fixture import Settings
    from benchmarks.accuracy.grid import grid
    from benchmarks.accuracy.report import broken
    from benchmarks.accuracy.run import done, read, run, tasks

    shown = re_of(only)
    with known():
        fixtures = fixtures_of(model, calib, test, encoder, Settings(samples, seqlen, windows))
        if activations and not model:
            fixtures += relu_twin(fixtures[0])
        every = tasks(fixtures, activation_grid() if activations else grid(), draws)
        chosen = [task for task in every if shown.search(task.row.name)]
        name = activations_report.NAME if activations else "accuracy"
        lines = output / f"{name}.jsonl"
        if list_only:
            there = done(read(lines))
            todo = [task for task in chosen if task.key not in there]
            print("\n".join(f"{task.fixture.name}: {task.row.name}, draw {task.draw}" for task in todo))
            return
        try:
            with progress("accuracy") as step:
                for line in run(chosen, lines, minutes=minutes, fresh=fresh, step=step):
                    if "error" in line:
                        print(f"accuracy: {line['row']}: {line['error']}", file=sys.stderr)
        finally:  # whatever stops the run, what was measured is kept
            said = command(draws, samples, windows, seqlen, encoder, activations)
            if activations:
                made = activations_report.activation_report(every, read(lines), said)
                activations_report.write(made, output)
            else:
                made = report.report(every, read(lines), said)
                report.write(made, output)
    print(f"wrote {output / name}.md")
    if wrong := broken(made):
        print("\n".join(f"accuracy: {line}" for line in wrong), file=sys.stderr)
        raise typer.Exit(1)


def re_of(only: str) -> re.Pattern[str]:
    try:
        return re.compile(only)
    except re.error as error:
        raise BadOptionValue(key="--only", value=only, expected=f"it is no regular expression ({error})") from None


def fixtures_of(model: str, calib: str, test: str, encoder: str, settings: Settings) -> list[Fixture]:
    """The language model and the encoder. Raises BadOptionValue where nothing says where they are."""
    from benchmarks.accuracy.fixture import Settings, fixture

    folder = Path(os.environ.get(EVAL) or ".")
    if not os.environ.get(EVAL) and not (model and calib and test):
        raise BadOptionValue(
            key="--model", value=model, expected=f"give --model, --calib and --test, or set the {HELP_DIR}"
        )
    text = Path(calib or folder / "calib.txt"), Path(test or folder / "test.txt")
    found = [fixture(str(model or folder / "tinylm"), *text, settings)]
    if encoder:
        short = min(settings.seqlen, ENCODER_SEQLEN)
        found.append(fixture(encoder, *text, Settings(settings.samples, short, settings.windows)))
    return found


def relu_twin(fixture: Fixture) -> list[Fixture]:
    """The model of the same data with ReLU, where its folder lies beside: rows of their own are measured on it."""
    from dataclasses import replace

    from sparsec.models import load_model

    folder = Path(os.environ.get(EVAL) or ".") / "tinylm-relu"
    if not folder.is_dir():
        return []
    return [replace(fixture, loaded=load_model(str(folder), "fp32"), suits="relu", _draws={})]


def command(draws: int, samples: int, windows: int, seqlen: int, encoder: str, activations: bool = False) -> str:
    """What made the tables, without any path; the defaults are not repeated."""
    said = {"draws": (draws, 3), "samples": (samples, 64), "windows": (windows, 48), "seqlen": (seqlen, 256)}
    changed = [f"--{name} {value}" for name, (value, default) in said.items() if value != default]
    changed += ["--activations"] if activations else []
    changed += [] if encoder == "minilm" else ["--encoder ''" if not encoder else "--encoder FOLDER"]
    return f"{EVAL}=DIR make accuracy" + (f' ARGS="{" ".join(changed)}"' if changed else "")


def entry() -> None:
    try:
        typer.run(main)
    except SparsecError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    entry()
