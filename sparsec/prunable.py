"""Which weights of a model can be pruned, and which of them a step means.

In: any ``nn.Module`` and a ``Step``. Out: ``Job`` records, one a weight matrix, and notes on what was left out and
why. Nothing is written here, and everything that can be wrong with a recipe for this model is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsec.errors import BadRecipe, UnmatchedTarget, UnprunableLayer
from sparsec.matcher import BARE, match, matching, nearest, winner
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.recipe_steps import Gates, Layers, Piece, Step, Values

# kind -> the class name of its target entry
KINDS = {"linear": "Linear", "hf_conv1d": "Conv1D", "conv1x1": "Conv2d", "conv2d": "Conv2d"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PRUNES = "nn.Linear, Conv1D and nn.Conv2d without groups"


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose weight is a matrix. ``tied``: the other modules that hold the very same weight."""

    name: str
    kind: str
    weight: nn.Parameter
    tied: tuple[str, ...] = ()

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [N, K] = [out_features, in_features]: a detached view, so writing to it writes the weight.

        Of a larger convolution K is in the order of ``facts``, (high, wide, channel), in which its patterns are. It is
        a view while the weight is channels_last (``laid_in_patches``), and a copy else.
        """
        weight = self.weight.detach()
        if self.kind == "hf_conv1d":
            return weight.t()
        if self.kind == "conv2d":
            return weight.permute(0, 2, 3, 1).flatten(1)
        return weight[:, :, 0, 0] if self.kind == "conv1x1" else weight  # flatten() may copy, an index never does

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.matrix.shape
        return n, k


@dataclass(frozen=True)
class Survey:
    """``modules``: name -> class. ``layers``: what can be pruned. ``refused``: what holds weights and cannot, why."""

    modules: Mapping[str, type]
    layers: Mapping[str, Layer]
    refused: Mapping[str, str]
    head: str | None = None  # the module that gives logits, where the model says which


@dataclass(frozen=True, eq=False)
class Job:
    """One weight to prune with one setting (``step`` with the overrides of this layer in it)."""

    layer: Layer
    step: Step | Values | Gates
    notes: tuple[str, ...] = ()


@dataclass
class Selection:
    """What a step does: its jobs in module order, the step with its targets and ignores filled in, notes."""

    step: Piece
    jobs: list[Job] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(model: nn.Module) -> Survey:
    """Look at every module once."""
    modules: dict[str, type] = {}
    refused: dict[str, str] = {}
    kinds: dict[str, str] = {}
    weights: dict[str, nn.Parameter] = {}
    homes: dict[object, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[name] = type(module)
        kind, why = _kind(module), _why_not(module)
        if why:
            refused[name] = why
        elif kind:
            kinds[name], weights[name] = kind, module._parameters["weight"]  # type: ignore[assignment]
        for parameter in module._parameters.values():
            if parameter is not None:
                homes.setdefault(_storage(parameter), []).append(name)
    layers = {}
    for name, weight in weights.items():
        tied = tuple(other for other in homes[_storage(weight)] if other != name)
        layers[name] = Layer(name, kinds[name], weight, tied)
    return Survey(modules, layers, refused, _head(model))


def _storage(parameter: nn.Parameter) -> object:
    if parameter.device.type == "meta" or type(parameter) is not nn.Parameter:
        return id(parameter)
    return (parameter.data_ptr(), parameter.numel(), parameter.device) if parameter.numel() else id(parameter)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv1x1" if module.kernel_size == (1, 1) else "conv2d"
    is_hf = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)
    return "hf_conv1d" if is_hf else ""


def _why_not(module: nn.Module) -> str:
    """Why a module that holds weights cannot be pruned; empty where it can, or holds none."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "it is an embedding, which is looked up, not multiplied"
    if _kind(module):
        return _why_not_layer(module)
    own = {k: p for k, p in module._parameters.items() if p is not None and p.ndim >= 2 and min(p.shape[-2:]) > 1}
    for name, parameter in own.items():
        shape = "x".join(map(str, parameter.shape))
        return f"{type(module).__name__} holds {name} [{shape}] itself, and sparsify prunes only {_PRUNES}"
    return ""


