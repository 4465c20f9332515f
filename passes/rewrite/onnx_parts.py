"""Parts of a graph of ATen operators that ONNX Runtime can run: a graph in, a module for each part out, with reasons.

Before: a = aten.addmm(b, x, w); s = aten.special_i0(a); y = aten.mm(s, v)
After:  a = part_0(b, x, w); s = aten.special_i0(a); y = part_1(s, v)

A part has at least one product; what is between parts, or in another precision than fp32, stays with Inductor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition
from torch.fx.passes.operator_support import OperatorSupportBase

from sparsec.facts import Declined

_aten = torch.ops.aten
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")
DTYPES = (torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
_PREFIX = "part_"
_RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


@dataclass
class Support(OperatorSupportBase):
    """Which nodes ONNX Runtime takes. ``known``: whether an operator has a translation; ``declined``: what has none,
    each operator and reason once."""

    known: Callable[[Any], bool]
    declined: dict[str, Declined] = field(default_factory=dict)

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            return self.is_node_supported(submodules, node.all_input_nodes[0])
        why = self._why_not(node)
        if why:
            self.declined.setdefault(why, Declined(why, node.name, op=str(node.target)))
        return not why

    def _why_not(self, node: Node) -> str:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not self.known(node.target):
            return f"ONNX has no translation of {node.target}, which Inductor runs"
        if schema.is_mutable or _draws(node):
            return f"{node.target} writes in place or draws numbers, which Inductor does"
        for value in _values(node):
            if isinstance(value, (int, torch.SymInt)):
                continue
            if not isinstance(value, torch.Tensor):
                return f"a {type(value).__name__} is not handed to ONNX Runtime; Inductor runs what reads it"
            if value.dtype not in DTYPES or value.device.type != "cpu" or value.layout is not torch.strided:
                return f"{value.dtype} on {value.device.type} is not handed to ONNX Runtime; Inductor runs it"
        return ""


def split(gm: GraphModule, known: Callable[[Any], bool]) -> tuple[GraphModule, list[Node], list[Declined]]:
    """The graph with a ``call_module`` node in the place of each part, these nodes, and what is in none.

    A part's module takes tensors and sizes, and returns a tuple of tensors.
    """
    support = Support(known)
    partitioner = CapabilityBasedPartitioner(gm, support, allows_single_node_partition=True)
    worth = [part for part in partitioner.propose_partitions() if _has_product(part)]
    for i, part in enumerate(worth):
        part.id = i
    joined = partitioner.fuse_partitions(worth, prefix=_PREFIX)
    calls = [node for node in joined.graph.nodes if node.op == "call_module" and str(node.target).startswith(_PREFIX)]
    return joined, calls, list(support.declined.values())


def written(gm: GraphModule) -> set[Node]:
    """Inputs that the graph writes in place, such as caches: they are no weights, although their memory is fixed."""
    return {node.args[0] for node in gm.graph.find_nodes(op="call_function", target=_aten.copy_.default)}  # type: ignore[misc]


def returned(module: GraphModule) -> tuple[list[Node], bool]:
    """What a part gives, and whether it gives it as a tuple; afterwards it does, from inputs of any strides."""
    for node in module.graph.find_nodes(op="call_function", target=_aten.view.default):
        node.target = _aten.reshape.default
    out = module.graph.output_node()
    (value,) = out.args
    many = isinstance(value, (tuple, list))
    if not many:
        out.args = ((value,),)
    module.recompile()
    return list(out.args[0]), many  # type: ignore[arg-type]


def as_linears(module: GraphModule) -> int:
    """Put ``linear`` where its rows were made flat for ``addmm`` or ``mm`` and unflattened after it; how many."""
    done = 0
    for node in list(module.graph.nodes):
        if node.target not in (_aten.addmm.default, _aten.mm.default) or node.kwargs:
            continue
        *bias, flat, turned = node.args
        if turned.target != _aten.t.default or flat.target not in _RESHAPES or not node.users:
            continue
        x, weight = flat.args[0], turned.args[0]
        rows, n = x.meta["val"].shape[:-1], node.meta["val"].shape[-1]
        back = [user for user in node.users if user.target in _RESHAPES and user.meta["val"].shape == (*rows, n)]
        if len(back) != len(node.users) or x.meta["val"].shape[-1] != weight.meta["val"].shape[1]:
            continue
        for user in back:
            with module.graph.inserting_before(user):
                new = module.graph.call_function(_aten.linear.default, (x, weight, *bias))
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            module.graph.erase_node(user)
        done += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return done


def _draws(node: Node) -> bool:
    """Whether a node's result depends on a random number; attention is tagged so, and without dropout it does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    dropout = node.args[3] if len(node.args) > 3 else node.kwargs.get("dropout_p", 0.0)
    return node.target is not _aten._scaled_dot_product_flash_attention_for_cpu.default or bool(dropout)


def _has_product(part: Partition) -> bool:
    names = (getattr(node.target, "overloadpacket", None) for node in part.nodes)
    return any(getattr(packet, "__name__", "") in PRODUCTS for packet in names)


def _values(node: Node) -> list[Any]:
    """What a node reads and gives."""
    found: list[Any] = []
    for other in (node, *node.all_input_nodes):
        value = other.meta.get("val")
        found += [item for item in (value if isinstance(value, (tuple, list)) else (value,)) if item is not None]
    return found
