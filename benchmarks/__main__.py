"""``python -m benchmarks``: measure the grid and write the report. See ``--help``."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks import activation_cases, cases, quantised_cases
from benchmarks.engines import ENGINES
from sparsec.cli.common import console, progress
from sparsec.errors import BadOptionValue, SparsecError, did_you_mean, listed

if TYPE_CHECKING:
    from benchmarks.coordinator import Result

PLAIN_S, QUANTISED_S = 4.0, 2.0  # of timing; quantised rows are many, and their calls short
DEFAULT_MINUTES = 23.0  # fifteen for plain weights, eight for quantised ones


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, about five minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid, hours.")] = False,
    only: Annotated[
        str, typer.Option(help="Regular expression; keeps the cases whose name it matches, for example quantised.")
    ] = "",
    engines: Annotated[str, typer.Option(help="Names separated by commas; all by default.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of every engine; 0: the cores, at most two.")] = 0,
    rounds: Annotated[int, typer.Option(help="Most rounds of a case.")] = 40,
    budget: Annotated[float, typer.Option(help="Seconds of timing a case; 0: two or four.")] = 0.0,
    minutes: Annotated[float, typer.Option(help="Start no case after this long; 0: never stop.")] = -1.0,
    tune: Annotated[str, typer.Option(help="The tune option of sparsec: quick or full; empty for its default.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("bench_report"),
    list_only: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
) -> None:
    """Time every engine on the same weights, in processes of their own that take turns round by round.

    The ratio is that of sparsec to the best dense peer of the same dtype: eager, Inductor, Inductor with freezing, ONNX
    Runtime (fp32), OpenVINO where it is installed. Cold rows walk through more weights than the caches hold. Cases of
    quantised weights have peers of their own: ONNX Runtime's int8 and MatMulNBits, torch's int8 and int4.
    """
    chosen = choose(quick, full, only, threads or cases.default_threads())
    if list_only:
        print("\n".join(case.name for case in chosen))
        return
    names = names_of(engines)
    output.mkdir(parents=True, exist_ok=True)
    for old in ("report.json", "table.md", "speedup.png", *(f"{name}.log" for name in ENGINES)):
        (output / old).unlink(missing_ok=True)
    from benchmarks.report import print_report, write_report

    started = time.perf_counter()
    limit_s = 60 * (minutes if minutes >= 0 else 0.0 if full else DEFAULT_MINUTES) or float("inf")
    results: list[Result] = []
    try:
        for result in run(chosen, names, rounds, budget or (2.0 if quick else 0.0), output, tune, started + limit_s):
            results.append(result)
            write_report(results, chosen, names, time.perf_counter() - started, output)
    finally:  # whatever stops the run, what was measured is kept
        if results:
            report = write_report(results, chosen, names, time.perf_counter() - started, output)
            print_report(report, console())


def choose(quick: bool, full: bool, only: str, threads: int) -> list[cases.Case]:
    """The grid, filtered and ordered so that dense engines keep what they built. Raises BadOptionValue."""
    name = "full" if full else "quick" if quick else "standard"
    grid = [case for module in (cases, quantised_cases, activation_cases) for case in getattr(module, name)(threads)]
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise BadOptionValue(key="--only", value=only, expected=f"it is no regular expression ({error})") from None
    found = [case for case in grid if wanted.search(case.name)]
    if not found:
        raise BadOptionValue(key="--only", value=only, expected="it matches no case; see --list")
    return sorted(found, key=lambda c: -c.threads)


def names_of(engines: str) -> list[str]:
    names = [name for name in engines.split(",") if name] or list(ENGINES)
    for name in names:
        if name not in ENGINES:
            near = did_you_mean(name, ENGINES)
            raise BadOptionValue(key="--engines", value=name, expected=f"known are {listed(ENGINES)}{near}")
    return names


def run(
    chosen: list[cases.Case], names: list[str], rounds: int, budget_s: float, folder: Path, tune: str, until: float
) -> Iterator[Result]:
    """Measure case after case until the clock says ``until``; workers are started anew for another thread count.

    ``budget_s``: of timing a case; 0 for that of its kind.
    """
    from benchmarks.coordinator import measure, workers

    done = 0
    with progress("bench") as step:
        for threads, found in groupby(chosen, key=lambda c: c.threads):
            if time.perf_counter() > until:
                return
            group = list(found)
            with workers(
                [name for name in names if any(map(ENGINES[name].takes, group))], threads, folder, tune
            ) as remotes:
                for case in group:
                    if time.perf_counter() > until:
                        return
                    seconds = budget_s or (QUANTISED_S if case.quantised else PLAIN_S)
                    yield measure(case, remotes, rounds, seconds, partial(step, done, len(chosen)))
                    done += 1


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparsecError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