def _why_not_layer(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        size = "x".join(map(str, module.kernel_size))
        return f"it is a {size} convolution in {module.groups} groups, and only one without groups is a matrix product"
    weight = module._parameters.get("weight")
    if weight is None:
        made = "torch.nn.utils.prune.remove" if "weight_orig" in module._parameters else "remove_parametrizations"
        return f"its weight is computed, not a parameter; call {made} on it first"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.device.type == "meta":
        return "its weight is on the meta device: not loaded yet, or offloaded"
    if weight.dtype not in DTYPES:
        return f"its weight holds {weight.dtype}, not floating-point numbers of 16 bits or more"
    return "" if weight.numel() else "its weight is empty"


def _head(model: nn.Module) -> str | None:
    """The name of the output head of a transformers model (``lm_head``, ``embed_out``, ...)."""
    try:
        found = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def select_layers(seen: Survey, step: Step | Values | Gates) -> Selection:
    """The jobs of one step. Raises UnmatchedTarget, UnprunableLayer or BadRecipe."""
    step = step.model_copy(update={"targets": _targets(seen, step), "ignore": _ignores(seen, step)})
    chosen = Selection(step)
    wanted = _wanted(seen, step, chosen.notes)
    ignored = {name for entry in step.ignore or () for name in matching(entry, seen.modules)}
    _note_ignores(seen, step, chosen.notes)
    for entry in step.overrides:
        if not any(name in seen.layers for name in matching(entry, seen.modules)):
            raise UnmatchedTarget(where="overrides", entry=entry, nearest=_nearest(seen, entry))
    left_out = {name: reason for name in seen.layers if (reason := _left_out(seen, step, name, ignored))}
    done: set[str] = set()
    for name in wanted:
        layer = seen.layers[name]
        if name in done or name in left_out:
            continue
        done |= {name, *layer.tied}
        shy = next((t for t in layer.tied if t in left_out or t in seen.refused or t in ignored), None)
        if shy is not None:
            why = left_out.get(shy) or ("in ignore" if shy in ignored else seen.refused[shy])
            chosen.notes.append(f"{name or '(the model)'} was left out: it shares its weight with {shy} ({why})")
            continue
        chosen.jobs.append(_job(step, layer, seen))
    if not chosen.jobs:
        raise BadRecipe(detail=_nothing(seen, chosen.notes))
    return chosen


def _targets(seen: Survey, step: Layers) -> tuple[str, ...]:
    if step.targets is not None:
        return step.targets
    present = {layer.kind for layer in seen.layers.values()}
    return tuple(dict.fromkeys(entry for kind, entry in KINDS.items() if kind in present))


def _ignores(seen: Survey, step: Layers) -> tuple[str, ...]:
    """What the user ignores, and the output head unless ``targets`` names it or ``ignore`` is an empty list."""
    if step.ignore == ():
        return ()
    heads = dict.fromkeys(matching("lm_head", seen.modules), "lm_head")
    if seen.head is not None and seen.head not in heads:
        heads[seen.head] = seen.head
    said = list(step.ignore or ())
    for name, entry in heads.items():
        ranks = [match(target, name, seen.modules[name]) for target in step.targets or ()]
        if not any(rank is not None and rank <= BARE for rank in ranks):
            said.append(entry)
    return tuple(dict.fromkeys(said))


def _wanted(seen: Survey, step: Layers, notes: list[str]) -> list[str]:
    """The layers that ``targets`` means, in module order; notes say which modules it means but cannot have."""
    taken: set[str] = set()
    refused: list[str] = []
    for entry in step.targets or ():
        names = matching(entry, seen.modules)
        layers = [name for name in names if name in seen.layers]
        cannot = [name for name in names if name in seen.refused]
        if not layers and cannot:
            raise UnprunableLayer(name=cannot[0], why=seen.refused[cannot[0]], help=f"Target {_PRUNES}.")
        if not layers:
            raise UnmatchedTarget(where="targets", entry=entry, nearest=_nearest(seen, entry))
        taken.update(layers)
        refused += cannot
    if step.targets == _targets(seen, step.model_copy(update={"targets": None})):
        refused += _not_embeddings(seen)  # "all of it" was asked: say what is not in it
    notes += _refusals(seen, refused)
    return [name for name in seen.layers if name in taken]


def _not_embeddings(seen: Survey) -> list[str]:
    return [name for name in seen.refused if not issubclass(seen.modules[name], (nn.Embedding, nn.EmbeddingBag))]


def _refusals(seen: Survey, names: list[str]) -> list[str]:
    """One note for all modules that are refused with the same words."""
    same: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        same.setdefault(seen.refused[name], []).append(name or "(the model)")
    return [f"{_some(names)} not pruned: {why}" for why, names in same.items()]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _nearest(seen: Survey, entry: str) -> str:
    layers = {name: seen.modules[name] for name in seen.layers}
    return ", ".join(nearest(entry, layers)) or "none (the model has no layer that can be pruned)"


def _note_ignores(seen: Survey, step: Layers, notes: list[str]) -> None:
    for entry in step.ignore or ():
        names = matching(entry, seen.modules)
        if not names:
            notes.append(f"ignore entry {entry!r} matches nothing in this model")
        elif not any(name in seen.layers or name in seen.refused for name in names):
            notes.append(f"ignore entry {entry!r} names no layer but what holds layers; write '{names[0]}.*' for those")


def _left_out(seen: Survey, step: Layers, name: str, ignored: set[str]) -> str:
    if name in ignored:
        return "in ignore"
    entry = winner(list(step.overrides), name, seen.modules[name])
    return f"overrides skips it by {entry!r}" if entry is not None and step.overrides[entry] is None else ""


def _job(step: Step | Values | Gates, layer: Layer, seen: Survey) -> Job:
    entry = winner(list(step.overrides), layer.name, seen.modules[layer.name])
    own = step if entry is None else step.overridden(entry)
    assert own is not None  # skipped layers make no job
    if not all(bool(end.isfinite()) for end in layer.matrix.aminmax()):  # NaN is both ends; isfinite takes 10x as long
        help_ = "Add it to ignore, or repair the checkpoint."
        raise UnprunableLayer(name=layer.name, why="its weight holds NaN or infinite values", help=help_)
    notes = [f"shares its weight with {', '.join(layer.tied)}; pruned once"] if layer.tied else []
    return Job(layer, own, (*notes, *_pattern_notes(own, *layer.shape)))


def _pattern_notes(step: Step | Values | Gates, n: int, k: int) -> list[str]:
    if isinstance(step, Gates):
        return []  # its pattern is of activations, and the method says what does not fit
    pattern = MaskPattern.parse(step.pattern)
    notes = []
    group = getattr(step, "group", 0) if isinstance(step, Values) else 0
    if group and k % group:
        notes.append(f"{k} in-features are not a multiple of group {group}: the last {k % group} have their own scale")
    rest = k % pattern.group if pattern.sparsity is not None else 0
    if rest:
        keeps = min(pattern.params[-2], rest)
        notes.append(f"{k} in-features are not a multiple of {pattern.group}: the last {rest} keep at most {keeps}")
    if pattern.sparsity is not None and step.scope not in ("layer", step.method_object().scope):
        notes.append(f"scope {step.scope} changes nothing for {pattern}: every group keeps its own")
    if pattern.kind == "block" and (n % pattern.params[0] or k % pattern.params[1]):
        notes.append(f"{n}x{k} is not a multiple of {pattern}: the blocks at the edge are smaller")
    return notes


def _nothing(seen: Survey, notes: list[str]) -> str:
    why = f" ({'; '.join(notes)})" if notes else ""
    if not seen.layers:
        return f"the model has no layer that can be pruned ({_PRUNES}){why}"
    return f"it leaves no layer to prune{why}"
