"""Whose results nobody reads: backward over a graph, from products with zeros and from selections.

h * f(u)               u matters only where h is not zero      (up projection of a gated MLP; f(u) finite where u is)
where(mask, f(u), y)   u matters only where the mask holds     (any elementwise f)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from sparsec.facts import ActFact
from sparsec.passes.profile.aliases import changed, written
from sparsec.passes.profile.call import shape_of, word_of, words

# What is computed value by value; True: from finite values only finite ones.
_ELEMENTWISE = {
    **dict.fromkeys(
        words(
            "relu relu6 hardtanh threshold hardswish hardsigmoid hardshrink softshrink clamp clip clamp_min "
            "clamp_max maximum minimum tanh atan asinh erf sign sgn trunc round floor ceil frac softsign leaky_relu "
            "elu celu selu silu gelu mish to float double half bfloat16 type type_as contiguous clone detach positive "
            "bool neg negative sin cos abs absolute sigmoid softplus mul multiply add sub subtract square gt ge lt le "
            "eq ne where masked_fill dropout nan_to_num logical_not logical_and logical_or"
        ),
        True,
    ),
    **dict.fromkeys(words("div truediv divide pow exp exp2 expm1 sqrt rsqrt log log1p reciprocal sinh"), False),
}
Demand = dict[Node, bool]  # a node whose zeros say where a value is not read -> whether the way there stays finite


def needed_of(graph: Graph, facts: Mapping[Node, ActFact], nodes: Iterable[Node]) -> Mapping[Node, Node]:
    """For each of ``nodes`` that has one, a node whose zeros are places of it that nobody reads.

    All may be used together: no mask waits for a value that waits for the mask. Of relu(a) * relu(b) only the later
    of the two products gets one. With 0 in the places that nobody reads, every result of the graph is the same.
    """
    wanted = _Demands(facts, {node.name: node for node in graph.nodes})
    for node in reversed(graph.nodes):
        wanted.read(node)
    place = {node: i for i, node in enumerate(graph.nodes)}
    gone = changed(graph)
    found: dict[Node, Node] = {}
    for node in sorted(nodes, key=place.__getitem__, reverse=True):
        masks = [mask for mask in wanted.of[node] if mask not in gone]
        mask = next((mask for mask in masks if not _waits(mask, node, found)), None)
        if mask is not None:
            found[node] = mask
    return found


def _waits(mask: Node, node: Node, found: Mapping[Node, Node]) -> bool:
    """Whether a mask is computed from ``node``, or from what waits for a mask that is."""
    todo, seen = [mask], {mask}
    while todo:
        here = todo.pop()
        if here is node:
            return True
        before = [*here.all_input_nodes, *([found[here]] if here in found else [])]
        todo += [n for n in before if n not in seen]
        seen.update(before)
    return False


@dataclass
class _Demands:
    facts: Mapping[Node, ActFact]
    named: Mapping[str, Node]
    of: dict[Node, Demand] = field(default_factory=dict)

    def read(self, node: Node) -> None:
        """What all users of a node agree on; they come after it, and were read before."""
        self.of[node] = {}
        users = list(node.users)
        if not users or (len(users) > 1 and any(written(user) is node for user in users)):
            return
        found = self._through(node, users[0])
        for user in users[1:]:
            other = self._through(node, user)
            found = {mask: finite or other[mask] for mask, finite in found.items() if mask in other}
        self.of[node] = found

    def _through(self, node: Node, user: Node) -> Demand:
        """Where ``user`` needs ``node``: where its own result is needed, and where it does not drop the value."""
        word = word_of(user)
        if word not in _ELEMENTWISE or shape_of(user) is None or shape_of(user) != shape_of(node):
            return {}
        found: Demand = {}
        if word in ("mul", "multiply"):
            for other in (n for n in user.all_input_nodes if n is not node):
                found |= {mask: True for mask in self._zeros_of(other) if _fits(mask, user)}
        elif word == "where" and (mask := _selector(node, user)) is not None and _fits(mask, user):
            found[mask] = False
        for mask, finite in self.of[user].items():
            if not finite or _ELEMENTWISE[word]:
                found[mask] = found.get(mask, True) and finite
        return found

    def _zeros_of(self, factor: Node) -> list[Node]:
        """The factor, and the node that its zeros come from."""
        fact = self.facts[factor]
        source = self.named.get(fact.node)
        return list(dict.fromkeys([factor, source] if source is not None else [factor])) if fact.zeros else []


def _selector(node: Node, user: Node) -> Node | None:
    """The condition of a ``where`` that takes ``node`` where it holds, and nowhere else."""
    args = list(user.args)
    if user.op == "call_method" and len(args) == 3:
        args = [args[1], args[0], args[2]]
    if len(args) != 3 or args[1] is not node or node in (args[0], args[2]):
        return None
    return args[0] if isinstance(args[0], Node) else None


def _fits(mask: Node, result: Node) -> bool:
    """Whether a mask says something of each column: it is broadcast over rows at most."""
    ours, theirs = shape_of(mask), shape_of(result)
    return bool(ours and theirs and ours[-1] == theirs[-1] and len(ours) <= len(theirs))
