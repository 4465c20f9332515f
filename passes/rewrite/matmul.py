"""x @ W and addmm(b, x, W) with a parameter W -> sparsec::linear, which packs W transposed.

Before: y = x @ w                        w: [K, N], a parameter        (HF Conv1D: addmm(b, x.view(-1, K), w))
After:  y = sparsec.linear(x, w, None, plan)       plan says "transposed"

Before: y = x @ w.t()                    w: [N, K], a parameter
After:  y = sparsec.linear(x, w, None, plan)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument, is_call, value_of
from sparsec.passes.rewrite.expression import expression_of
from sparsec.passes.rewrite.linear import site


class MatmulRule:
    name = "matmul"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        found = operands(node)
        if found is None:
            return None
        x, w, b, transposed = found
        kind = "matmul" if b is None else "addmm"
        if kind == "addmm" and _in_conv1d(node):
            kind = "hf_conv1d"
        weight = value_of(w)
        stored = view.stored(w) or expression_of(w, view) is not None
        if not stored or (weight is not None and weight.dim() != 2):
            return None  # a product of activations or a batched one; the last rule names it
        return site(node, view, x, w, b, kind=kind, transposed=transposed)

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        found = operands(node)
        assert found is not None
        x, w, b, _ = found
        return graph.call_function(ops.linear.default, (x, w, b, plan))


def operands(node: Node) -> tuple[Any, Any, Any, bool] | None:
    """(x, weight, bias, transposed) of a product with a stored matrix on the right."""
    b = None
    if is_call(node, operator.matmul, torch.matmul, torch.mm) or (
        node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")
    ):
        x, w = node.args[0], argument(node, 1, "other", node.kwargs.get("mat2"))
    elif is_call(node, torch.addmm) and node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1:
        b, x, w = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
    else:
        return None
    inner = _untransposed(w)
    return (x, w, b, True) if inner is None else (x, inner, b, False)


def _untransposed(w: Any) -> Node | None:
    """The parameter behind ``w.t()``, ``w.T``, ``w.mT`` or ``w.transpose(0, 1)``, if w is one of these."""
    if not isinstance(w, Node) or not w.args or not isinstance(w.args[0], Node) or w.args[0].op != "placeholder":
        return None
    value = value_of(w.args[0])
    if value is None or value.dim() != 2:
        return None
    if (w.op == "call_method" and w.target == "t") or is_call(w, torch.t):
        return w.args[0]
    if is_call(w, getattr) and w.args[1] in ("T", "mT"):
        return w.args[0]
    swaps = w.args[1:] in ((0, 1), (1, 0), (-1, -2), (-2, -1))
    return w.args[0] if swaps and (w.target == "transpose" or is_call(w, torch.transpose)) else None


def _in_conv1d(node: Node) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1][1] if stack else None
    return getattr(last, "__name__", str(last)).rpartition(".")[2] == "Conv1D"


matmul = MatmulRule()
