"""Linears that read the same x become one call: q/k/v of attention, gate and up of a gated MLP.

Before: q = sparsec.linear(x, wq, bq, p0); k = sparsec.linear_codes(x, [ck, sk], bk, p1)
After:  g = sparsec.linear_group(x, [wq, ck, sk], [1, 2], [bq, bk], [p0, p1], [None, None]); q = g[0]; k = g[1]

Weights, what they are computed from, biases and scales of x are graph inputs, so x is the only value a call waits for:
the group may stand where its first member stood; a call with a bias that the graph computes stays by itself, and none
moves over a write in place. One parallel region and one read of x serve all members.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from sparsec.passes.graph import writes


def group_calls(graph: Graph) -> int:
    """Join every set of ``sparsec::linear`` and ``linear_codes`` calls on one x; returns the number of groups made."""
    ops = (torch.ops.sparsec.linear.default, torch.ops.sparsec.linear_codes.default)
    by_input: dict[tuple[Node, int], list[Node]] = {}
    writes_before = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target in ops and _waits_for_x_alone(node):
            by_input.setdefault((node.args[0], writes_before), []).append(node)
        elif node.op in ("call_function", "call_method"):
            writes_before += writes(node)
    groups = [members for members in by_input.values() if len(members) > 1]
    for members in groups:
        _join(graph, members)
    return len(groups)


def _waits_for_x_alone(call: Node) -> bool:
    bias, scale = call.args[2], call.args[4] if len(call.args) > 4 else None
    return all(not isinstance(node, Node) or node.op in ("placeholder", "get_attr") for node in (bias, scale))


def _join(graph: Graph, members: list[Node]) -> None:
    first, x = members[0], members[0].args[0]
    weights = [m.args[1] if isinstance(m.args[1], (list, tuple)) else [m.args[1]] for m in members]
    parts = [part for weight in weights for part in weight]
    for part in parts:
        if isinstance(part, Node) and part.op != "placeholder":  # a field of a graph input: ``part_node``
            first.prepend(part)
    columns = [[m.args[i] if len(m.args) > i else None for m in members] for i in (2, 3, 4)]
    with graph.inserting_before(first):
        arguments = (x, parts, [len(weight) for weight in weights], *columns)
        call = graph.call_function(torch.ops.sparsec.linear_group.default, arguments)
        call.meta = {k: v for k, v in first.meta.items() if k != "example_value"}
        call.meta["example_value"] = [m.meta.get("example_value") for m in members]
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(members))]
    for member, result in zip(members, results, strict=True):
        result.meta = dict(member.meta)
        member.replace_all_uses_with(result)
        graph.erase_node(member)
