"""Values that something writes to after they were computed: what was known of them does not hold to the end.

``F.relu(x, inplace=True)``, ``x += y``, ``x[i] = 0`` and ``scatter_`` change a tensor that other nodes may show parts
of. Nothing here knows in which order readers and writers see it; a value with a reader after a writer is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.fx import Graph, Node

from sparsec.passes.graph import describe, value_of, writes
from sparsec.passes.profile.call import words

# Operations whose result is a new tensor, whatever they are called on; of any other, it may be a view.
_FRESH = frozenset(
    words(
        "linear matmul mm bmm addmm baddbmm einsum outer conv1d conv2d conv3d conv_transpose2d embedding cat stack "
        "clone scaled_dot_product_attention layer_norm rms_norm group_norm batch_norm softmax log_softmax add sub "
        "mul div truediv floordiv mod pow square abs neg exp log sqrt rsqrt reciprocal sin cos sum mean var std "
        "amax amin max min prod norm cumsum argmax argsort sort topk any all gather scatter index_select where "
        "masked_fill round floor ceil sign clamp clip clamp_min clamp_max maximum minimum sigmoid tanh relu relu6 "
        "silu gelu mish elu leaky_relu hardtanh hardswish hardsigmoid softplus gt ge lt le eq ne logical_and "
        "logical_or logical_not and or invert bitwise_and bitwise_or bitwise_not zeros ones full arange empty "
        "zeros_like ones_like full_like new_zeros new_full"
    )
)


def written(node: Node) -> Node | None:
    """The node whose tensor a call changes, if it changes one."""
    if node.op not in ("call_function", "call_method"):
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    target = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(target, Node):
        return None
    return target if writes(node) or in_place(node) else None


def in_place(node: Node) -> bool:
    """``F.relu(x, inplace=True)`` and ``F.dropout(x, 0.1, False, True)``."""
    if value_of(node) is None or not str(getattr(node.target, "__module__", "")).startswith("torch.nn.functional"):
        return False
    place = {"dropout": 3, "hardtanh": 3, "leaky_relu": 2, "elu": 2, "celu": 2, "_threshold": 3}.get(describe(node), 1)
    return node.kwargs.get("inplace", node.args[place] if len(node.args) > place else False) is True


def overwritten(graph: Graph) -> set[Node]:
    """Nodes that are read after something wrote to what they show."""
    return {node for node, at, place in _changes(graph) if any(place[user] > at for user in node.users)}


def changed(graph: Graph) -> set[Node]:
    """Nodes that something writes to later: what they held at first is not to be had at the end."""
    return {node for node, _, _ in _changes(graph)}


def changed_between(nodes: Iterable[Node], first: Node, last: Node) -> bool:
    """Whether something that comes after ``first`` and before ``last`` writes to what one of ``nodes`` shows."""
    shown = {near for node in nodes for near in _family(node)}
    here = first.next
    while here is not last and here.op != "root":
        if written(here) in shown:
            return True
        here = here.next
    return written(last) in shown


def _changes(graph: Graph) -> Iterator[tuple[Node, int, Mapping[Node, int]]]:
    """Every node that shows what a later node writes to, and where in the graph that is."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    for writer in nodes:
        target = written(writer)
        if target is not None:
            at = place[writer]
            yield from ((node, at, place) for node in _family(target) if place[node] < at)


def _family(node: Node) -> set[Node]:
    """All nodes that may show the same memory."""
    found, todo = {node}, [node]
    while todo:
        for near in _neighbours(todo.pop()):
            if near not in found:
                found.add(near)
                todo.append(near)
    return found


def _neighbours(node: Node) -> Iterator[Node]:
    if _may_show(node):
        yield from node.all_input_nodes
    yield from (user for user in node.users if _may_show(user))


def _may_show(node: Node) -> bool:
    """Whether the result may be a view of an argument, or the argument itself."""
    if node.op not in ("call_function", "call_method"):
        return False
    return describe(node).strip("_").partition(".")[0] not in _FRESH or written(node) is not None
