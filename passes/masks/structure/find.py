"""Find the heads and neurons of a transformer by the names of its linears, and prove each find on data.

In: a model (transformers or built alike) and a batch. Out: ``Units``. Names only propose; a family counts when zeroing
half of its units and cutting them out gave the same output of the module, on real inputs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.units import Family, Part, Units, cut, is_conv1d, matrix, zero

# query, key, value, reader, as seen from the attention module
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP
    ("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT
)
# one linear for query, key and value: side by side, or head by head
_FUSED = (("c_attn", "c_proj", "blocks"), ("qkv_proj", "o_proj", "blocks"), ("query_key_value", "dense", "heads"))
FFNS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama
    (("gate_up_proj",), "down_proj"),  # Phi-3: both in one
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),  # OPT
    (("c_fc",), "c_proj"),  # GPT-2
    (("intermediate.dense",), "output.dense"),  # BERT
    (("lin1",), "lin2"),  # DistilBERT
    (("wi_0", "wi_1"), "wo"),  # T5
    (("wi",), "wo"),
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def find_units(model: nn.Module, batch: Mapping[str, Any]) -> Units:
    """The prunable units of ``model``. ``batch``: keyword arguments of one forward, used for the proof."""
    shared = _shared(model)
    families: list[Family] = []
    declined: dict[str, str] = {}
    for name, module in model.named_modules():
        for found in (_attention(name, module), _ffn(name, module)):
            if isinstance(found, str):
                declined[name] = found
            elif found is not None and any(part.module in shared for part in found.parts):
                declined[name] = "its weights are tied to those of another module"
            elif found is not None:
                families.append(found)
    proven: list[Family] = []
    for family, why in _prove(model, families, batch):
        if why:
            declined[family.name] = why
        else:
            proven.append(family)
    return Units(tuple(proven), declined)


def _shared(model: nn.Module) -> set[str]:
    """Names of modules that hold a parameter which another module holds too."""
    homes = [(n.rpartition(".")[0], id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    count = Counter(identity for _, identity in homes)
    return {name for name, identity in homes if count[identity] > 1}


def linears_of(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module] | None:
    """The linears under these names, or None where one is missing or holds no plain floating-point weight."""
    found = []
    for name in names:
        try:
            linear = module.get_submodule(name)
        except AttributeError:
            return None
        weight = linear._parameters.get("weight")
        if not (isinstance(linear, nn.Linear) or is_conv1d(linear)) or type(weight) is not nn.Parameter:
            return None
        if not weight.is_floating_point():
            return None
        found.append(linear)
    return found


def _attention(name: str, module: nn.Module) -> Family | str | None:
    for names in ATTENTIONS:
        if linears := linears_of(module, names):
            return _separate(name, module, names, linears)
    for fused, reader, order in _FUSED:
        if linears := linears_of(module, (fused, reader)):
            return _one_linear(name, module, (fused, reader), order, linears)
    return None


def _separate(name: str, module: nn.Module, names: tuple[str, ...], linears: list[nn.Module]) -> Family | str:
    query, key, value, reader = (matrix(linear).shape for linear in linears)
    size = _head_size(module, names[0], query[0])
    if not size or query[0] % size or key[0] % size or key[0] != value[0] or reader[1] != query[0]:
        return "its heads cannot be told apart: the sizes of its linears do not fit one head size"
    groups = key[0] // size
    if groups == 1 or (query[0] // size) % groups:
        return f"it has {query[0] // size} query heads on {groups} key-value head(s), so no group can go alone"
    heads = query[0] // size // groups
    sizes = (heads * size, size, size)
    parts = [Part(_join(name, part), "out", each) for part, each in zip(names, sizes, strict=False)]
    return _family(name, "head", groups, [*parts, Part(_join(name, names[3]), "in", heads * size)], linears, heads)


def _one_linear(
    name: str, module: nn.Module, names: tuple[str, str], order: str, linears: list[nn.Module]
) -> Family | str:
    (n, _), (_, width) = (matrix(linear).shape for linear in linears)
    size = _head_size(module, names[0], width)
    if not size or width % size or n < width or (n - width) % (2 * size):
        return "its heads cannot be told apart: the sizes of its linears do not fit one head size"
    heads, groups = width // size, (n - width) // 2 // size
    if groups < 2 or heads % groups or (order == "heads" and heads != groups):
        return f"it has {heads} query heads on {groups} key-value head(s), so no group can go alone"
    each, source = heads // groups * size, _join(name, names[0])
    if order == "heads":
        parts = [Part(source, "out", 3 * size)]
    else:
        key, value = width, width + groups * size
        parts = [Part(source, "out", each), Part(source, "out", size, key), Part(source, "out", size, value)]
    parts.append(Part(_join(name, names[1]), "in", each))
    holders = [linears[0]] * (len(parts) - 1) + [linears[1]]
    return _family(name, "head", groups, parts, holders, heads // groups)


def _ffn(name: str, module: nn.Module) -> Family | str | None:
    for writers, reader in FFNS:
        linears = linears_of(module, (*writers, reader))
        if not linears:
            continue
        width = matrix(linears[-1]).shape[1]
        outs = [matrix(linear).shape[0] for linear in linears[:-1]]
        last = Part(_join(name, reader), "in", 1)
        if outs == [2 * width]:
            parts = [Part(_join(name, writers[0]), "out", 1, start) for start in (0, width)]
            return _family(name, "neuron", width, [*parts, last], [linears[0], *linears])
        if any(out != width for out in outs):
            return "its neurons cannot be told apart: the sizes of its linears do not fit"
        parts = [Part(_join(name, writer), "out", 1) for writer in writers]
        return _family(name, "neuron", width, [*parts, last], linears)
    return None


def _family(
    name: str, kind: str, count: int, parts: list[Part], linears: list[nn.Module], heads: int = 1
) -> Family | str:
    """``linears``: the linear of each part."""
    if count < 2:
        return f"it has one {kind}, which has to stay"
    cost = 0
    for part, linear in zip(parts, linears, strict=True):
        n, k = matrix(linear).shape
        biased = part.side == "out" and linear.bias is not None
        cost += part.size * ((k if part.side == "out" else n) + biased)
    return Family(name, kind, count, tuple(parts), cost, heads)


def _head_size(module: nn.Module, query: str, width: int) -> int | None:
    """Features of one head, as the attention module or the one that holds its query linear says."""
    for home in (module, module.get_submodule(query.rpartition(".")[0])):
        for name in _HEAD_SIZES:
            if isinstance(size := getattr(home, name, None), int):
                return size
        for name in _HEAD_COUNTS:
            if isinstance(count := getattr(home, name, None), int) and count:
                return width // count
    return None


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _prove(model: nn.Module, families: list[Family], batch: Mapping[str, Any]) -> Iterator[tuple[Family, str]]:
    """Each family with "", or with why it is not what its names promise."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name in {family.name for family in families}:

            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                seen[name] = (args, kwargs)

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        model(**batch)
    for family in families:
        if family.name not in seen:
            yield family, "it does not run on the calibration data"
        else:
            yield family, _differs(model.get_submodule(family.name), family, *seen[family.name])


