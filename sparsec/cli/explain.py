"""``sparsec explain``: why is my pruned model not faster? See ``sparsec.explain`` for what the report holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.cli.common import emit_json, progress
from sparsec.errors import BadOptionValue

if TYPE_CHECKING:
    from sparsec.explain import Explanation, Progress
    from sparsec.options import Options

EXAMPLE = "sparsec explain tiny:llama@80 --batch 1,16 --html report.html"


def command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub id, file.py:factory, minilm, tiny:llama, packed file.")
    ],
    batch: Annotated[str, typer.Option("--batch", "-b", help="Batch sizes, as 1,16,512.")] = "1",
    tokens: Annotated[int, typer.Option("--tokens", "-p", help="Tokens of each input; 1 is a decode step.")] = 128,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also time each distinct layer (a second each) and the whole model, compiled twice."
        ),
    ] = False,
    compare: Annotated[str, typer.Option("--compare", help="Another model: what differs from it.")] = "",
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    options: Annotated[str, typer.Option("--options", help='Of torch.compile, as JSON: \'{"formats": "nm"}\'.')] = "",
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; default: the checkpoint's own.")] = None,
) -> None:
    """Say per layer what sparsec would run, why, and what it gains.

    The rows of a layer are batch x tokens; the head of a causal model works on the last token alone, as in bench. Times
    are expected from this machine's measured rates; --measure adds times of this run: of each layer, and of the whole
    model by Inductor and by sparsec, as sparsec bench has them. The model is loaded, looked at and not changed.
    Of a packed model (sparsec pack) the table of its packs is printed, of an ONNX file what sparsec export --from-onnx
    would make of it.
    """
    if (packed := _packed_file(model)) is not None:
        from sparsec.packed_file import report_of

        _show(report_of(packed), as_json)
        return
    if model.endswith(".onnx"):
        from sparsec.export_onnx import explain_file

        _show(explain_file(model), as_json)
        return
    batches, said = parse_batches(batch), parse_options(options)
    if html is not None and not html.parent.is_dir():
        raise BadOptionValue(key="html", value=str(html), expected="the folder it is in does not exist; make it first")
    with progress("sparsec explain") as step:
        report = _report(model, batches, tokens, measure, said, dtype, step)
        other = _report(compare, batches, tokens, measure, said, dtype, step) if compare else None
    if html is not None:
        report.to_html(html, compare=other)
    if as_json:
        emit_json(report.to_dict(other))
        return
    report.show(compare=other)
    if html is not None:
        print(f"page: {html}")


def _packed_file(spec: str) -> Path | None:
    """The file of a packed model that ``spec`` names, itself or its folder."""
    path = Path(spec)
    if path.suffix == ".safetensors" and path.is_file():
        return path
    inside = path / "packed.safetensors"
    return inside if inside.is_file() else None


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        emit_json(report.to_dict())
    else:
        print(report)


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,16,512`` -> (1, 16, 512). Raises BadOptionValue."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise BadOptionValue(key="batch", value=text, expected="numbers of at least 1 are needed, as in 1,16,512")
    return tuple(dict.fromkeys(int(word) for word in words))


def parse_options(text: str) -> Options:
    """The JSON of ``--options``, checked. Raises OptionError."""
    import json

    from sparsec.options import Options

    try:
        said: Any = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise BadOptionValue(key="options", value=text, expected=f"it is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise BadOptionValue(key="options", value=text, expected='a JSON object is needed, as in {"formats": "nm"}')
    return Options.parse(said)


def _report(
    spec: str, batches: tuple[int, ...], tokens: int, measure: bool, options: Options, dtype: str | None, step: Progress
) -> Explanation:
    import torch

    from sparsec.explain import explain_with
    from sparsec.models import load_model

    if tokens < 1:
        raise BadOptionValue(key="tokens", value=tokens, expected="a number of at least 1 is needed")
    step(0, 1, f"loading {spec}")
    loaded = load_model(spec, dtype)
    with torch.no_grad():
        return explain_with(
            loaded.model,
            (),
            loaded.prompt(batches[0], tokens),
            options,
            measure=measure,
            batches=batches,
            name=loaded.name,
            spec=spec,
            tokens=tokens,
            on_progress=step,
        )
