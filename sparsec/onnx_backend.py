"""Graphs for the target ``onnxruntime``: a Dynamo graph in, a callable out that runs parts of it in ONNX Runtime.

AOTAutograd lowers the graph to the operators that torch.onnx can write; those become parts (``passes/rewrite/
onnx_parts.py``), each an op (``runtime/onnx_parts.py``) in the graph that Inductor compiles.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sparsec import compat
from sparsec.export_onnx import OPSET, quiet_export
from sparsec.facts import Declined
from sparsec.options import Options
from sparsec.passes.rewrite.onnx_parts import as_linears, returned, split, written
from sparsec.runtime import onnx_parts
from sparsec.runtime.onnx_parts import Part
from sparsec.targets.base import Target

_numbers = itertools.count()


class _NoParts(Exception):
    pass


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, target: Target, declined: list[Declined]
) -> Callable[..., Any]:
    """Compile a graph, which is consumed. ``declined``: takes what stays with Inductor and why."""
    onnx_parts.load()
    with quiet_export():
        known, decompositions = compat.onnx_operators()
    parts: list[Part] = []
    copy, patches = compat.copy_graph_module(gm), dict(options.inductor)

    def rewrite(lowered: GraphModule, static: Sequence[int]) -> GraphModule:
        joined, calls, why = split(lowered, known)
        declined.extend(why)
        if not calls:
            raise _NoParts
        inputs = joined.graph.find_nodes(op="placeholder")
        weights = {*(inputs[i] for i in static), *joined.graph.find_nodes(op="get_attr")} - written(joined)
        parts.extend(_replaced(joined, call, weights, options, target) for call in calls)
        joined.graph.lint()
        joined.recompile()
        return joined

    try:
        compiled = compat.compile_rewritten(gm, example_inputs, patches, rewrite, decompositions)
    except _NoParts:
        return compat.compile_rest(copy, example_inputs, patches)
    return _Compiled(compiled, parts)


@dataclass(frozen=True)
class _Compiled:
    """What Dynamo calls; ``parts`` live as long as it does, since the op finds them weakly."""

    call: Callable[..., Any]
    parts: list[Part]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _replaced(joined: GraphModule, call: Node, weights: set[Node], options: Options, target: Target) -> Part:
    """Put the op in the place of a part's module."""
    module: Any = getattr(joined, str(call.target))
    outputs, many = returned(module)
    given = list(call.args)
    sizes = tuple(i for i, node in enumerate(given) if not isinstance(_val(node), torch.Tensor))
    as_linears(module)
    model = _as_onnx(module)
    names = tuple(value.name for value in model.graph.input)
    assert len(names) == len(given)
    part = Part(
        module, model.SerializeToString(), names, tuple(value.name for value in model.graph.output),
        tuple(i for i, node in enumerate(given) if node in weights and i not in sizes), sizes, options.policy, target,
    )  # fmt: skip
    key = f"{next(_numbers)}"
    onnx_parts.PARTS[key] = part
    tensors = [node for i, node in enumerate(given) if i not in sizes]
    with joined.graph.inserting_before(call):
        new = joined.graph.call_function(torch.ops.sparsec_onnx.run.default, (tensors, [given[i] for i in sizes], key))
        new.meta["val"] = [_contiguous(_val(node)) for node in outputs]
        items = [joined.graph.call_function(operator.getitem, (new, i)) for i in range(len(outputs))]
        for item, value in zip(items, new.meta["val"], strict=True):
            item.meta["val"] = value
    if many:
        for user in list(call.users):
            user.replace_all_uses_with(items[user.args[1]])  # type: ignore[index]
            joined.graph.erase_node(user)
    else:
        call.replace_all_uses_with(items[0])
    joined.graph.erase_node(call)
    joined.delete_submodule(str(call.target))
    return part


def _as_onnx(module: GraphModule) -> Any:
    """A part as a ModelProto, its weights inputs too."""
    with quiet_export():
        program = torch.onnx.export(compat.exported(module), dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    return program.model_proto


def _val(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, Node) else node


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)
