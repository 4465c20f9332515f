"""Gates of a saved model: what its facts say of them is put into a model before its tensors are read.

In: a model and the facts of a checkpoint (``sparsec.json``). Out: the same model, gated as it was when it was saved; as
it was before where the loading fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparsec.errors import BadModelFile
from sparsec.passes.gates.layers import described, restored


def gate_facts(model: nn.Module) -> dict[str, Any]:
    """What ``gating`` reads, as JSON types; {} for a model without gates."""
    rows = described(model)
    return {"gated": rows} if rows else {}


@contextmanager
def gating(model: nn.Module, facts: Mapping[str, Any], path: str) -> Iterator[None]:
    """Raises BadModelFile where the gates do not fit the model, or it has others already."""
    wanted = {(row["name"], row["place"]): row["gate"] for row in facts.get("gated", ())}
    there = {(row["name"], row["place"]): row["gate"] for row in described(model)}
    if not wanted or there == wanted:
        yield
        return
    if there:
        raise BadModelFile(path=path, why="its gates are not those that the model has; load it into a new model")
    last = [{"name": name, "place": place, "gate": gate} for (name, place), gate in wanted.items()]
    try:
        undo = restored(model, last)
    except ValueError as error:
        raise BadModelFile(path=path, why=f"its gates do not fit this model: {error}") from None
    try:
        yield
    except BaseException:
        undo()
        raise
