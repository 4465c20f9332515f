"""``sparsec export``: one ONNX file that any ONNX Runtime runs, and fast where our library is registered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.cli.common import emit_json, progress
from sparsec.errors import BadOptionValue

if TYPE_CHECKING:
    from sparsec.export_onnx import OnnxReport

EXAMPLE = "sparsec export tiny:llama@80 --onnx tiny.onnx"


def command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:llama.")
    ] = "",
    onnx: Annotated[Path | None, typer.Option("--onnx", "-o", help="The file to write.")] = None,
    from_onnx: Annotated[
        Path | None, typer.Option("--from-onnx", help="Rewrite this ONNX file, of any tool, instead of a model.")
    ] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Standard operators only.")] = False,
    compress: Annotated[
        str, typer.Option("--compress", help="Dense constants with zeros too: bitmap or sparse_initializer.")
    ] = "",
    external: Annotated[
        bool, typer.Option("--external-data", help="Weights in a file beside it, which runtimes map: loads fastest.")
    ] = False,
    min_speedup: Annotated[
        float, typer.Option("--min-speedup", help="Over dense, that an operator of ours must be expected to have.")
    ] = 1.05,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Of the inputs that are traced; any runs.", min=1)] = 2,
    tokens: Annotated[
        int, typer.Option("--tokens", "-p", help="Of the inputs that are traced; any number runs.", min=1)
    ] = 16,
    verify: Annotated[bool, typer.Option(help="Run the file and compare it with PyTorch.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Write a model as ONNX, with the layers that gain as operators of sparsec.

    Each operator has a body in standard ONNX, so the file runs in any ONNX Runtime, at the speed of a dense model;
    sparsec.onnx.session(path) runs our kernels. A causal model takes and gives its KV cache. What was written is run
    both ways and compared with PyTorch, or with the file it was made of.
    """
    if onnx is None:
        raise BadOptionValue(key="onnx", value="", expected="say what to write, as in --onnx model.onnx")
    if bool(model) == (from_onnx is not None):
        raise BadOptionValue(key="model", value=model, expected="name either a model or --from-onnx FILE")
    said = {"portable": portable, "compress": compress, "external": external, "min_speedup": min_speedup}
    with progress("sparsec export") as step:
        step(0, 1, f"writing {onnx}")
        report = (
            _rewritten(from_onnx, onnx, verify, said)
            if from_onnx
            else _exported(model, onnx, batch, tokens, verify, said)
        )
    emit_json(report.to_dict()) if as_json else print(report)


def _rewritten(source: Path, path: Path, verify: bool, said: dict[str, Any]) -> OnnxReport:
    from sparsec.export_onnx import rewrite_file

    return rewrite_file(source, path, verify, **said)


def _exported(spec: str, path: Path, batch: int, tokens: int, verify: bool, said: dict[str, Any]) -> OnnxReport:
    from sparsec.export_onnx import export_onnx
    from sparsec.models import load_model

    loaded = load_model(spec, "fp32")
    if loaded.kind == "causal":
        from sparsec.onnx_decoder import export_decoder

        return export_decoder(loaded.model, path, batch, tokens, verify=verify, **said)
    inputs = loaded.inputs(batch, tokens)
    return export_onnx(loaded.model, (), path, kwargs=inputs, verify=verify, **said)
