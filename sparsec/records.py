"""What a compilation leaves behind for people: layers, decisions, refusals, stage times.

The backend appends one ``CompileRecord`` per compiled graph to every open ``recording()``; weights that are first seen
later (regional compilation, updates) are appended as layers of the record of their graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsec.facts import Decision, Declined, Site, WeightFact


@dataclass(frozen=True)
class LayerRecord:
    """One weight at one site. ``name`` is the module path of the layer (``model.layers.0.mlp.up_proj``)."""

    name: str
    site: Site
    fact: WeightFact
    decision: Decision


@dataclass(frozen=True)
class StageRecord:
    """One stage of the pipeline: milliseconds, and how many nodes or layers it touched."""

    name: str
    ms: float
    changed: int


@dataclass
class CompileRecord:
    """Everything said about one graph. ``failure`` is set when sparsec fell back to the untouched graph."""

    layers: list[LayerRecord] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_open: list[list[CompileRecord]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[CompileRecord]]:
    """Collect the records of every graph that sparsec compiles or inspects inside the block."""
    records: list[CompileRecord] = []
    _open.append(records)
    try:
        yield records
    finally:
        _open.remove(records)


def publish(record: CompileRecord) -> None:
    """Hand a new record to every open ``recording()``."""
    for records in _open:
        records.append(record)
