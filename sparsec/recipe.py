"""Recipes: what a user asks of ``sparsify``, checked once, then frozen.

In: a method name, a dict of one step, a list of steps, ``{"version": 1, "steps": [...]}``, or a YAML, JSON or TOML
file of these. Out: ``Recipe``, whose every key has been checked and whose ``to_dict`` runs again to the same masks.

  {method: magnitude, sparsity: 0.5}                        one step
  {version: 1, ignore: [lm_head], steps: [{method: ...}]}   several, in order

The options of a method (the fields of its dataclass) are keys of its step, with their types and defaults. ``pattern:
N:M`` keeps N of M. Names that other tools use are read too: ``mask_structure``, ``num_calibration_samples``,
``max_seq_length``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny

from sparsec.cache import digest
from sparsec.errors import BadRecipe, did_you_mean, listed
from sparsec.llmcompressor import is_llmcompressor, translate
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.recipe_file import SUFFIXES, read, to_yaml
from sparsec.recipe_steps import Frozen, Layers, Piece, known_keys, step_class, validated

if TYPE_CHECKING:
    pass

_TOP = ("version", "seed", "made_with", "blocks", "propagate_error", "true_sequential", "allow_quantize_first")


class Calibration(Frozen):
    """The text that methods with ``needs`` are calibrated on."""

    dataset: str | None = Field(default=None, description="name of a dataset, or the path of a .txt or .jsonl file")
    split: str = Field(default="train", description="split of the dataset")
    samples: int = Field(default=128, ge=1, description="segments")
    seqlen: int = Field(default=2048, ge=1, description="tokens a segment")
    seed: int = Field(default=0, description="which segments are drawn")


class Recipe(Frozen):
    """Steps in order. ``made_with`` tells the versions that a resolved recipe was made with; nothing reads it."""

    version: Literal[1] = 1
    seed: int = Field(default=0, description="of everything random")
    calibration: Calibration = Calibration()
    blocks: str | None = Field(default=None, description="the model's list of layers; null: found by itself")
    propagate_error: bool = Field(
        default=True, description="calibrate a block on the outputs of the pruned ones before"
    )
    true_sequential: bool = Field(
        default=False, description="calibrate layers of a block in the order in which they run"
    )
    allow_quantize_first: bool = Field(default=False, description="take masks of weights that are quantised already")
    steps: tuple[SerializeAsAny[Piece], ...] = Field(min_length=1)
    made_with: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = Field(default=(), exclude=True)  # how an alias was read; not part of the recipe

    @classmethod
    def load(cls, said: object) -> Recipe:
        """Read whatever a user gave. Raises a RecipeError that says what to change."""
        if isinstance(said, Recipe):
            return said
        if isinstance(said, (str, os.PathLike)):
            said = _named(said)
        if isinstance(said, Sequence) and not isinstance(said, (str, bytes)):
            said = {"steps": list(said)}
        if not isinstance(said, Mapping):
            raise BadRecipe(detail=f"a recipe is a method name, a file, a dict or a list of steps, not {said!r}")
        return _from_dict(dict(said))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Recipe.load`` of it gives the same recipe."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return to_yaml(self.to_dict())

    @property
    def sha(self) -> str:
        """A hash of what it asks for, whoever wrote it and with which version."""
        return digest(self.model_copy(update={"made_with": {}}).model_dump_json())


def schema(method: str | None = None) -> dict[str, Any]:
    """JSON Schema of one method's step, or of whole recipes (any method, by ``method``). Raises UnknownMethod."""
    if method is not None:
        return step_class(method).model_json_schema()
    whole = Recipe.model_json_schema()
    steps = {name: schema(name) for name in METHODS}
    definitions = whole.setdefault("$defs", {})
    definitions.pop("Step", None)
    for name, step in steps.items():
        definitions.update(step.pop("$defs", {}))
        definitions[name] = step
    refs = [{"$ref": f"#/$defs/{name}"} for name in steps]
    whole["properties"]["steps"]["items"] = {"oneOf": refs, "discriminator": {"propertyName": "method"}}
    return whole


def _named(said: str | os.PathLike[str]) -> Any:
    path = Path(said)
    if isinstance(said, os.PathLike) or path.suffix.lower() in SUFFIXES or (os.sep in said and path.is_file()):
        return read(path)
    method_class(said)  # raises with the nearest name
    return {"method": said}


