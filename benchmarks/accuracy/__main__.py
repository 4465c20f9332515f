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
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what older sources measured.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Print what is still to be measured and stop.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of accuracy.{jsonl,json,md}.")] = FOLDER,
) -> None:
    """Prune a language model and an encoder by every method, judge the results window by window, and write
    accuracy.md: a table method x pattern with paired 95 % intervals, and which relations of papers hold.

    Rows are kept in accuracy.jsonl as they are measured; the same command goes on where the last one stopped.
    Exit code 1: a model fails a gate, or a relation that has to hold does not.
    """
    from benchmarks.accuracy.control import known
    from benchmarks.accuracy.fixture import Settings
    from benchmarks.accuracy.grid import grid
    from benchmarks.accuracy.report import broken, report, write
    from benchmarks.accuracy.run import done, read, run, tasks

    shown = re_of(only)
    with known():
        fixtures = fixtures_of(model, calib, test, encoder, Settings(samples, seqlen, windows))
        every = tasks(fixtures, grid(), draws)
        chosen = [task for task in every if shown.search(task.row.name)]
        lines = output / "accuracy.jsonl"
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
            made = report(every, read(lines), command(draws, samples, windows, seqlen, encoder))
            write(made, output)
    print(f"wrote {output / 'accuracy.md'}")
    if said := broken(made):
        print("\n".join(f"accuracy: {line}" for line in said), file=sys.stderr)
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


def command(draws: int, samples: int, windows: int, seqlen: int, encoder: str) -> str:
    """What made the tables, without any path; the defaults are not repeated."""
    said = {"draws": (draws, 3), "samples": (samples, 64), "windows": (windows, 48), "seqlen": (seqlen, 256)}
    changed = [f"--{name} {value}" for name, (value, default) in said.items() if value != default]
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
