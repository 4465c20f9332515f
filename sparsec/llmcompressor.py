"""Recipes of llm-compressor, read as ours. In: its dict (stages, groups, modifiers). Out: our dict, and notes.

  SparseGPTModifier, WandaPruningModifier          sparsegpt and wanda, with owl before them where it was asked for
  MagnitudePruningModifier                         magnitude at its final sparsity: sparsec does not train
  ConstantPruningModifier                          no step: it keeps zeros during training
  quantization modifiers, everything else          refused by name

The same layers are meant: its ``re:`` is ``re.match`` on the name of a module, or of its weight, and a target means all
that is inside; our ``re:`` must match the whole name of a layer. Its other entries are class names or full names.
Semantics as of llm-compressor 0.10 (``modifiers/pruning``, ``utils/pytorch/module.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsec.errors import UntranslatedRecipe, did_you_mean
from sparsec.passes.masks.pattern import MaskPattern

_SPARSE = {"SparseGPTModifier": "sparsegpt", "WandaPruningModifier": "wanda"}
_MAGNITUDE, _CONSTANT = "MagnitudePruningModifier", "ConstantPruningModifier"
_KNOWN = (*_SPARSE, _MAGNITUDE, _CONSTANT)
_QUANTIZE = re.compile(r"GPTQ|AWQ|Quant|SmoothQuant|SpinQuant|QuIP|AutoRound|IMatrix|LogarithmicEqual", re.IGNORECASE)
_CALIBRATION = {"dataset": "dataset", "num_calibration_samples": "samples", "max_seq_length": "seqlen"}
_ALL = ("__ALL__", "__ALL_PRUNABLE__")
_SCHEDULE = ("start", "end", "update")
_INTERNAL = ("index", "group")  # written by llm-compressor itself when it saves a recipe


def is_llmcompressor(said: Mapping[Any, Any]) -> bool:
    """Whether a dict is a recipe of llm-compressor: it has stages, groups of modifiers, or modifiers."""
    return any(str(key).endswith(("_stage", "modifiers", "Modifier")) for key in said)


def translate(said: Mapping[Any, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Our recipe, and what a user should know about how theirs was read. Raises UntranslatedRecipe, BadPattern."""
    notes: list[str] = []
    top: dict[str, Any] = {"version": 1}
    steps: list[dict[str, Any]] = []
    if calibration := {ours: said[theirs] for theirs, ours in _CALIBRATION.items() if said.get(theirs) is not None}:
        top["calibration"] = calibration
    for name, args in _modifiers(said, notes):
        reader = _Modifier(name, args, notes)
        if name in _SPARSE:
            steps += reader.sparse(top)
        elif name == _MAGNITUDE:
            steps += reader.magnitude()
        else:
            reader.constant()
        reader.nothing_left()
    if not steps:
        raise UntranslatedRecipe(name="the recipe", why=f"asks for nothing that prunes ({', '.join(notes) or 'empty'})")
    return {**top, "steps": steps}, tuple(dict.fromkeys(notes))


