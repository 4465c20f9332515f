"""``python -m benchmarks.gpu``: measure the rows and write the report as they come. See ``--help``."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.results import Results, cells, tally
from benchmarks.gpu.rows import Row, everything, pending, quick
from benchmarks.gpu.run import ProcessWorker, WorkerGone, run
from sparsec.errors import BadOptionValue, SparsecError

FOLDER = Path("benchmarks") / "results"
MINUTES, QUICK_MINUTES = 7.5, 4.0
INDUCTOR = 0.3  # of the time may go into compiling the dense products


def main(
    quick_only: Annotated[bool, typer.Option("--quick", help="The most telling rows, four minutes.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after this long; 0: 7.5, with --quick 4.")] = 0.0,
    configs: Annotated[int, typer.Option(help="Configurations of each kernel that are tried; 0: 3, quick 2.")] = 0,
    only: Annotated[str, typer.Option(help="Regular expression; keeps the rows whose name it matches.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Keep rows of an earlier run on the same GPU.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = FOLDER,
    list_only: Annotated[bool, typer.Option("--list", help="Print the names of the rows and stop.")] = False,
) -> None:
    """Time every GPU kernel against the best dense product: cold weights, CUDA graphs, everything in turn."""
    rows = chosen(quick_only, only)
    if list_only:
        print("\n".join(row.name for row in rows))
        return
    reason = no_gpu()
    if reason:
        print(f"gpu-bench: skipped, {reason}")
        return
    output.mkdir(parents=True, exist_ok=True)
    limit_s = 60 * (minutes or (QUICK_MINUTES if quick_only else MINUTES))
    until = time.monotonic() + limit_s
    worker = ProcessWorker(configs or (2 if quick_only else 3))
    results = Results(output, worker.said, resume)
    waiting = pending(rows, results.done)
    print(f"{worker.said['gpu']}: {len(waiting)} rows, {limit_s / 60:g} minutes, into {results.path}", flush=True)
    workers = iter((worker,))

    def start() -> ProcessWorker:
        return next(workers, None) or ProcessWorker(worker.configs)

    try:
        for found in run(waiting, start, until, INDUCTOR * limit_s):
            results.add(found)
            print(line(found), flush=True)
    finally:  # whatever stops the run, what was measured is drawn
        results.write()
        results.draw()
    left = len(pending(rows, results.done))
    said = ", ".join(f"{count} {name}" for name, count in tally(results.rows).items())
    print(f"targets: {said}." + (f" {left} rows were not measured in this time; --resume goes on." if left else ""))


def chosen(quick_only: bool, only: str) -> list[Row]:
    """Rows in their order, filtered. Raises BadOptionValue."""
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise BadOptionValue(key="--only", value=only, expected=f"it is no regular expression ({error})") from None
    found = [row for row in (quick() if quick_only else everything()) if wanted.search(row.name)]
    if not found:
        raise BadOptionValue(key="--only", value=only, expected="it matches no row; see --list")
    return found


def no_gpu() -> str:
    """Why nothing can be measured here; empty where it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    return "torch was built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"


def line(found: dict[str, Any]) -> str:
    said = cells(found)
    return f"{said[0]:28} dense {said[1]:>18}  ours {said[2]:>8}  {said[3]:>20}  {said[4]}  {said[-1]}"


if __name__ == "__main__":
    try:
        typer.run(main)
    except (SparsecError, WorkerGone) as error:
        print(f"gpu-bench: {error}", file=sys.stderr)
        sys.exit(2)
