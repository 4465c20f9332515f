"""Where an ONNX graph multiplies by a constant matrix: an onnx-ir graph in, sites and reasons out.

``MatMul(x, W)``, with the bias that an ``Add`` of a vector brings, and ``Gemm(x, W, b)``, as exporters write linear
layers. Weights are read as they lie in the file or in memory, and never changed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


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


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A new constant of the graph; where the name is taken, with a number behind it."""
    import onnx_ir as ir

    free, i = name, 1
    while free in graph.initializers:
        free, i = f"{name}.{i}", i + 1
    held = ir.tensor(array, name=free)
    value = ir.Value(name=free, type=ir.TensorType(held.dtype), shape=ir.Shape(array.shape), const_value=held)
    graph.register_initializer(value)
    return value


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
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """A constant matrix as it is stored, and whether it is the transposed one that is multiplied."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return value, False
    perm = node.attributes.get("perm")
    turned = perm is None or list(perm.value) == [1, 0]
    return (node.inputs[0], True) if turned and _matrix(node.inputs[0]) else (value, False)


def _matmul(node: ir.Node) -> OnnxSite | None:
    x, (constant, turned) = node.inputs[0], _stored(node.inputs[1])
    if x is None or constant is None or not _matrix(constant):
        return None
    y = node.outputs[0]
    site = OnnxSite(name_of(node), (node,), constant, transposed=not turned, reason=_why_not(constant))
    users = tuple(y.uses())
    if len(users) != 1 or y.is_graph_output():
        return site
    add = users[0].node
    other = next((v for v in add.inputs if v is not y), None)
    if add.op_type != "Add" or other is None or other.const_value is None:
        return site
    if tuple(other.const_value.shape) != site.shape[:1] or str(other.dtype) != str(constant.dtype):
        return site
    return replace(site, nodes=(node, add), bias_from=other)


def _gemm(node: ir.Node) -> OnnxSite | None:
    x, given, *rest = node.inputs
    constant, turned = _stored(given)
    if x is None or constant is None or not _matrix(constant):
        return None
    said = {name: a.value for name, a in node.attributes.items()}
    bias = rest[0] if rest else None
    transposed = bool(said.get("transB", 0)) == turned
    site = OnnxSite(name_of(node), (node,), constant, transposed, bias, _why_not(constant))
    plain = said.get("alpha", 1.0) == 1.0 and said.get("beta", 1.0) == 1.0 and not said.get("transA", 0)
    if not plain:
        return _declined(site, "it scales or transposes what it multiplies")
    if bias is not None and (bias.const_value is None or tuple(bias.const_value.shape) != site.shape[:1]):
        return _declined(site, "its bias is not a constant vector")
    return site


def _declined(site: OnnxSite, why: str) -> OnnxSite:
    return replace(site, reason=site.reason or why, bias_from=None)


def _why_not(constant: ir.Value) -> str:
    kind = str(constant.const_value.dtype) if constant.const_value is not None else "no constant"
    return "" if kind == "FLOAT" else f"its weight is {kind.lower()}, and kernels here take float"
