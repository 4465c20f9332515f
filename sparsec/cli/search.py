"""``sparsec search``: a model and an accuracy budget in, the fastest recipe and the Pareto front out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.common import console, emit_json, going_on

EXAMPLE = """\
sparsec search tiny:llama --budget "ppl<=1.02x" --trials 3 --methods magnitude,wanda --target reference -o found
sparsec search MODEL --data text.txt --budget "ppl<=1.02x" --target cpu --trials 40 --minutes 30 -o found"""
TEXT = (
    "text.txt"  # in the output folder: what calibration read where no --data was given, so that the recipe runs again
)


def command(
    model: Annotated[str, typer.Argument(help="A local Hugging Face folder, a hub id, minilm or file.py:factory.")],
    budget: Annotated[
        str, typer.Option(help="ppl<=1.02x (times the dense model's), ppl<=12.9 or, of encoders, cos>=0.95.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="Calibration text: .txt or .jsonl; else Python's language reference.")
    ] = None,
    eval_text: Annotated[
        Path | None,
        typer.Option("--eval-text", help="Text to measure on; else what calibration did not see of --data."),
    ] = None,
    target: Annotated[str, typer.Option(help="Whose time counts. See: sparsec targets.")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="Rows of x in each layer: 1 is one token of one user.")] = 1,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="At most so many recipes.")] = 20,
    minutes: Annotated[float | None, typer.Option(help="No trial begins later.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Of sparsegpt, ria, wanda, magnitude. Repeat, or use commas.")
    ] = None,
    patterns: Annotated[list[str] | None, typer.Option(help="unstructured and any N:M (keep N of M).")] = None,
    allocators: Annotated[list[str] | None, typer.Option(help="Of none, owl, time.")] = None,
    repairs: Annotated[list[str] | None, typer.Option(help="Of none, reconstruct, variance.")] = None,
    sparsity: Annotated[str, typer.Option(help="Range of unstructured sparsities.")] = "0.1-0.9",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave alone: class, name, glob, re:regex.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Segments of calibration text.")] = 64,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens a segment.")] = 512,
    windows: Annotated[
        int, typer.Option(min=4, help="Windows to measure on: half to choose by, half to check the choice.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; else what the checkpoint has.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, and to go on with.")] = Path(
        "search"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Search for the fastest recipe under an accuracy budget.

    Each trial prunes the model in memory, measures it on held-out text, and asks the plan what its linear layers take
    on the target. The folder gets trials.jsonl as trials end (run the same command again to go on), then search.json,
    pareto.png, and recipe.yaml, which sparsec sparsify --recipe runs. Needs pip install 'sparsec[search]'.
    """
    from sparsec.search import need_optuna, search
    from sparsec.search_front import Budget
    from sparsec.search_space import ALLOCATORS, METHODS, PATTERNS, REPAIRS, Space, entries
    from sparsec.search_store import FILE

    wanted = Budget.parse(budget)  # before the model is loaded: what is wrong with the words shows at once
    lowest, highest = _range(sparsity)
    space = Space(
        entries(methods, METHODS),
        entries(patterns, PATTERNS),
        entries(allocators, ALLOCATORS),
        entries(repairs, REPAIRS),
        lowest,
        highest,
        entries(ignore, ()) if ignore else None,
        rows,
        target,
    )
    need_optuna()
    from sparsec.models import load_model

    loaded = load_model(model, dtype)
    with going_on(output / FILE):
        found = search(
            loaded,
            data if data is not None else _own_text(output),
            wanted,
            space=space,
            trials=trials,
            minutes=minutes,
            seed=seed,
            samples=samples,
            seqlen=seqlen,
            eval_text=eval_text,
            windows=windows,
            output=output,
        )
    files = found.save(output)
    if as_json:
        emit_json({**found.to_dict(), "output": str(output)})
        return
    out = console()
    out.print(str(found), markup=False, emoji=False, soft_wrap=True)
    out.print(f"\nsaved: {', '.join(str(file) for file in files)}", markup=False, emoji=False, soft_wrap=True)
    if found.recipe is not None:
        then = f"next:  sparsec sparsify {model} --recipe {output / 'recipe.yaml'} -o PRUNED"
        out.print(then, markup=False, emoji=False, soft_wrap=True)


def _own_text(output: Path) -> Path:
    """Python's language reference as a file, so that the recipe can name it."""
    from sparsec.cache import write_atomic
    from sparsec.cli.eval import text_of

    path = output / TEXT
    write_atomic(path, text_of(None)[0].encode())
    return path


def _range(said: str) -> tuple[float, float]:
    low, dash, high = said.partition("-")
    try:
        return float(low), float(high if dash else low)
    except ValueError:
        raise typer.BadParameter("it is a range such as 0.1-0.9, or one number.", param_hint="--sparsity") from None
