"""What a search may try: methods, patterns, sparsities, allocators and repairs; parameters in, recipes out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsec.errors import BadOptionValue, RecipeError, UnknownMethod, did_you_mean, listed

if TYPE_CHECKING:
    from torch import nn

    from sparsec.recipe import Calibration

METHODS = ("sparsegpt", "ria", "wanda", "magnitude")
PATTERNS = ("unstructured", "8:16", "4:8", "2:4")
ALLOCATORS = ("none", "owl", "time")
REPAIRS = ("none", "reconstruct", "variance")
_UPDATES = ("sparsegpt",)  # these have chosen the values of what stays already
_STEP = 0.05  # of sparsities: finer differences are lost in the noise of any affordable evaluation
_START = 0.5  # tried first, with the first method of the space; then the search halves what is left, see ``between``


@dataclass(frozen=True)
class Space:
    """Sparsities go from ``lowest`` to ``highest`` in steps of 0.05; N:M fixes its own. ``rows`` and ``target``: whose
    time the allocator ``time`` counts. ``ignore``: layers that stay as they are; None: the output head."""

    methods: tuple[str, ...] = METHODS
    patterns: tuple[str, ...] = PATTERNS
    allocators: tuple[str, ...] = ALLOCATORS
    repairs: tuple[str, ...] = REPAIRS
    lowest: float = 0.1
    highest: float = 0.9
    ignore: tuple[str, ...] | None = None
    rows: int = 1
    target: str = "auto"

    def __post_init__(self) -> None:
        """Raises BadOptionValue, UnknownMethod or BadPattern."""
        from sparsec.passes.masks.pattern import MaskPattern

        for name in self.methods:
            if name not in METHODS:
                raise UnknownMethod(name=name, nearest=did_you_mean(name, METHODS), known=listed(METHODS))
        for key, known in (("allocators", ALLOCATORS), ("repairs", REPAIRS)):
            for name in getattr(self, key):
                if name not in known:
                    raise BadOptionValue(key=key, value=name, expected=f"the search knows {listed(known)}")
        for pattern in self.patterns:
            parsed = MaskPattern.parse(pattern)
            if pattern != "unstructured" and parsed.kind != "nm":
                raise BadOptionValue(key="patterns", value=pattern, expected="the search tries unstructured and N:M")
        if not (self.methods and self.patterns and self.allocators and self.repairs):
            raise BadOptionValue(key="methods", value="", expected="every part of the space needs at least one entry")
        if not 0.0 < self.lowest <= self.highest < 1.0:
            raise BadOptionValue(
                key="sparsity", value=f"{self.lowest}-{self.highest}", expected="a range lies between 0 and 1"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The parameters of one recipe, drawn by an optuna trial."""
        method = trial.suggest_categorical("method", self.methods)
        pattern = trial.suggest_categorical("pattern", self.patterns)
        params = {"method": method, "pattern": pattern, "sparsity": None, "allocator": "none", "repair": "none"}
        if pattern == "unstructured":
            share = trial.suggest_float("sparsity", self.lowest, self.highest, step=_STEP)
            params["sparsity"] = round(share, 6)
            params["allocator"] = trial.suggest_categorical("allocator", self.allocators)
        if method not in _UPDATES:
            params["repair"] = trial.suggest_categorical("repair", self.repairs)
        return params

    def starts(self) -> list[dict[str, Any]]:
        """Recipes worth trying before anything is known, as optuna takes them; parameters left out are drawn."""
        plain = {"method": self.methods[0], "allocator": self.allocators[0], "repair": self.repairs[0]}
        found: list[dict[str, Any]] = [{**plain, "pattern": p} for p in self.patterns if p != "unstructured"][-1:]
        if "unstructured" in self.patterns:
            share = min(self.shares, key=lambda x: abs(x - _START))
            found[:0] = [{**plain, "pattern": "unstructured", "sparsity": share}]
        return found

    def between(self, kept: float | None, missed: float | None) -> float | None:
        """The sparsity halfway between the highest that ``kept`` the budget and the lowest that ``missed`` it (None:
        not seen yet), so that few trials find where the budget lies; None where there is no other between them."""
        inside = [x for x in self.shares if (kept is None or x > kept) and (missed is None or x < missed)]
        return inside[(len(inside) - 1) // 2] if inside else None

    @property
    def shares(self) -> list[float]:
        """The unstructured sparsities, as ``suggest`` gives them."""
        steps = int((self.highest - self.lowest) / _STEP + 1e-9)
        return [round(self.lowest + i * _STEP, 6) for i in range(steps + 1)]

    def all(self) -> Iterator[dict[str, Any]]:
        """The parameters of every recipe, once each."""
        for method, pattern in itertools.product(self.methods, self.patterns):
            free = pattern == "unstructured"
            shares, allocators = (self.shares, self.allocators) if free else ((None,), ("none",))
            repairs = ("none",) if method in _UPDATES else self.repairs
            for share, allocator, repair in itertools.product(shares, allocators, repairs):
                yield {
                    "method": method,
                    "pattern": pattern,
                    "sparsity": share,
                    "allocator": allocator,
                    "repair": repair,
                }

    def recipe(self, params: Mapping[str, Any], calibration: Calibration, seed: int) -> dict[str, Any]:
        """What ``sparsify`` takes."""
        step = {"method": params["method"], "pattern": params["pattern"]}
        if self.ignore is not None:
            step["ignore"] = list(self.ignore)
        steps: list[dict[str, Any]] = [step]
        if params["allocator"] != "none":
            spread = {"method": params["allocator"], "sparsity": params["sparsity"]}
            if params["allocator"] == "time":
                spread |= {"target": self.target, "rows": self.rows}
            steps.insert(0, spread)
        elif params["sparsity"] is not None:
            step["sparsity"] = params["sparsity"]
        if params["repair"] != "none":
            steps.append({"method": params["repair"]})
        return {"version": 1, "seed": seed, "calibration": calibration.model_dump(mode="json"), "steps": steps}

    def fitted(self, model: nn.Module) -> tuple[Space, list[str]]:
        """Without what ``sparsify`` would refuse on this model at once, and why. Raises where nothing is left."""
        from sparsec.sparsify import prepare

        notes: list[str] = []
        refused: RecipeError | None = None
        kept: dict[str, list[str]] = {"methods": [], "patterns": []}
        for key, other in (("methods", "unstructured"), ("patterns", "magnitude")):
            for name in getattr(self, key):
                method, pattern = (name, other) if key == "methods" else (other, name)
                step = {
                    "method": method,
                    "pattern": pattern,
                    **({} if self.ignore is None else {"ignore": self.ignore}),
                }
                try:
                    prepare(model, step)
                    kept[key].append(name)
                except RecipeError as error:
                    refused = error
                    notes.append(f"{name} is not tried: {error}")
            if not kept[key]:
                assert refused is not None
                raise refused
        return replace(self, methods=tuple(kept["methods"]), patterns=tuple(kept["patterns"])), notes


def key_of(params: Mapping[str, Any]) -> str:
    """One text for one recipe."""
    return json.dumps(dict(params), sort_keys=True)


def entries(said: Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """What a repeated flag with commas in it lists, in order, once each."""
    if not said:
        return default
    found = dict.fromkeys(word.strip() for text in said for word in text.split(",") if word.strip())
    return tuple(found)