def _differs(module: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Zero every other unit in one copy of the module and cut it out of another: the outputs must agree."""
    start = len(family.name) + 1 if family.name else 0
    parts = tuple(replace(part, module=part.module[start:]) for part in family.parts)
    local = replace(family, name="", parts=parts)
    keep = torch.arange(family.count) % 2 == 0
    zeroed, smaller = copy.deepcopy(module).float().eval(), copy.deepcopy(module).float().eval()
    args, kwargs = _mapped(args, _as_float), _mapped(kwargs, _as_float)
    try:
        with torch.no_grad():
            zero(zeroed, Units((local,), {}), {local.key: keep})
            cut(smaller, local, keep)
            pairs = zip(_outputs(zeroed, args, kwargs), _outputs(smaller, args, kwargs), strict=True)
            same = all(_close(a, b) for a, b in pairs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"it does not run without some of its {family.kind}s: {str(error).splitlines()[0]}"
    return "" if same else f"its output without some {family.kind}s is not that of zeros in their place"


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What flows on: attention weights, which some modules give beside it, have a head for each head that is left."""
    output = module(*args, **kwargs)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return [output]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` of everything inside tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, change) for v in value)
    return {k: _mapped(v, change) for k, v in value.items()} if type(value) is dict else change(value)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = float(a.abs().max()) if a.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-5 + 1e-4 * scale).all())
