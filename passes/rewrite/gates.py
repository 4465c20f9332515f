"""A linear whose outputs are multiplied by zeros computes only the others.

Before: h = relu(gate); u = sparsec.linear(x, w, b, plan); p = h * u
After:  h = relu(gate); u = sparsec.linear_needed(x, [w], b, h, plan); p = h * u

The zeros of x need no other op: sparsec::linear looks at x where the plan says that it has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from sparsec.passes.profile.aliases import changed_between


def only_needed(graph: Graph, calls: Sequence[tuple[Node, Node]], ops: Any) -> int:
    """``calls``: calls of ``ops.linear``, each with the node whose zeros say which outputs nobody reads.

    A call waits for that node, so one that is read before it stays as it is, and one whose operands something writes to
    until then. Returns how many were changed.
    """
    changed = 0
    for call, needed in calls:
        place = {node: i for i, node in enumerate(graph.nodes)}
        first_use = min((place[user] for user in call.users), default=0)
        if call.target is not ops.linear.default or place[needed] >= first_use:
            continue
        x, weight, bias, plan, *x_scale = call.args
        if place[needed] > place[call] and changed_between(call.all_input_nodes, call, needed):
            continue
        with graph.inserting_after(needed if place[needed] > place[call] else call):
            new = graph.call_function(ops.linear_needed.default, (x, [weight], bias, needed, plan, *x_scale))
        new.meta = dict(call.meta)
        call.replace_all_uses_with(new)
        graph.erase_node(call)
        changed += 1
    return changed
