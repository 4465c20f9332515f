"""``sparsec demo``: the first five minutes, on real weights. See ``sparsec.demo`` for what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsec.cli.common import console, emit_json, progress

EXAMPLE = "sparsec demo --quick"


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A local Hugging Face folder of a text model, or minilm.")
    ] = "minilm",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer densities and shapes: under 90 seconds.")] = False,
    wide: Annotated[bool, typer.Option(help="Also run the wide LLM-shaped stack (needs 5 GB of memory).")] = True,
    tune: Annotated[str, typer.Option(help="The backend's tune option: off, quick or full.")] = "off",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("demo_report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Prune a model at several densities and time it under Inductor and under sparsec, in turns.

    Prints latencies, the speedup with its interval, what pruning did to the embeddings, and the explain table; writes
    report.json, speedup.png and index.html.
    """
    from sparsec.demo import Settings, report_folder, run_demo
    from sparsec.demo_report import print_report, write_report

    folder = report_folder(output)
    chosen: dict[str, Any] = {"model": model, "wide": wide, "options": {"tune": tune} if tune != "off" else {}}
    settings = Settings.quick(**chosen) if quick else Settings(**chosen)
    with progress("sparsec demo") as step:
        report = run_demo(settings, step)
    write_report(report, folder)
    if as_json:
        emit_json(report)
    else:
        print_report(report, console(), folder)
