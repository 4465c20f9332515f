"""What ``sparsify`` did: a record a layer, notes, the resolved recipe. ``str()`` is a table, ``to_dict()`` is JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsec.gated_report import GatedLayer, gate_lines
from sparsec.passes.masks.structure.contract import Structured
from sparsec.recipe import Recipe
from sparsec.report_fold import merge_names, template

_CLOSE = 0.02  # layers whose share of zeros differs by more than this are not one row


@dataclass(frozen=True)
class PrunedLayer:
    """One weight [N, K] = ``shape`` after one step.

    ``asked`` is the recipe's sparsity for it, ``achieved`` the share of exact zeros it now has, both 0 to 1; with
    scope ``global`` a layer's own share is what the common threshold gives. ``error`` is ||W - W'|| / ||W||
    (Frobenius), W as it was before the step. ``output_error`` is ||X(W - W')|| / ||XW|| over a sample of the
    calibration inputs X, None where no data was seen. ``values``: of a step that changes values and no mask, what they
    became (``int4, group 64``); its ``asked`` is 0. ``inputs``: how the layer rounds what it reads (``int8``, or
    ``int8:0.05`` with a static scale). ``tied``: other modules with the same weight, pruned by the same
    write.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    method: str
    pattern: str
    scope: str
    asked: float
    achieved: float
    error: float
    output_error: float | None = None
    step: int = 1
    values: str = ""
    inputs: str = ""
    tied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON types; ``from_dict`` gives the same row back."""
        return asdict(self) | {"shape": list(self.shape), "tied": list(self.tied), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> PrunedLayer:
        n, k = said["shape"]
        return cls(**{**said, "shape": (n, k), "tied": tuple(said["tied"]), "notes": tuple(said["notes"])})


@dataclass(frozen=True)
class Report:
    """``recipe`` has every default filled in and runs again to the same masks. ``model_sha`` names the model before."""

    recipe: Recipe
    layers: tuple[PrunedLayer, ...]
    notes: tuple[str, ...]
    seconds: float
    model_sha: str
    structured: Structured | None = None  # heads, neurons and channels that were removed
    gates: tuple[GatedLayer, ...] = ()  # activations that become zero at run time

    @property
    def achieved(self) -> float:
        """Share of exact zeros over all layers, each counted once, as the last step left it."""
        if self.structured is not None:
            return self.structured.sparsity
        last = {layer.name: layer for layer in self.layers}.values()
        return sum(x.achieved * x.weights for x in last) / max(sum(x.weights for x in last), 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "recipe_sha": self.recipe.sha,
            "model_sha": self.model_sha,
            "achieved": self.achieved,
            "seconds": self.seconds,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
            **({"structured": self.structured.to_dict()} if self.structured else {}),
            **({"gates": [gate.to_dict() for gate in self.gates]} if self.gates else {}),
        }

    def __str__(self) -> str:
        if self.structured is not None:
            head = f"sparsify {self.recipe.steps[0].method}: {self.achieved:.1%} removed, {self.seconds:.1f} s"
            return "\n".join([head, "", *self.structured.lines(), *(f"note: {note}" for note in self.notes)])
        told = [*((row.name, row.notes) for row in self.layers), *((row.name, row.notes) for row in self.gates)]
        notes = [*self.notes, *layer_notes(told)]
        last = ["", *(f"note: {note}" for note in notes)] if notes else []
        return "\n".join([*self._lines(), *last])

    def _lines(self) -> list[str]:
        """All but the notes."""
        methods = " + ".join(step.method for step in self.recipe.steps)
        gated = gate_lines(self.gates) if self.gates else []
        if not self.layers:
            count = sum(bool(gate.form) for gate in self.gates)
            return [f"sparsify {methods}: {counted(count, 'gate')}, {self.seconds:.1f} s", "", *gated]
        count = len({layer.name for layer in self.layers})
        size = sum(layer.weights for layer in {layer.name: layer for layer in self.layers}.values())
        head = f"sparsify {methods}: {count} layers, {short_count(size)} weights, {self.achieved:.1%} zero"
        seen = any(layer.output_error is not None for layer in self.layers)
        steps = len({layer.step for layer in self.layers}) > 1
        rows = [_row(group, seen, steps) for group in _folded(self.layers)]
        columns = ("layer", "shape", *(["step"] if steps else []), "pattern", "asked", "zero", "error")
        made = table((*columns, *(["output"] if seen else [])), rows)
        return [f"{head}, {self.seconds:.1f} s", "", *made, *(["", *gated] if gated else [])]


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned columns, two blanks apart; the first is a name that is cut in the middle where it is very long."""
    rows = [(_short(row[0]), *row[1:]) for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def _short(name: str, most: int = 56) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 2]}...{name[-(most // 2 - 1) :]}"


def _folded(layers: Sequence[PrunedLayer]) -> list[list[PrunedLayer]]:
    """Layers whose names differ in numbers only and that came out alike, in one group; in order of first sight."""
    groups: list[list[PrunedLayer]] = []
    for layer in layers:
        home = next((group for group in groups if _alike(group[0], layer)), None)
        if home is None:
            groups.append([layer])
        else:
            home.append(layer)
    return groups


def _alike(a: PrunedLayer, b: PrunedLayer) -> bool:
    same = (template(a.name), a.shape, a.pattern, a.values, a.scope, a.asked, a.step, a.method)
    if same != (template(b.name), b.shape, b.pattern, b.values, b.scope, b.asked, b.step, b.method):
        return False
    return abs(a.achieved - b.achieved) <= _CLOSE


def _row(group: Sequence[PrunedLayer], seen: bool, steps: bool) -> tuple[str, ...]:
    first = group[0]
    outputs = [layer.output_error for layer in group if layer.output_error is not None]
    scope = "" if first.scope == "layer" or ":" in first.pattern else f", {first.scope}"
    return (
        merge_names([layer.name for layer in group]) or "(the model)",
        f"{first.shape[0]}x{first.shape[1]}",
        *([f"{first.step} {first.method}"] if steps else []),
        first.values or f"{first.pattern}{scope}",
        "-" if first.values else f"{first.asked:.1%}",
        _span([layer.achieved for layer in group], ".1%"),
        _span([layer.error for layer in group], ".3f"),
        *([_span(outputs, ".3f") if outputs else "-"] if seen else []),
    )


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low.removesuffix('%')}-{high}"


def layer_notes(layers: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Notes on layers (name, notes), each once with the layers that it is about."""
    same: dict[str, dict[str, None]] = {}
    for name, notes in layers:
        for note in notes:
            same.setdefault(note, {})[name] = None
    return [f"{_names(list(names))}: {note}" for note, names in same.items()]


def _names(names: list[str]) -> str:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(template(name), []).append(name)
    merged = [merge_names(group) for group in kinds.values()]
    return ", ".join(merged[:3]) + (f" and {len(merged) - 3} more kinds" if len(merged) > 3 else "")


def counted(count: int, word: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def short_count(weights: int) -> str:
    """``86.0 k``, ``6.74 B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if weights >= size:
            return f"{weights / size:.3g} {unit}"
    return str(weights)
