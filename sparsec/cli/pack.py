"""``sparsec pack``: a pruned model as one file of packs. See ``sparsec.pack_`` and ``sparsec.save``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsec.cli.common import emit_json, progress

EXAMPLE = """\
sparsec pack tiny:llama@80 -o packed --min-speedup 0
sparsec explain packed"""


def command(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:llama.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or a .safetensors file.")],
    min_speedup: Annotated[
        float, typer.Option("--min-speedup", help="How much faster a pack must be; 0 packs whatever gets smaller.")
    ] = 1.05,
    formats: Annotated[str, typer.Option("--formats", help="Only these, as bitmap,nm:2:4.")] = "",
    target: Annotated[str, typer.Option("--target", help="auto, or a name of sparsec targets.")] = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default: the checkpoint's own.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another model there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Replace the sparse linear weights of a model by packs, and save them.

    The table says what each layer takes and from how many rows of x its dense weight would have been faster. The folder
    is a MODEL for every command of sparsec; from Python, sparsec.load(path, model) maps it and packs nothing again.
    Weights that would not get faster stay dense.
    """
    from sparsec.io import check_output, save
    from sparsec.models import load_model
    from sparsec.options import Options
    from sparsec.pack import pack_

    said: dict[str, Any] = {"min_speedup": min_speedup}
    if formats:
        said["formats"] = [name.strip() for name in formats.split(",")]
    Options.parse({**said, "target": target})
    check_output(output, "", "", overwrite)
    with progress("sparsec pack") as step:
        step(0, 1, f"loading {model}")
        loaded = load_model(model, dtype)
        report = pack_(loaded.model, target, options=said, on_progress=step)
        save(loaded.model, output, tokenizer=loaded.tokenizer, overwrite=overwrite)
    if as_json:
        emit_json(report.to_dict())
        return
    print(report)
    print(f"saved: {output}")
