"""``sparsec tune``: measure the decisions of a model on this machine, show what was measured, move it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.cli.common import console, emit_json, going_on, progress
from sparsec.efforts import EFFORTS
from sparsec.errors import BadOptionValue, did_you_mean

if TYPE_CHECKING:
    from sparsec.options import Options
    from sparsec.tune_model import TuneSummary

EXAMPLE = """\
sparsec tune tiny:llama@80 --batch 1 --tokens 1,16 --budget 20
sparsec tune --show
sparsec tune --export tuned.json
sparsec tune --import tuned.json"""

Runs = list[tuple[tuple[int, int], "TuneSummary"]]


def command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:llama.")
    ] = "",
    effort: Annotated[str, typer.Option("--effort", help="quick or full: how many ways and rounds.")] = "quick",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Batch sizes, as 1,16.")] = "1",
    tokens: Annotated[str, typer.Option("--tokens", "-p", help="Tokens of each input, as 1,128.")] = "1,128",
    budget: Annotated[float, typer.Option("--budget", help="Seconds of measuring, at most.", min=0.0)] = 60.0,
    options: Annotated[str, typer.Option("--options", help='Of torch.compile, as JSON: \'{"formats": "nm"}\'.')] = "",
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default: the checkpoint's own.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where measurements are kept.")] = None,
    show: Annotated[bool, typer.Option("--show", help="List what was measured so far; takes no model.")] = False,
    export_to: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write what was measured on this machine, at last.")
    ] = None,
    import_from: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE", help="First add what a machine of the same fingerprint wrote."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Measure every distinct sparse layer of a model against dense, and keep the results.

    Compilations with options={"tune": "quick"} then decide by them. Measuring stops when the budget is used up and
    goes on where it stopped the next time. The rows of a layer are batch x tokens.
    """
    if show:
        _show(cache_dir, as_json)
        return
    if not (model or export_to or import_from):
        raise BadOptionValue(key="MODEL", value=model, expected="a model is needed (or --show, --export, --import)")
    batches, lengths = _numbers("batch", batch), _numbers("tokens", tokens)
    said = _options(options, effort, budget, cache_dir)
    folder = said.policy.cache_dir
    told: dict[str, Any] = {}
    if import_from:
        told["imported"] = [_import(path, folder, as_json) for path in import_from]
    if model:
        with _kept(folder), progress("sparsec tune") as step:
            found = _tune(model, dtype, [(b, t) for b in batches for t in lengths], said, step)
        told["runs"] = [{"batch": b, "tokens": t, **asdict(s)} for (b, t), s in found]
        _print_runs(found, as_json)
    if export_to:
        told["exported"] = _export(export_to, folder, as_json)
    if as_json:
        emit_json(told)


def _print_runs(found: Runs, quiet: bool) -> None:
    for (b, t), summary in found if not quiet else ():
        console().print(f"batch {b}, {t} tokens\n{summary}\n", markup=False, soft_wrap=True)


def _import(path: Path, folder: str, quiet: bool) -> dict[str, Any]:
    from sparsec.tune_files import import_file

    moved = import_file(path, folder)
    if not quiet:
        known = f"; {moved.left} were known here" if moved.left else ""
        print(f"imported {moved.records - moved.left} measurements from {moved.file}{known}")
    return asdict(moved)


def _export(path: Path, folder: str, quiet: bool) -> dict[str, Any]:
    from sparsec.tune_files import export_file

    moved = export_file(path, folder)
    if not quiet:
        left = f"; {moved.left} of other machines were left out" if moved.left else ""
        print(f"exported {moved.records} measurements of {', '.join(moved.fingerprints)} to {moved.file}{left}")
    return asdict(moved)


@contextmanager
def _kept(folder: str) -> Iterator[None]:
    """An interrupted tuning says where its measurements are."""
    from sparsec.cache import wanted_dir
    from sparsec.tune_db import NAME

    with going_on(wanted_dir(folder) / NAME):
        yield


def _numbers(key: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise BadOptionValue(key=key, value=text, expected="numbers of at least 1 are needed, as in 1,16")
    return list(dict.fromkeys(int(word) for word in words))


def _options(text: str, effort: str, budget: float, cache: Path | None) -> Options:
    import json

    from sparsec.options import Options

    try:
        said: Any = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise BadOptionValue(key="options", value=text, expected=f"it is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise BadOptionValue(key="options", value=text, expected='a JSON object is needed, as in {"formats": "nm"}')
    measuring = [name for name, row in EFFORTS.items() if row.candidates]
    if effort not in measuring:
        near = did_you_mean(effort, measuring)
        raise BadOptionValue(key="effort", value=effort, expected=f"it must be {' or '.join(measuring)}{near}")
    for key, flag in (("tune", "--effort"), ("tune_budget_s", "--budget")):
        if key in said:
            raise BadOptionValue(key="options", value=text, expected=f"{key} is said with {flag} here")
    chosen = {"cache_dir": str(cache)} if cache else {}
    return Options.parse({**said, "tune": effort, "tune_budget_s": budget, **chosen})


def _tune(spec: str, dtype: str | None, points: list[tuple[int, int]], options: Options, step: Any) -> Runs:
    """One summary for each batch and length; the budget is shared by all."""
    from dataclasses import replace
    from functools import partial

    import torch

    from sparsec.models import load_model
    from sparsec.tune_model import tune_with

    step(0, len(points), f"loading {spec}")
    loaded = load_model(spec, dtype)
    found = []
    left = options.policy.tune_budget_s
    for i, (batch, tokens) in enumerate(points):
        torch.compiler.reset()  # else the second size would be captured as a dynamic one
        now = replace(options, policy=replace(options.policy, tune_budget_s=left))
        tell = partial(_tell, step, i, len(points), f"batch {batch}, {tokens} tokens")
        summary = tune_with(loaded.model, (), loaded.inputs(batch, tokens), now, tell)
        left = max(0.0, left - summary.measuring_s)
        found.append(((batch, tokens), summary))
    return found


def _tell(step: Any, done: int, total: int, what: str, known: int) -> None:
    step(done, total, f"{what}: {known} measurements")


def _show(cache: Path | None, as_json: bool) -> None:
    from sparsec.tune_db import Database

    database = Database.of(str(cache) if cache else "")
    records = database.all()
    if as_json:
        emit_json([asdict(record) for record in records])
        return
    header = (
        f"{'format/loop':20} {'shape':>12} {'zero':>5} {'M':>5} {'threads':>7}  {'speedup':>7}  {'surely':13} weights"
    )
    lines = [header] if records else []
    for record in records:
        k = record.key
        name, shape, gain = f"{k.format}/{k.loop}", f"{k.n}x{k.k}", record.ratio
        lines.append(
            f"{name:20} {shape:>12} {100 - 2.5 * k.density:>4.0f}% {k.m:>5} {k.threads:>7}  {gain.value:>6.2f}x  "
            f"{gain.low:.2f} to {gain.high:.2f}  {'cold' if k.cold else 'hot'}{', busy machine' if record.busy else ''}"
        )
    lines.append(f"{len(records)} measurements in {database.path}")
    console().print("\n".join(lines), markup=False, soft_wrap=True)
