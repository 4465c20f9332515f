"""Linears that read the same x become one call: q/k/v of attention, gate and up of a gated MLP.

Before: q = sparsec.linear(x, wq, bq, p0); k = sparsec.linear(x, wk, bk, p1)
After:  g = sparsec.linear_group(x, [wq, wk], [bq, bk], [p0, p1], [None, None]); q = g[0]; k = g[1]

Weights and biases are graph inputs, so x is the only value a call waits for: the group may stand where its first
member stood. One parallel region and one read of x serve all members.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node


def group_calls(graph: Graph) -> int:
    """Join every set of ``sparsec::linear`` calls on one x; returns the number of groups made."""
    by_input: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.sparsec.linear.default:
            by_input.setdefault(node.args[0], []).append(node)
    groups = [members for members in by_input.values() if len(members) > 1]
    for members in groups:
        _join(graph, members)
    return len(groups)


def _join(graph: Graph, members: list[Node]) -> None:
    x = members[0].args[0]
    columns = [[m.args[i] for m in members] for i in (1, 2, 3)]
    columns.append([m.args[4] if len(m.args) > 4 else None for m in members])
    with graph.inserting_before(members[0]):
        call = graph.call_function(torch.ops.sparsec.linear_group.default, (x, *columns))
        call.meta = {k: v for k, v in members[0].meta.items() if k != "example_value"}
        call.meta["example_value"] = [m.meta.get("example_value") for m in members]
        parts = [graph.call_function(operator.getitem, (call, i)) for i in range(len(members))]
    for member, part in zip(members, parts, strict=True):
        part.meta = dict(member.meta)
        member.replace_all_uses_with(part)
        graph.erase_node(member)
