"""``sparsec sparsify``: a model and a recipe in, an ordinary checkpoint with exact zeros out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsec.cli.common import console, emit_json, going_on

if TYPE_CHECKING:
    from sparsec.sparsify import Prepared
    from sparsec.sparsify_outcome import Wanted

EXAMPLE = """\
sparsec sparsify tiny:llama --method magnitude --sparsity 0.5 --pattern 2:4 -o pruned
sparsec sparsify tiny:llama --method magnitude --sparsity 0.7 --scope global --dry-run"""

_RECIPE_FLAGS = ("seed", "calibration")  # the other keys belong to a step


def command(
    model: Annotated[str, typer.Argument(help="A local Hugging Face folder, a hub id or file.py:factory.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Recipe file (YAML, JSON, TOML).")] = None,
    method: Annotated[str | None, typer.Option(help="See: sparsec methods.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights that go, 0 to 1.")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured, N:M (keep N of M), V:N:M or block:RxC.")] = None,
    scope: Annotated[str | None, typer.Option(help="Where weights compete: layer, global or row.")] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers to prune: class, name, glob or re:regex. Repeat, or use commas.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers to leave alone, spelled the same.")] = None,
    overrides: Annotated[
        str | None, typer.Option(help="Other settings for some layers, as YAML: '{\"*.down_proj\": {sparsity: 0.3}}'.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    calibration: Annotated[str | None, typer.Option(help="As YAML: '{samples: 128, seqlen: 2048}'.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Calibration text: .txt or .jsonl. Methods with data need it.")
    ] = None,
    max_memory: Annotated[
        float, typer.Option(help="GiB of calibration activations in memory; more goes to disk.")
    ] = 4.0,
    eval_text: Annotated[
        Path | None,
        typer.Option("--eval-text", help="Text to measure on; else what calibration did not see of --data."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=2, help="At most so many windows of it.")] = 64,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure accuracy.")] = False,
    no_explain: Annotated[bool, typer.Option("--no-explain", help="Do not predict speed.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Also time each layer and the whole model.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A method's own option. Repeat.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    save_recipe: Annotated[
        Path | None, typer.Option("--save-recipe", help="Also write the recipe with every default filled in.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Prune a model and save an ordinary checkpoint with exact zeros.

    Every key of a recipe is a flag here, and flags win over the file. What is written loads with from_pretrained and
    without sparsec; recipe.yaml beside it gives the same masks again, and sparsec_report.html says what it cost
    (perplexity, or similarity of embeddings) and what it gains on this machine.
    """
    if max_memory < 0:
        raise typer.BadParameter("it is a number of GiB, 0 or more.", param_hint="--max-memory")
    if output is None and not dry_run:
        raise typer.BadParameter("name the folder to write, or pass --dry-run.", param_hint="--output")
    flags = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "scope": scope,
        "targets": _entries(targets),
        "ignore": _entries(ignore),
        "overrides": _yaml("--overrides", overrides),
        "seed": seed,
        "calibration": _with_data(_yaml("--calibration", calibration), data),
        **_settings(set_),
    }
    said = merged(recipe, {key: value for key, value in flags.items() if value is not None})
    from sparsec.recipe import Recipe

    asked = Recipe.load(said)  # before the model is loaded: the recipe's own mistakes show at once
    if dry_run:
        _dry_run(model, asked, output, save_recipe, overwrite, as_json, int(max_memory * 2**30))
    elif output is not None:
        from sparsec.sparsify_outcome import Wanted

        wanted = Wanted(not no_eval, eval_text, eval_windows, not no_explain, measure, str(output))
        _run(model, asked, output, wanted, save_recipe, overwrite, as_json, int(max_memory * 2**30))


def _with_data(calibration: Any, data: Path | None) -> Any:
    """The calibration settings with the file in them; what is no mapping is left for the recipe to refuse."""
    if data is None or not isinstance(calibration, Mapping | None):
        return calibration
    return {**(calibration or {}), "dataset": str(data)}


def _run(
    model: str,
    asked: Any,
    output: Path,
    wanted: Wanted,
    save_recipe: Path | None,
    overwrite: bool,
    as_json: bool,
    max_memory: int,
) -> None:
    """Prune and save. What a killed run had finished lies beside ``output`` and is taken from there."""
    import shutil

    from sparsec.io import save
    from sparsec.models import load_model
    from sparsec.sparsify import prepare
    from sparsec.sparsify_outcome import run

    loaded = load_model(model)
    prepared = prepare(loaded.model, asked)
    _check_places(prepared, output, overwrite)
    _write_recipe(prepared, save_recipe, overwrite)
    journal = _journal(output) if prepared.needs_data else None
    with going_on(_journal(output)):
        outcome = run(loaded, prepared, wanted, resume=journal, max_memory=max_memory, keep_journal=True)
    save(loaded.model, output, outcome.report, loaded.tokenizer, overwrite=overwrite, files=outcome.files())
    if journal:
        shutil.rmtree(journal, ignore_errors=True)
    if as_json:
        emit_json({**outcome.to_dict(), "output": str(output)})
        return
    out = console()
    out.print(str(outcome), markup=False, soft_wrap=True)
    page = "" if output.suffix == ".safetensors" else " (sparsec_report.html is this as a page)"
    out.print(f"\nsaved: {output}{page}\nnext:  sparsec explain {output}", markup=False, soft_wrap=True)


