"""One operation of a graph as transfer functions see it: its arguments, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sparsec.facts import ActFact
from sparsec.passes.graph import View, argument, describe, sizes, value_of

TOP = ActFact()
POSITIVE = ActFact("nonnegative", nonnegative=True)
_CASTS = (
    "to",
    "float",
    "bfloat16",
    "half",
    "double",
    "type",
    "type_as",
    "int",
    "long",
    "contiguous",
    "clone",
    "detach",
)


@dataclass(frozen=True)
class Call:
    """``of``: the fact of an argument, ``top`` for what is no node."""

    node: Node
    of: Callable[[Any], ActFact]
    view: View

    @property
    def name(self) -> str:
        return self.node.name

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return argument(self.node, index, name, default)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.arg(0, "input")

    @property
    def x(self) -> ActFact:
        """What is known of the first argument, where the result has its shape; else of the same zeros spread out."""
        return self.spread(self.input)

    def spread(self, value: Any) -> ActFact:
        """What is known of an argument once it is broadcast to the result's shape."""
        fact = self.of(value)
        if not fact.zeros or shape_of(value) == shape_of(self.node):
            return fact
        ours, theirs = shape_of(self.node), shape_of(value)
        if ours and theirs and ours[-1] == theirs[-1]:
            return replace(fact, node=self.name)
        return replace(unpatterned(fact), node=self.name)


def words(text: str) -> list[str]:
    """A list of names, as it is easiest to read and to add to."""
    return text.split()


Transfer = Callable[[Call], ActFact]


def word_of(node: Node) -> str:
    """The operation's name without the marks of its spelling: ``relu_``, ``iadd`` and ``aten.relu.default`` alike.

    "" for a function that is not torch's or Python's own: it may have any name.
    """
    if node.op == "call_method":
        return describe(node).strip("_")
    module = str(getattr(node.target, "__module__", ""))
    if node.op != "call_function" or not (module in ("_operator", "builtins") or module.partition(".")[0] == "torch"):
        return ""
    if module.startswith("torch._ops") and module != "torch._ops.aten":
        return ""
    word = describe(node).partition(".")[0].strip("_")
    return _IN_PLACE.get(word, word) if module == "_operator" else word


_IN_PLACE = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "iand": "and",
    "ior": "or",
    "ipow": "pow",
}


def shape_of(value: Any) -> tuple[int | str, ...] | None:
    """The shape with symbolic sizes as text; None where it is not known."""
    found = value_of(value)
    return None if found is None else sizes(found)


def number(value: Any) -> float | None:
    """A number, or the one that a constant node makes (``torch.tensor(0.0)``)."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, Node) and value.op == "call_function":
        args = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1}.get(word_of(value))
        return number(argument(value, args, "fill_value")) if args is not None else None
    return None


def unpatterned(fact: ActFact) -> ActFact:
    """The same zeros in unknown places."""
    return replace(fact, pattern="", state="exact" if fact.rate is not None else "likely") if fact.zeros else fact


def unknown_share(fact: ActFact) -> ActFact:
    """Some of the same zeros, nobody knows which."""
    return replace(fact, pattern="", rate=None, state="likely") if fact.zeros else fact


def moved(call: Call, fact: ActFact) -> ActFact:
    """A fact whose zeros are in other places than those of the node they come from."""
    return replace(fact, node=call.name) if fact.zeros else fact


def peeled(value: Any) -> Any:
    """What is under casts and copies."""
    while isinstance(value, Node) and value.op == "call_method" and describe(value) in _CASTS:
        value = value.args[0]
    return value


def is_bool(value: Any) -> bool:
    found = value_of(value)
    return found is not None and found.dtype == torch.bool
