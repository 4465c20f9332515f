"""``sparsec methods``: what can be asked of ``sparsify``, as a table, or as a JSON Schema for editors."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from sparsec.cli.common import console, emit_json

EXAMPLE = """\
sparsec methods
sparsec methods magnitude --schema"""


# What a step may be, in the order in which steps stand in a recipe.
ROLES = {
    "reparam": "rewrites that change no output, before masks",
    "allocate": "allocators: how much goes from which layer; the step before a mask method",
    "mask": "mask methods: which weights go",
    "post": "repairs after a mask method",
    "quantize": "value methods: weights go to a grid; after masks",
    "gate": "gates: which activations become zero at run time; after masks and values",
    "structure": "removal of whole heads and neurons",
}


def command(
    name: Annotated[str | None, typer.Argument(help="One method: what it does and its options.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of its step, or of recipes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """The sparsification methods and what each needs."""
    from sparsec.passes.masks import METHODS, method_class

    if name is not None:
        method_class(name)  # an unknown name is one sentence
    if schema:
        from sparsec.recipe import schema as schema_of

        emit_json(schema_of(name))
        return
    told = [_about(method, method_class(method)) for method in ([name] if name else METHODS)]
    if as_json:
        emit_json(told if name is None else told[0])
        return
    out = console()
    text = _page(told[0]) if name else _table(told)
    out.print(text, markup=False, soft_wrap=True)


def _about(name: str, cls: type[Any]) -> dict[str, Any]:
    from sparsec.recipe import schema

    properties = schema(name)["properties"]
    doc = (cls.__doc__ or "").strip()
    return {
        "name": name,
        "line": doc.splitlines()[0].removesuffix("."),
        "about": "\n".join(line.strip() for line in doc.splitlines()),
        "needs": list(cls.needs),
        "role": cls.role,
        "scope": getattr(cls, "scope", ""),
        "cost": cls.cost,
        "source": cls.source,
        "options": {f.name: properties[f.name] for f in dataclasses.fields(cls)},
    }


def _needs(told: dict[str, Any]) -> str:
    return "data: " + ", ".join(told["needs"]) if told["needs"] else "no data"


def _table(told: list[dict[str, Any]]) -> str:
    from sparsec.sparsify_report import table

    footer = "use one: sparsec sparsify MODEL --method NAME --sparsity 0.5 -o OUT     its options: sparsec methods NAME"
    parts = []
    for role, title in ROLES.items():
        rows = [(x["name"], _needs(x), x["cost"], x["source"], x["line"]) for x in told if x["role"] == role]
        if rows:
            parts += [f"{title}:", *table(("method", "needs", "cost", "source", "what it does"), rows), ""]
    return "\n".join([*parts, footer])


def _page(told: dict[str, Any]) -> str:
    scope = f"   scope: {told['scope']}" if told["scope"] else ""
    facts = f"needs: {_needs(told)}   cost: {told['cost']}{scope}   source: {told['source']}"
    options = [
        f"  --set {key}={option.get('default')}   {option.get('description', '')}".rstrip()
        for key, option in told["options"].items()
    ]
    return "\n".join([told["name"], "", told["about"], "", facts, *(options or ["options: none of its own"])])