def _from_dict(said: dict[str, Any]) -> Recipe:
    """A recipe of one step is a recipe of several with one in it; keys of both kinds may be mixed there."""
    notes: list[str] = []
    if is_llmcompressor(said):
        ours: dict[str, Any] = {key: said.pop(key) for key in ("seed", "calibration") if key in said}  # flags
        said, read_as = translate(said)
        said, notes = with_flags(said, ours), [*notes, *read_as]
    if said.pop("preset", None) is not None:
        raise BadRecipe(detail=f"there are no presets; name a method instead ({listed(METHODS)})")
    calibration = _calibration(said)
    top: dict[str, Any] = {key: said.pop(key) for key in _TOP if key in said}
    steps, shared = [said], None
    if has_steps(said):
        steps, shared = said.pop("steps"), said.pop("ignore", None)
        known_keys(said, (), "a recipe with steps", (*_TOP, "calibration", "ignore", "steps"))
        if not isinstance(steps, (list, tuple)) or not steps:
            raise BadRecipe(detail="steps is a list with at least one step")
    top["steps"] = [_step(step, shared, notes, i) for i, step in enumerate(steps)]
    made: Recipe = validated(Recipe, {**top, "calibration": calibration, "notes": tuple(notes)}, "the recipe")
    return made


def with_flags(said: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """``said`` with ``flags`` in it; of calibration only the settings that the flag names are replaced."""
    new, file = flags.get("calibration"), said.get("calibration")
    both = {"calibration": {**file, **new}} if isinstance(new, Mapping) and isinstance(file, Mapping) else {}
    return {**said, **flags, **both}


def has_steps(said: Mapping[str, Any]) -> bool:
    """Whether a dict is a recipe of steps; beside ``method``, ``steps`` may be an option of that method: a number."""
    return "steps" in said and ("method" not in said or isinstance(said["steps"], (list, tuple)))


def _calibration(said: dict[str, Any]) -> Calibration:
    """Takes ``calibration`` and its aliases out of ``said``."""
    settings = said.pop("calibration", None) or {}
    if not isinstance(settings, Mapping):
        raise BadRecipe(detail="calibration is a dict of settings")
    settings = known_keys(settings, Calibration.model_fields, "calibration")
    for alias, key in (("num_calibration_samples", "samples"), ("max_seq_length", "seqlen")):
        if alias not in said:
            continue
        if key in settings:
            raise BadRecipe(detail=f"{alias} and calibration.{key} are the same; give one")
        settings[key] = said.pop(alias)
    made: Calibration = validated(Calibration, settings, "calibration")
    return made


def _step(said: object, shared_ignore: Any, notes: list[str], index: int) -> Piece:
    where = f"step {index + 1}"
    if isinstance(said, Piece):
        return said
    if isinstance(said, str):
        said = {"method": said}
    if not isinstance(said, Mapping):
        raise BadRecipe(detail=f"{where} is {said!r}, not a dict with a method")
    step = dict(said)
    _read_mask_structure(step, notes)
    if "method" not in step:
        typo = next((key for key in step if did_you_mean(str(key), ["method"])), None)
        hint = f" (it has {typo!r})" if typo else f"; known methods are: {listed(METHODS)}"
        raise BadRecipe(detail=f"{where} names no method{hint}")
    cls = step_class(step["method"])
    known_keys(step, cls.model_fields, f"method {step['method']}")
    if shared_ignore is not None and issubclass(cls, Layers):
        both = [*_as_list(shared_ignore), *_as_list(step.get("ignore") or ())]
        step["ignore"] = list(dict.fromkeys(both))
    made: Piece = validated(cls, step, where)
    made = made.filled()
    if isinstance(made, Layers):
        for entry in made.overrides:
            made.overridden(entry)  # wrong keys and values are found now, not at the layer
    return made


def _as_list(entries: Any) -> list[Any]:
    return [entries] if isinstance(entries, str) else list(entries)


def _read_mask_structure(said: dict[str, Any], notes: list[str]) -> None:
    """llm-compressor's name for the pattern; it counts the weights that go, we count those that stay."""
    if "mask_structure" not in said:
        return
    if "pattern" in said:
        raise BadRecipe(detail="mask_structure and pattern are the same; give one")
    structure = said.pop("mask_structure")
    if structure in ("0:0", "unstructured"):
        said["pattern"] = "unstructured"
        return
    read_as = MaskPattern.parse(structure)
    if read_as.kind == "nm" and read_as.params[0] * 2 != read_as.params[1]:
        n, m = read_as.params
        notes.append(
            f"mask_structure {n}:{m} prunes {n} of {m}, as in llm-compressor: it was read as pattern {m - n}:{m}"
        )
        read_as = MaskPattern("nm", (m - n, m))
    said["pattern"] = str(read_as)
