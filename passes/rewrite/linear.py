"""F.linear(x, weight, bias) -> sparsec::linear(x, weight, bias, plan).

Before: y = linear(x, w, b)                      w: [N, K], a parameter
After:  y = sparsec.linear(x, w, b, plan)        the op finds what was packed for w by its identity

Before: y = linear(x, (q.to(x.dtype) - zero) * scale, b)          q: stored integers
After:  y = sparsec.linear_codes(x, [q, zero, scale], b, plan)    the plan says how they make the weight
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument, checked_dtype, fqn, is_call, sizes, value_of
from sparsec.passes.rewrite.expression import expression_of


class LinearRule:
    name = "linear"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if not is_call(node, torch.nn.functional.linear):
            return None
        x, w, b = operands(node)
        return site(node, view, x, w, b, kind="linear", transposed=False)

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        x, w, b = operands(node)
        return graph.call_function(ops.linear.default, (x, w, b, plan))


def operands(node: Node) -> tuple[Any, Any, Any]:
    """(x, weight, bias) of a linear call, given by position or keyword."""
    return argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")


def site(node: Node, view: View, x: Any, w: Any, b: Any, *, kind: str, transposed: bool) -> Site | Declined:
    """Check the three operands of x [..., K] times w ([N, K], or [K, N] if transposed) plus b [N]."""
    name = fqn(node, w if isinstance(w, Node) and w.op == "placeholder" else None)

    def no(declined: Declined) -> Declined:
        return Declined(declined.reason, node.name, name, kind)

    weight: torch.Tensor | Declined | None = view.weight(w)
    made = expression_of(w, view) if isinstance(weight, Declined) else None
    if isinstance(made, Declined):
        return no(made)
    if made is not None:
        weight = value_of(w)
    if weight is None or isinstance(weight, Declined):
        return no(weight or Declined("the weight has no known shape"))
    value = value_of(x)
    if value is None or value.dim() < 1:
        return no(Declined("the input is not a tensor of at least one dimension"))
    if weight.dim() != 2:
        return no(Declined(f"the weight has {weight.dim()} dimensions, not 2"))
    dtype = checked_dtype(value, weight)
    if isinstance(dtype, Declined):
        return no(dtype)
    if b is not None and not _is_bias(b, weight, transposed):
        return no(Declined("the bias is not one vector of the weight's dtype"))
    n, k = (int(s) for s in (weight.t() if transposed else weight).shape)
    return Site(
        node=node.name,
        kind=kind,
        weight=made.parts[0] if made else w.name,
        bias=b.name if isinstance(b, Node) else None,
        x_shape=sizes(value),
        n=n,
        k=k,
        dtype=dtype,
        fqn=name,
        transposed=transposed,
        reads=x.name,
        w=made.text if made else "",
        parts=made.parts if made else (),
    )


def _is_bias(b: Any, weight: torch.Tensor, transposed: bool) -> bool:
    value = value_of(b)
    n = weight.shape[1] if transposed else weight.shape[0]
    return value is not None and value.dim() == 1 and value.shape[0] == n and value.dtype == weight.dtype


linear = LinearRule()