def _modifiers(said: Mapping[Any, Any], notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every modifier with its arguments, in order, whatever it is nested in."""
    for key, value in said.items():
        key = str(key)
        if key in _CALIBRATION or value is None or (key == "args" and not value):
            continue
        if key.endswith("Modifier"):
            yield _checked(key, value)
        elif key.endswith("modifiers"):
            for group in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                if not isinstance(group, Mapping):
                    raise UntranslatedRecipe(name=key, why="holds no modifiers by name")
                yield from (_checked(str(name), args) for name, args in group.items())
        elif key.endswith("_stage") and isinstance(value, Mapping):
            inside = dict(value)
            if inside.pop("run_type", "oneshot") == "train":
                notes.append(f"{key} trains the model between its masks, and sparsec does not train")
            yield from _modifiers(inside, notes)
        else:
            raise UntranslatedRecipe(name=key, why="is no stage, modifier, or calibration setting")


def _checked(name: str, args: Any) -> tuple[str, Mapping[str, Any]]:
    if name not in _KNOWN:
        if _QUANTIZE.search(name):
            why = "quantizes, and is not translated; take it out, and add the step rtn (bits, group) at the end instead"
        else:
            why = f"has no counterpart in sparsec{did_you_mean(name, _KNOWN)}"
        raise UntranslatedRecipe(name=name, why=why)
    if args is not None and not isinstance(args, Mapping):
        raise UntranslatedRecipe(name=name, why="has no settings by name")
    return name, args or {}


class _Modifier:
    """The settings of one modifier; what is read is taken out, and ``nothing_left`` refuses the rest."""

    def __init__(self, name: str, args: Mapping[str, Any], notes: list[str]) -> None:
        self.name, self.notes = name, notes
        self.args = {key: value for key, value in args.items() if value is not None and key not in _INTERNAL}

    def take(self, key: str, default: Any = None) -> Any:
        return self.args.pop(key, default)

    def refuse(self, key: str, why: str) -> UntranslatedRecipe:
        return UntranslatedRecipe(name=f"{key} of {self.name}", why=why)

    def note(self, text: str) -> None:
        self.notes.append(f"{self.name}: {text}")

    def nothing_left(self) -> None:
        times = [key for key in _SCHEDULE if self.take(key) is not None]
        if times and self.name != _CONSTANT:
            self.note(f"{', '.join(times)} are times of a training run, and sparsec prunes once")
        for key, value in self.args.items():
            raise self.refuse(key, f"(here {value!r}) has no counterpart in sparsec")

    def sparse(self, top: dict[str, Any]) -> list[dict[str, Any]]:
        """SparseGPT or Wanda, after OWL where the profile says so."""
        pattern = self.pattern()
        sparsity = self.sparsity(self.take("sparsity"), pattern)
        owl = self.owl(pattern, sparsity)
        step: dict[str, Any] = {"method": _SPARSE[self.name], "pattern": str(pattern)}
        if sparsity is not None and not owl:
            step["sparsity"] = sparsity
        step |= self.layers()
        if self.name == "SparseGPTModifier":
            step |= self.sparsegpt()
        self.order(top)
        return [*owl, step]

    def pattern(self) -> MaskPattern:
        """N:M counts the pruned ones there, those that stay here; 0:0 is unstructured."""
        structure = self.take("mask_structure", "0:0")
        if structure in ("0:0", "unstructured", 0):  # YAML 1.1 reads 0:0 as a number
            return MaskPattern()
        numbers = re.fullmatch(r"(\d+):(\d+)", structure) if isinstance(structure, str) else None
        if numbers is None:
            return MaskPattern.parse(structure)
        pruned, of = int(numbers[1]), int(numbers[2])
        if 2 * pruned != of:
            self.note(f"mask_structure {structure} prunes {pruned} of {of}, so the pattern is {of - pruned}:{of}")
        return MaskPattern.parse(f"{of - pruned}:{of}")

    def sparsity(self, said: Any, pattern: MaskPattern) -> float | None:
        if isinstance(said, (list, tuple, Mapping)):
            why = "is one for each layer; write the layers that differ as overrides in a recipe of sparsec"
            raise self.refuse("sparsity", why)
        if said is None and pattern.sparsity is None:
            raise self.refuse("sparsity", "is missing, and an unstructured mask needs it")
        if said is not None and (isinstance(said, bool) or not isinstance(said, (int, float))):
            raise self.refuse("sparsity", f"is {said!r}, not a number")
        if pattern.sparsity is None or said is None:
            return said
        if abs(said - pattern.sparsity) > 1e-6:
            self.note(f"sparsity {said:g} was without effect there: {pattern} means {pattern.sparsity:g}")
        return None

    def owl(self, pattern: MaskPattern, sparsity: float | None) -> list[dict[str, Any]]:
        profile, m, lam = self.take("sparsity_profile"), self.take("owl_m"), self.take("owl_lmbda")
        if profile is None and m is None and lam is None:
            return []
        if str(profile).lower() != "owl" or m is None or lam is None:
            raise self.refuse("sparsity_profile", "must be owl and come with owl_m and owl_lmbda, or none of the three")
        if pattern.sparsity is not None:
            self.note(f"OWL was without effect there and is left out: {pattern} gives every layer the same sparsity")
            return []
        return [{"method": "owl", "sparsity": sparsity, "lam": lam, "m": m, "flat": 1.0}]  # it spreads any ratios

    def sparsegpt(self) -> dict[str, Any]:
        if self.take("preserve_sparsity_mask", False):
            raise self.refuse("preserve_sparsity_mask", "has no counterpart in sparsec")
        if self.take("quantize", False):
            raise self.refuse(
                "quantize", "is not translated; take it out, and add the step rtn (bits, group) at the end"
            )
        if self.take("offload_hessians", False):
            self.note("offload_hessians changes no result; sparsec has the statistics of one block at a time anyway")
        damp = self.take("dampening_frac")
        if damp is None:
            damp = self.take("percdamp", 0.01)  # its older name
        return {"blocksize": self.take("block_size", 128), "damp": damp}

    def order(self, top: dict[str, Any]) -> None:
        """``sequential_targets``: what is calibrated at a time; its layers one by one is our ``true_sequential``."""
        if self.take("sequential_update", True) is False:
            self.note("sequential_update: false is no longer followed by llm-compressor, and not here")
        said = _listed(self.take("sequential_targets", ()))
        if said and all(entry in ("Linear", "Conv1D") for entry in said):
            top["true_sequential"] = True
        elif said:
            self.note(f"sequential_targets {', '.join(said)}: sparsec finds the model's blocks by itself")

    def magnitude(self) -> list[dict[str, Any]]:
        first, last = self.take("init_sparsity"), self.take("final_sparsity")
        scheduler, settings = self.take("update_scheduler", "cubic"), self.take("scheduler_args")
        self.take("leave_enabled")  # deprecated there, and about training
        structure = self.take("mask_structure", "unstructured")
        block = re.fullmatch(r"block_(\d+),\s*(\d+)", str(structure))
        if structure != "unstructured" and block is None:
            raise self.refuse("mask_structure", f"is {structure!r}; of these only unstructured and block_R,C are known")
        if last is None:
            raise self.refuse("final_sparsity", "is missing")
        sparsity = self.sparsity(last, MaskPattern())
        if first not in (None, last) or settings:
            self.note(
                f"it grows from {first} to {last} ({scheduler}) while training; here {last} is reached in one step"
            )
        step: dict[str, Any] = {"method": "magnitude", "sparsity": sparsity}
        step["pattern"] = "unstructured" if block is None else f"block:{block[1]}x{block[2]}"
        if self.take("apply_globally", False):
            step["scope"] = "global"
        return [step | self.layers(parameters=True)]

    def constant(self) -> None:
        self.take("targets")
        self.note("it keeps zeros while training, and sparsec does not train: zeros stay, and there is no step for it")

    def layers(self, parameters: bool = False) -> dict[str, Any]:
        """``targets`` and ``ignore`` as our matcher spells them; without ``targets`` every prunable layer."""
        said = _listed(self.take("targets", () if parameters else ("Linear",)))
        ignored = _listed(self.take("ignore", ()))
        if parameters and not said:
            raise self.refuse("targets", "is missing")
        found: dict[str, Any] = {"ignore": [self.ignored(entry) for entry in ignored]}
        targets = [self.target(entry) for entry in said]
        if not any(entry in _ALL or _matches("", entry) for entry in said):  # "" is the whole model
            found["targets"] = targets
        if any(_reaches_head(entry) for entry in said):
            if not ignored:
                self.note("without an ignore list the output head is pruned too, as there; ignore lm_head to keep it")
            elif not any(_matches("lm_head", entry) for entry in ignored):
                self.note("the output head stays dense here; to prune it as there, name it in targets")
        return found

    def target(self, entry: str) -> str:
        """Our spelling of a target: itself and all layers inside it."""
        if entry.startswith("re:"):
            flags, pattern = self.regex(entry, "targets")
            if "weight" in pattern:
                return f"re:{flags}{self.weight_of(pattern)}"
            if _open_ended(pattern):
                return f"re:{flags}{_into_weight(pattern[:-2])}.*"
            return f"re:{flags}(?:{_at_any_dot(pattern)}).*"
        if re.match(r"[A-Z]\w*$", entry):
            if entry.endswith(("Layer", "Block")):
                why = f"has {entry}, a class of blocks; name their layers instead, as in 're:.*layers.*'"
                raise self.refuse("targets", why)
            return entry
        name = entry.removesuffix(".weight")
        return name if name == "lm_head" else rf"re:{re.escape(name)}(\..*)?"

    def ignored(self, entry: str) -> str:
        """Our spelling of an entry of ``ignore``, which there is held against the names of layers only."""
        if entry.startswith("re:"):
            flags, pattern = self.regex(entry, "ignore")
            return entry if _open_ended(pattern) else f"re:{flags}(?:{pattern}).*"
        if entry == "lm_head" or re.match(r"[A-Z]\w*$", entry):  # lm_head: sparsec leaves the head out anyway
            return entry
        return f"re:{re.escape(entry)}"  # a bare name is a full name there, a last component here

    def regex(self, entry: str, where: str) -> tuple[str, str]:
        """Flags at the beginning, which must stay there, and the rest."""
        found = re.fullmatch(r"re:((?:\(\?[aiLmsux]+\))?)(.*)", entry, re.DOTALL)
        assert found is not None
        try:
            re.compile(found[1] + found[2])
        except re.error as error:
            why = f"has {entry!r}, which is no regular expression ({error})"
            raise self.refuse(where, why) from None
        return found[1], found[2]

    def weight_of(self, pattern: str) -> str:
        """The pattern of a layer, from that of its weight's name."""
        stem = re.fullmatch(r"(.*?)(?:\\\.|\[\.\]|\.)weight\$?", pattern)
        if stem is not None and "|" not in pattern:
            return stem[1]
        anything = re.fullmatch(r"(.*\.\*)weight\$?", pattern)
        if anything is not None and "|" not in pattern and not anything[1].endswith(r"\..*"):
            return anything[1]
        why = f"has {'re:' + pattern!r}, which names weights in a way that sparsec cannot read; name the layers"
        raise self.refuse("targets", why)


def _listed(said: Any) -> list[str]:
    return [said] if isinstance(said, str) else [str(entry) for entry in said]


def _open_ended(pattern: str) -> bool:
    """Whether it takes any ending anyway, so that a match of the beginning is one of the whole."""
    return pattern.endswith(".*") and not pattern.endswith(r"\.*") and not set("|$") & set(pattern)


_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", re.DOTALL)
_ENDS = ("$", r"\Z")


def _at_any_dot(pattern: str) -> str:
    r"""The pattern with ``$`` and ``\Z`` true before every dot too: there a module's name ends for what is inside.

    What follows an end must match nothing, not the dot: where it cannot, no name is meant.
    """
    rests = (pattern[part.end() :] for part in _PARTS.finditer(pattern) if part[0] in _ENDS)
    if "|" not in pattern and any(_never_empty(rest) for rest in rests):
        return "(?!)"
    return _into_weight(_PARTS.sub(lambda found: "(?![^.])" if found[0] in _ENDS else found[0], pattern))


def _into_weight(pattern: str) -> str:
    r"""The pattern whose last ``\.`` and ``.`` may lie behind the name, in the ``.weight`` of its weight."""
    tail = re.search(r"(?<!\\)(?:\\\.)?\.*$", pattern)
    if tail is None or not tail[0]:
        return pattern
    behind = re.sub(r"\\\.|\.", lambda part: f"(?:{part[0]}|$)", tail[0])
    return pattern[: tail.start()] + behind


def _never_empty(pattern: str) -> bool:
    """Whether it needs a character; False for the rest of a group, which is no pattern by itself."""
    try:
        return re.fullmatch(pattern, "") is None
    except re.error:
        return False


def _matches(name: str, entry: str) -> bool:
    """As llm-compressor holds an entry against a name."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def _reaches_head(target: str) -> bool:
    """Whether a target means the output head without naming it."""
    if target == "lm_head":
        return False
    return target in ("Linear", *_ALL) or _matches("lm_head", target) or _matches("lm_head.weight", target)
