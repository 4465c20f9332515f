"""Where an ONNX graph multiplies by a constant matrix: an onnx-ir graph in, sites and reasons out.

``MatMul(x, W)``, with the bias that an ``Add`` of a vector brings, and ``Gemm(x, W, b)``, as exporters write linear
layers. Weights are read as they lie in the file or in memory, and never changed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_NAMES, _SHARED = "sparsec.names", "sparsec.shared"  # of what is noted in a graph while it is rewritten


@dataclass(frozen=True)
class OnnxSite:
    """A linear layer: ``y = x @ weight.T + bias``; ``nodes`` are what computes it, ``reason`` why it is none of ours.

    ``weight`` [N, K] and ``bias`` [N] (None: none) are fp32.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    constant: ir.Value
    transposed: bool  # the constant is [K, N]
    bias_from: ir.Value | None = None
    reason: str = ""

    @property
    def x(self) -> ir.Value:
        """What is multiplied now, also where a layer before it was replaced."""
        found = self.nodes[0].inputs[0]
        assert found is not None
        return found

    @property
    def y(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        assert self.constant.shape is not None
        first, second = (int(size) for size in self.constant.shape.numpy())
        return (second, first) if self.transposed else (first, second)

    def weight(self) -> torch.Tensor:
        assert self.constant.const_value is not None
        found = torch.from_numpy(self.constant.const_value.numpy().copy())
        return (found.t() if self.transposed else found).contiguous()

    def put(self, graph: ir.Graph, nodes: list[ir.Node]) -> None:
        """Compute what this computes by ``nodes``, the last of which gives it."""
        import onnx_ir as ir

        old, y = self.y, nodes[-1].outputs[0]
        named(graph, nodes)
        y.name, y.type, y.shape = old.name, old.type, old.shape
        ir.convenience.replace_nodes_and_values(graph, self.nodes[0], list(self.nodes), nodes, [old], [y])


def sites(graph: ir.Graph) -> Iterator[OnnxSite]:
    """Every product with a constant matrix, in the order of the graph."""
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "MatMul":
            found = _matmul(node)
        elif node.op_type == "Gemm":
            found = _gemm(node)
        else:
            continue
        if found is not None:
            yield found


def unique(graph: ir.Graph, name: str) -> str:
    """A name that nothing in the graph or in a graph inside of it has: ``name``, or that with a number behind it."""
    import onnx_ir as ir

    taken: set[str] | None = graph.meta.get(_NAMES)
    if taken is None:
        taken = graph.meta[_NAMES] = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            inside = (a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH)
            more = [v for g in inside for v in (*g.inputs, *g.initializers.values())]
            taken |= {str(node.name), *(str(v.name) for v in (*node.outputs, *more))}
    free, i = name, 1
    while free in taken:
        free, i = f"{name}.{i}", i + 1
    taken.add(free)
    return free


def named(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Give new nodes and what they give names that nothing else has."""
    for node in nodes:
        node.name = unique(graph, node.name or node.op_type)
        for y in node.outputs:
            y.name = unique(graph, y.name or f"{node.name}_y")


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A new constant of the graph; where the name is taken, with a number behind it."""
    import onnx_ir as ir

    free = unique(graph, name)
    held = ir.tensor(array, name=free)
    value = ir.Value(name=free, type=ir.TensorType(held.dtype), shape=ir.Shape(array.shape), const_value=held)
    graph.register_initializer(value)
    return value


def shared(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A constant of ours that is in the graph once."""
    kept: dict[str, ir.Value] = graph.meta.setdefault(_SHARED, {})
    if name not in kept:
        kept[name] = initializer(graph, name, array)
    return kept[name]


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What a value always is. An initializer that is an input of the graph, too, is only its default."""
    return None if value is None or value.is_graph_input() else value.const_value


def name_of(node: ir.Node) -> str:
    """The module that a node comes from where the exporter wrote it down, else the node's own name."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        scopes = []
    if len(scopes) > 1 and scopes[-2]:
        return str(scopes[-2])
    return node.name or node.op_type


def _matrix(value: ir.Value | None) -> bool:
    return (found := constant(value)) is not None and len(found.shape) == 2


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """A constant matrix as it is stored, and whether it is the transposed one that is multiplied."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return value, False
    perm = node.attributes.get("perm")
    turned = perm is None or list(perm.value) == [1, 0]
    return (node.inputs[0], True) if turned and _matrix(node.inputs[0]) else (value, False)


def _matmul(node: ir.Node) -> OnnxSite | None:
    x, (weight, turned) = node.inputs[0], _stored(node.inputs[1])
    if x is None or weight is None or not _matrix(weight):
        return None
    y = node.outputs[0]
    site = OnnxSite(name_of(node), (node,), weight, transposed=not turned, reason=_why_not(weight))
    users = tuple(y.uses())
    if len(users) != 1 or y.is_graph_output():
        return site
    add = users[0].node
    other = next((v for v in add.inputs if v is not y), None)
    bias = constant(other)
    if add.op_type != "Add" or add.graph is not node.graph or bias is None:
        return site
    if tuple(bias.shape) != site.shape[:1] or str(bias.dtype) != str(weight.dtype):
        return site
    return replace(site, nodes=(node, add), bias_from=other)


def _gemm(node: ir.Node) -> OnnxSite | None:
    x, given, *rest = node.inputs
    weight, turned = _stored(given)
    if x is None or weight is None or not _matrix(weight):
        return None
    said = {name: a.value for name, a in node.attributes.items()}
    bias = rest[0] if rest else None
    transposed = bool(said.get("transB", 0)) == turned
    site = OnnxSite(name_of(node), (node,), weight, transposed, bias, _why_not(weight))
    plain = said.get("alpha", 1.0) == 1.0 and said.get("beta", 1.0) == 1.0 and not said.get("transA", 0)
    if not plain:
        return _declined(site, "it scales or transposes what it multiplies")
    if bias is not None and ((held := constant(bias)) is None or tuple(held.shape) != site.shape[:1]):
        return _declined(site, "its bias is not a constant vector")
    return site


def _declined(site: OnnxSite, why: str) -> OnnxSite:
    return replace(site, reason=site.reason or why, bias_from=None)


def _why_not(weight: ir.Value) -> str:
    kind = str(weight.const_value.dtype) if weight.const_value is not None else "no constant"
    return "" if kind == "FLOAT" else f"its weight is {kind.lower()}, and kernels here take float"