def _journal(output: Path) -> Path:
    """Where a run that writes ``output`` keeps what it has finished."""
    return Path(f"{os.path.abspath(output)}.journal")


def _check_places(prepared: Prepared, output: Path, overwrite: bool) -> None:
    """Raise OutputExists or OtherRun where the folder, or what a killed run left beside it, belongs to another run."""
    from sparsec.io import check_output
    from sparsec.journal import check_journal

    check_output(output, prepared.recipe.sha, prepared.model_sha, overwrite)
    about = {"model": prepared.model_sha, "recipe": prepared.recipe.sha}
    check_journal(_journal(output), about if prepared.needs_data else {**about, "data": ""})


def _dry_run(
    model: str,
    asked: Any,
    output: Path | None,
    save_recipe: Path | None,
    overwrite: bool,
    as_json: bool,
    max_memory: int,
) -> None:
    from sparsec.forecast import forecast, forecast_table
    from sparsec.models import load_model
    from sparsec.sparsify import calibrated_for, prepare

    loaded = load_model(model)
    prepared = prepare(loaded.model, asked)
    if output is not None:
        _check_places(prepared, output, overwrite)
    tokens, source = None, asked.calibration.dataset
    if prepared.needs_data and source and (Path(source).suffix or Path(source).exists()):  # a dataset is not fetched
        tokens = calibrated_for(prepared, None, loaded.tokenizer).tokens
    _write_recipe(prepared, save_recipe, overwrite)
    told = forecast(prepared, tokens, max_memory)
    if as_json:
        emit_json(told)
        return
    console().print("\n".join(forecast_table(told)), markup=False, soft_wrap=True)


def _write_recipe(prepared: Prepared, path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    from sparsec.cache import write_atomic
    from sparsec.errors import OutputExists

    if path.exists() and not overwrite:
        raise OutputExists(path=str(path), what="something else")
    write_atomic(Path(os.path.abspath(path)), prepared.recipe.to_yaml().encode())


def merged(recipe: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What the file says, with the flags in their places. Raises BadRecipe where a flag could mean several steps."""
    from sparsec.errors import BadRecipe
    from sparsec.llmcompressor import is_llmcompressor
    from sparsec.recipe import has_steps, with_flags
    from sparsec.recipe_file import read

    said = {} if recipe is None else read(recipe)
    if isinstance(said, str):
        said = {"method": said}
    if isinstance(said, list):
        said = {"steps": said}
    if not isinstance(said, dict):
        raise BadRecipe(detail=f"{str(recipe)!r} holds {said!r}, not a recipe")
    of_step = {key: value for key, value in flags.items() if key not in _RECIPE_FLAGS}
    said = with_flags(said, {key: value for key, value in flags.items() if key in _RECIPE_FLAGS})
    theirs, step = is_llmcompressor(said), said
    if of_step and (theirs or has_steps(said)):
        steps = None if theirs else said["steps"]
        if not isinstance(steps, list) or len(steps) != 1:
            flag = next(iter(of_step))
            raise BadRecipe(detail=f"--{flag} could mean any step of {str(recipe)!r}; change the file instead")
        step = said["steps"][0] = {"method": steps[0]} if isinstance(steps[0], str) else dict(steps[0])
    step.update(of_step)
    if "pattern" in flags:
        step.pop("mask_structure", None)
        if "sparsity" not in flags and ":" in flags["pattern"]:
            step.pop("sparsity", None)  # the file's was for the file's pattern
    if not theirs and "steps" not in said and "method" not in said:
        raise BadRecipe(detail="no method was named; pass --method magnitude, or --recipe FILE")
    return said


def _entries(values: list[str] | None) -> list[str] | None:
    """Repeated flags and comma lists; a regex keeps its commas."""
    if not values:
        return None
    return [part for value in values for part in ([value] if value.startswith("re:") else value.split(","))]


def _yaml(flag: str, text: str | None) -> Any:
    from sparsec.recipe_file import parse_yaml

    return None if text is None else parse_yaml(text, flag)


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    settings = {}
    for pair in pairs or ():
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE.", param_hint="--set")
        settings[key.replace("-", "_")] = _yaml("--set", value)
    return settings
