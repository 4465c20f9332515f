"""``sparsec bench``: llama-bench's flags and formats, with the dense row of the same run beside the sparse one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.cli.common import emit_json, progress
from sparsec.errors import BadOptionValue

if TYPE_CHECKING:
    from sparsec.options import Options
    from sparsec.tune_record import Key, Record

EXAMPLE = """\
sparsec bench tiny:llama@80 -p 16 -n 4 -r 3
sparsec bench minilm -p 128 -b 1,32 -t 1,2 -o json
sparsec bench tiny:llama@80 --calibration -p 16"""


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="A local Hugging Face folder, file.py:factory, hub id, minilm or tiny:llama@80."),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Option("--model", "-m", metavar="MODEL", help="More models; may be repeated.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--n-prompt", "-p", metavar="N,...", help="Tokens of a prompt or of an encoder's input; 0 skips."),
    ] = None,
    gen: Annotated[
        list[str] | None,
        typer.Option("--n-gen", "-n", metavar="N,...", help="Tokens to generate one by one (128); 0 skips."),
    ] = None,
    batch: Annotated[list[str] | None, typer.Option("--batch", "-b", metavar="N,...", help="Batch sizes (1).")] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option("--threads", "-t", metavar="N,...", help="Thread counts, each in a fresh process (torch's own)."),
    ] = None,
    rounds: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Rounds; engines take turns in each.")] = 5,
    output: Annotated[str, typer.Option("--output", "-o", help="md, json, jsonl, csv or sql, on stdout.")] = "md",
    output_err: Annotated[
        str | None, typer.Option("--output-err", "-oe", help="A second format, on stderr; no progress is shown then.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier run's -o json; adds a Speedup column against it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; else what the checkpoint has.")] = None,
    warmup: Annotated[bool, typer.Option(help="Run each engine once more before timing.")] = True,
    formats: Annotated[str | None, typer.Option(help="Formats sparsec may choose, e.g. bitmap,nm:2:4.")] = None,
    tune: Annotated[str | None, typer.Option(help="off, quick or full.")] = None,
    target: Annotated[str | None, typer.Option(help="A target, e.g. cpu:avx2; see: sparsec targets.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="A sparse layer must promise this much (1.05).")] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="How far the cost model is from the clock; without a model, so far.")
    ] = False,
) -> None:
    """Time a model: Inductor on the dense weights and sparsec, in turns, in one run.

    Causal models: pp (a prompt at once) and tg (tokens one by one, static cache). Others: one forward. Lists are
    written 1,4 or 1-8 or 1-16*2. Every row says the path taken: how many layers ran in which format.
    """
    from sparsec.bench import BenchRequest, bench, parse_numbers
    from sparsec.bench_output import FORMATS, read_records, render
    from sparsec.options import Options

    named = {"formats": formats.split(",") if formats else None, "tune": tune, "target": target}
    options = {key: value for key, value in {**named, "min_speedup": min_speedup}.items() if value is not None}
    checked = Options.parse(options)
    models = tuple(([model] if model else []) + [name for said in more or [] for name in said.split(",")])
    if calibration:
        lengths = parse_numbers("-p", prompt or ["1,128"])
        _calibration(models, dtype, parse_numbers("-b", batch or ["1"]), lengths, checked, as_json or output == "json")
        return
    if not models:
        raise BadOptionValue(key="MODEL", value="", expected="a model is needed, as in: sparsec bench tiny:llama@80")
    output = "json" if as_json else output
    for key, said in (("-o", output), ("-oe", output_err)):
        if said is not None and said not in FORMATS:
            raise BadOptionValue(key=key, value=said, expected=f"it must be one of {', '.join(FORMATS)}")
    before = read_records(compare) if compare else None
    request = BenchRequest(
        models=models,
        prompts=parse_numbers("-p", prompt, least=0) if prompt else None,
        gens=parse_numbers("-n", gen or ["128"], least=0),
        batches=parse_numbers("-b", batch or ["1"]),
        threads=parse_numbers("-t", threads) if threads else (0,),
        rounds=rounds,
        warmup=warmup,
        dtype=dtype,
        options=options,
    )
    records = []
    with progress("sparsec bench", quiet=output_err is not None) as step:
        for record in bench(request, step):
            records.append(record)
            if output == "jsonl":  # a line as soon as it is known
                print(render([record], "jsonl", before), flush=True)
    if output != "jsonl":
        print(render(records, output, before))
    if output_err:
        print(render(records, output_err, before), file=sys.stderr)


def _calibration(
    models: tuple[str, ...],
    dtype: str | None,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    options: Options,
    as_json: bool,
) -> None:
    """Predicted against measured: of the models, tuned now as far as they are not, else of all that tuning knows."""
    from dataclasses import asdict, replace

    from sparsec.errors import InputError
    from sparsec.model_error import errors_by_kernel, table
    from sparsec.tune_db import Database

    if options.policy.tune == "off":
        options = replace(options, policy=replace(options.policy, tune="quick"))
    database = Database.of(options.policy.cache_dir)
    if models:
        with progress("sparsec bench") as step:
            records = _tuned(models, dtype, [(b, t) for b in batches for t in lengths], options, step)
    else:
        from sparsec.tune_files import fingerprints

        here = fingerprints()
        records = [record for record in database.all() if record.key.hardware in here]
    rows = errors_by_kernel(records)
    if not rows:
        raise InputError(
            detail=f"{database.path} holds no measurement of this machine to compare with; give a model, as in: "
            "sparsec bench tiny:llama@80 --calibration"
        )
    if as_json:
        emit_json({"database": str(database.path), "kernels": [asdict(row) for row in rows]})
        return
    busy = sum(record.busy for record in records)
    print("predicted by the cost model against measured; errors are predicted / measured - 1, medians of their sizes")
    print(table(rows))
    loaded = f", {busy} of them on a busy machine" if busy else ""
    print(f"{len(records)} measurements{loaded}; kept in {database.path}")


def _tuned(
    models: tuple[str, ...], dtype: str | None, points: list[tuple[int, int]], options: Options, step: Any
) -> list[Record]:
    """Every record that the layers of the models have at the given (batch, tokens); one budget for all."""
    from dataclasses import replace

    import torch

    from sparsec.models import load_model
    from sparsec.tune_model import watched

    found: dict[Key, Record] = {}
    left = options.policy.tune_budget_s
    total = len(models) * len(points)
    for i, name in enumerate(models):
        loaded = load_model(name, dtype)
        for j, (batch, tokens) in enumerate(points):
            step(i * len(points) + j, total, f"{name}: batch {batch}, {tokens} tokens")
            torch.compiler.reset()
            now = replace(options, policy=replace(options.policy, tune_budget_s=left))
            summary, session = watched(loaded.model, (), loaded.inputs(batch, tokens), now)
            left = max(0.0, left - summary.measuring_s)
            found |= {record.key: record for record in (*session.reused, *session.measured)}
    return list(found.values())
