"""``sparsec calibrate``: count the zeros that a model's activations have on data of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.common import console, emit_json, progress

EXAMPLE = """\
sparsec calibrate tiny:opt --samples 4 --seqlen 64
sparsec calibrate MODEL --data text.txt
sparsec explain MODEL --tokens 1"""


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:opt.")],
    data: Annotated[
        str,
        typer.Option("--data", help="A .txt or .jsonl file, or a dataset's name; else Python's language reference."),
    ] = "",
    samples: Annotated[int, typer.Option("--samples", help="Segments of text, at most.", min=1)] = 16,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens of a segment.", min=1)] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Which segments are drawn.")] = 0,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default: the checkpoint's own.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Where rates are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Count how often the inputs of every linear layer are exactly zero, and keep the rates.

    Compilations and sparsec explain find them by the weight. What makes the zeros (ReLU, thresholds, top-k) must be in
    the model already; the model is run, not changed.
    """
    import warnings

    from sparsec.calibrate import calibrate
    from sparsec.cli.eval import text_of
    from sparsec.errors import SparsecWarning
    from sparsec.models import load_model

    with progress("sparsec calibrate", quiet=as_json) as step:
        step(0, 1, f"loading {model}")
        loaded = load_model(model, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsecWarning)  # the report has every note
            report = calibrate(
                loaded.model,
                data or [text_of(None)[0]],
                samples=samples,
                seqlen=seqlen,
                seed=seed,
                tokenizer=loaded.tokenizer,
                cache_dir=str(cache_dir) if cache_dir else "",
                on_progress=step,
            )
    if as_json:
        emit_json(report.to_dict())
        return
    console().print(str(report), markup=False, soft_wrap=True)
