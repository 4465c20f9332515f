"""``pack_`` and ``unpack_``: a model whose sparse weights exist only packed, and back.

In: a model with zeros in its linear layers and embeddings. Out: the same model, whose ``nn.Linear`` became
``PackedLinear`` where the decision says sparse and whose ``nn.Embedding`` became ``PackedEmbedding`` where the pack is
smaller, layer by layer: a layer's dense weight is freed before the next one is packed, so that memory never exceeds the
dense model and one layer. What stays dense stays as it is, with its reason in the report.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec import targets
from sparsec.cache import cache_dir
from sparsec.codegen import cpp
from sparsec.codegen.cpp import packer
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.errors import BadOptionValue, PatternMismatch, RoundTripMismatch, SparsecError
from sparsec.facts import Decision, WeightFact
from sparsec.formats import Format
from sparsec.measure import rates_for
from sparsec.options import Options, Policy
from sparsec.pack_report import PackReport, PackRow
from sparsec.packable import Found, find_layers, kind_of
from sparsec.packed import PackedEmbedding, PackedWeight, checksum, packed_layer, text_tensor
from sparsec.passes.decide.candidates import plain_panel
from sparsec.passes.decide.whole import UNPACK, WholePlan, best_whole, formats_by_size
from sparsec.passes.graph import DTYPES
from sparsec.passes.quantize.inputs import set_inputs
from sparsec.plan import Plan
from sparsec.runtime import library
from sparsec.runtime.packed import Meta, kernels_in
from sparsec.runtime.store import STORE
from sparsec.targets.base import Rates

Progress = Callable[[int, int, str], None]  # layers done, of how many, name
_LOOKED_UP = "an embedding: the rows it is asked for are decoded, which takes longer than copying them"
_BUDGET_S = 0.05  # for timing the decoding of a layer
_decoding: dict[tuple[str, int, int], float] = {}  # format, tenths of density, threads -> least seconds a position


@torch.no_grad()
def pack_(
    model: nn.Module,
    target: str = "auto",
    *,
    options: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> PackReport:
    """Replace sparse linear layers and embeddings of ``model`` by packed ones, in place, and free their dense weights.

    ``target``: as in torch.compile's options; CPUs only. ``options``: the same keys (``formats``, ``min_speedup``,
    ``tune``); ``min_speedup=0`` packs whatever gets smaller. A layer is packed where some format is smaller than dense
    and expected to be ``min_speedup`` faster at some number of rows; its one format then serves every number of rows,
    and the report says from which number on dense would have been faster.

    An embedding is packed in the smallest format that it holds, if that is smaller than dense: the rows it is asked for
    are decoded, which takes longer than copying them. Linear layers and embeddings that share a weight (a tied head)
    share its pack, as the linear layer decides; a weight that another kind of module reads too stays dense, and so do
    convolutions. Layers that round their inputs go on doing so, by integer kernels where those are faster.
    The values are the same bit for bit, except that -0.0 becomes 0.0. Packed layers are for
    inference on the CPU: they cannot be trained, cast or moved. Weights that a loader mapped from a file and that were
    changed since (a pruned ``from_pretrained`` model) stay resident until the last tensor of that file goes.
    Raises OptionError, NoCompiler, CompileFailed.
    """
    policy = Options.parse({**dict(options or {}), "target": target}).policy
    _check(model, policy)
    library.load(policy.cache_dir)
    packer.load()
    kernels_in(policy.cache_dir)
    rows: list[PackRow] = []
    found = list(find_layers(model))
    for number, layer in enumerate(found):
        if on_progress is not None:
            on_progress(number, len(found), layer.name)
        if layer.transposed and not layer.refusal:
            with layer.laid_in_rows():
                row = _pack_layer(layer, policy)
        else:
            row = _pack_layer(layer, policy)
        rows.append(row)
        trim()
    return PackReport(type(model).__name__, tuple(rows))


@torch.no_grad()
def unpack_(model: nn.Module) -> nn.Module:
    """Give every packed layer of ``model`` its dense weight back, in place, and return the model.

    Layers that shared a weight share it again; parameters that could be trained can be again.
    """
    weights: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    for parent, child, layer in list(_packed_places(model)):
        if id(layer) not in made:
            about, key = layer.about, layer._pack[1].data_ptr() or id(layer)
            if key not in weights:
                dense = layer.weight
                if about.get("kind") == "Conv1D":
                    dense = dense.t().contiguous()
                    trim()  # of the copy
                weights[key] = nn.Parameter(dense, requires_grad=bool(about.get("trained", True)))
            made[id(layer)] = _dense_layer(layer, weights[key], about)
        parent._modules[child] = made[id(layer)]
    trim()
    return model


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


# ----------------------------------------------------------------------------------------------------------- inside


def _check(model: nn.Module, policy: Policy) -> None:
    if targets.resolve(policy.target).gpu:
        expected = "pack_ makes packs for CPUs; on a GPU torch.compile packs beside the dense weights"
        raise BadOptionValue(key="target", value=policy.target, expected=expected)
    if type(model) in (nn.Linear, nn.Embedding):
        expected = "a layer cannot replace itself; put it into a module, as in nn.Sequential(layer)"
        raise BadOptionValue(key="model", value=f"nn.{type(model).__name__}", expected=expected)


@dataclass(frozen=True)
class _Made:
    """A pack with what was decided for it."""

    tensors: tuple[torch.Tensor, ...]
    plan: WholePlan
    fact: WeightFact


def _pack_layer(layer: Found, policy: Policy) -> PackRow:
    weight = layer.weight
    rows, columns = (int(s) for s in (weight.t() if layer.transposed else weight.flatten(1)).shape)
    row = functools.partial(
        PackRow, layer.name, (rows, columns), dense_bytes=weight.numel() * weight.element_size(), tied=layer.tied
    )
    if layer.refusal:
        return row(reason=layer.refusal)
    kind = "hf_conv1d" if layer.transposed else "linear"
    plan = Plan(layer.name, kind, policy, transposed=layer.transposed, x=layer.x)
    try:
        made, reason = (_multiplying if layer.multiplies else _looking_up)(layer, plan, policy)
    except SparsecError as error:
        return row(reason=str(error))
    if made is None:
        return row(reason=reason)
    size = sum(t.numel() * t.element_size() for t in made.tensors)
    if size >= weight.numel() * weight.element_size():  # small weights: what every pack has beside its values
        return row(reason=f"its pack would take {size} bytes, no fewer than the weight itself")
    multiplies = layer.multiplies
    layer.replace(lambda module: _packed_module(module, made, layer))
    del weight
    return row(
        reason=reason,
        format=made.plan.format,
        packed_bytes=size,
        plan=made.plan if multiplies else None,
        density=made.fact.density,
        negative_zeros=made.fact.negative_zeros,
    )


def _sparse(decision: Decision, policy: Policy) -> bool:
    """Whether some number of rows runs sparse by the decision; panels hold every zero."""
    return any(r.format != "dense" and not plain_panel(r.format) for r in decision.ranges)


def _multiplying(layer: Found, plan: Plan, policy: Policy) -> tuple[_Made | None, str]:
    """The pack of a weight that linear layers read, or None where it stays dense; and why."""
    weight = layer.weight
    fact, decision = STORE.decided(weight, plan)
    trim()  # of the profile, which holds as much as a pack does
    rates = _rates(fact, weight, policy, plan.x_type)
    chosen = best_whole(fact, DTYPES[weight.dtype], rates, policy, x=plan.x_type)
    if not _sparse(decision, policy) or chosen is None:
        return None, decision.reason if chosen is None or not decision.ours else _only_panels(decision)
    return _made(weight.t() if layer.transposed else weight, fact, chosen, plan), decision.reason


def _looking_up(layer: Found, plan: Plan, policy: Policy) -> tuple[_Made | None, str]:
    """The pack of an embedding, in the smallest format that takes its values; it only ever decodes."""
    weight = layer.weight
    fact = STORE.profiled(weight, plan)
    target, dtype = targets.resolve(policy.target), DTYPES[weight.dtype]
    for format in formats_by_size(fact, dtype, policy):
        if format.pattern.kind not in cpp.FAMILIES:
            continue
        try:
            cpp.family(format.pattern.kind).text(KernelSpec.on(target, format, UNPACK, dtype))
            whole = WholePlan(str(format), ((0, UNPACK),), 1, 0.0, 1, 0.0)
            return _made(weight, fact, whole, plan), _LOOKED_UP
        except PatternMismatch:  # values that this pattern's layout does not take
            continue
    return None, "no format of its values is smaller than the weight itself"


def _only_panels(decision: Decision) -> str:
    return f"no sparse format is faster; {decision.reason}"


def _rates(fact: WeightFact, weight: torch.Tensor, policy: Policy, x: str) -> Rates:
    target, threads, cache = targets.resolve(policy.target), torch.get_num_threads(), cache_dir(policy.cache_dir)
    return rates_for(fact, DTYPES[weight.dtype], target, threads, cache, policy.formats, x)


def _made(weight: torch.Tensor, fact: WeightFact, chosen: WholePlan, plan: Plan) -> _Made:
    """Pack a [N, K] weight, measure its decoding, choose the loops, and prove the pack block by block.

    The proof reads the pack with the kernel's own decoder, a few megabytes at a time: a whole second weight would break
    the bound on memory. Raises PatternMismatch, RoundTripMismatch.
    """
    format = Format.parse(chosen.format)
    family = cpp.family(format.pattern.kind, chosen.x)
    packed = family.pack(weight.contiguous(), format.pattern, format.values, fact.key)
    dtype, policy = DTYPES[weight.dtype], plan.policy
    tensors = _tensors(packed, chosen, dtype, plan)
    trim()
    if not torch.ops.sparsec.holds_packed(list(tensors), weight):
        raise RoundTripMismatch(format=str(format), detail="a block of rows differs")
    if chosen.routes == ((0, UNPACK),):  # of an embedding: it has no loops to choose
        return _Made(tensors, chosen, fact)
    seconds = _seconds_of_unpacking(tensors, fact, weight)
    rates = _rates(fact, weight, policy, plan.x_type)
    final = best_whole(fact, dtype, rates, policy, seconds, plan.x_type, only=chosen.pack) or chosen
    return _Made(_tensors(packed, final, dtype, plan), final, fact)


def _tensors(packed: Packed, chosen: WholePlan, dtype: str, plan: Plan) -> tuple[torch.Tensor, ...]:
    n, k = packed.shape
    count, tiles, target = len(packed.tensors), packed.work.numel() - 1, plan.policy.target
    meta = Meta(str(packed.format), packed.version, n, k, dtype, count, tiles, chosen.routes, target, plan.x)
    return (meta.encode(), *packed.tensors, packed.work)


def _seconds_of_unpacking(tensors: tuple[torch.Tensor, ...], fact: WeightFact, weight: torch.Tensor) -> float:
    """The least of several decodes in blocks, which are compared with the weight and so cost a little more.

    Other layers of the same format and about the same density say what a quiet moment of this machine gives.
    """
    meta = Meta.decode(tensors[0])
    key = (f"{meta.format}/{meta.reads}", round(10 * fact.density), torch.get_num_threads())
    known = _decoding.get(key, float("inf")) * weight.numel()
    best: float = min(known, torch.ops.sparsec.seconds_of_decoding(list(tensors), weight, _BUDGET_S))
    _decoding[key] = best / max(weight.numel(), 1)
    return best


def _packed_module(module: nn.Module, made: _Made, layer: Found) -> PackedWeight:
    bias: Any = module._parameters.get("bias")
    about = {
        "sum": checksum(made.tensors),
        "source": made.fact.key,
        "density": made.fact.density,
        "kind": kind_of(module) or type(module).__name__,
        "trained": layer.weight_trained,
        "bias_trained": bias is not None and bias.requires_grad,
        "dense_from": made.plan.dense_from,
        "worst": made.plan.worst,
        "worst_at": made.plan.worst_at,
    }
    if isinstance(module, nn.Embedding):
        about["padding"] = module.padding_idx
    new = packed_layer(made.tensors, bias, text_tensor(about))
    new.train(module.training)
    new._forward_hooks, new._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    return new


def _packed_places(model: nn.Module) -> Iterator[tuple[nn.Module, str, PackedWeight]]:
    for parent in model.modules():
        for child, module in parent._modules.items():
            if isinstance(module, PackedWeight):
                yield parent, child, module


def _dense_layer(layer: PackedWeight, weight: nn.Parameter, about: Mapping[str, Any]) -> nn.Module:
    has_bias = layer.bias is not None
    new: Any
    if about.get("kind") == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        conv: Any = Conv1D
        new = conv(layer.out_features, 1)
        new.nx = layer.in_features
    elif isinstance(layer, PackedEmbedding):
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    else:
        new = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    new.weight = weight
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach(), requires_grad=bool(about.get("bias_trained", True)))
    set_inputs(new, layer.inputs)
    new.train(layer.training)
    new._forward_hooks, new._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
    made: nn.Module = new
    return made


def trim() -> None:
    """Ask the C library to give freed pages back to the system; small weights would otherwise stay resident."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
