"""A weight that the graph computes from stored integers: ``(q.to(dtype) - zero) * scale``, however it is spelled.

In: the node that a linear takes as its weight. Out: ``Expression``, the stored tensors it reads and the arithmetic
between them as text. The text travels in the plan: whoever meets other tensors (another module behind the same graph,
a changed scale) evaluates it with plain torch and gets the very weight that the graph would have computed.

Only whole-tensor arithmetic, casts, shapes and bit operations are read, so that 4-bit codes two to a byte are covered
too. An expression without integers is not ours: a weight times a mask, or a slice, has its own reason.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined
from sparsec.passes.graph import View, describe, value_of
from sparsec.passes.rewrite.torchao import int8_weight

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
_LONGEST = 64  # operations; a longer one is no dequantisation
_T = torch.Tensor

# Name -> meaning. Arithmetic by operators, which take a number on either side.
_OPS: dict[str, Callable[..., Any]] = {
    "mul": operator.mul, "sub": operator.sub, "add": operator.add, "truediv": operator.truediv,
    "and_": operator.and_, "or_": operator.or_, "rshift": operator.rshift, "lshift": operator.lshift,
    "getitem": operator.getitem, "to": _T.to, "float": _T.float, "bfloat16": _T.bfloat16, "half": _T.half,
    "int": _T.int, "view": _T.view, "reshape": _T.reshape, "flatten": _T.flatten, "unflatten": _T.unflatten,
    "unsqueeze": _T.unsqueeze, "squeeze": _T.squeeze, "expand": _T.expand, "transpose": _T.transpose,
    "permute": _T.permute, "t": _T.t, "contiguous": _T.contiguous, "repeat_interleave": _T.repeat_interleave,
    "stack": torch.stack, "cat": torch.cat,
}  # fmt: skip
_SYNONYMS = {
    "multiply": "mul", "subtract": "sub", "div": "truediv", "divide": "truediv", "bitwise_and": "and_",
    "__and__": "and_", "bitwise_or": "or_", "__or__": "or_", "bitwise_right_shift": "rshift", "__rshift__": "rshift",
    "bitwise_left_shift": "lshift", "__lshift__": "lshift", "concat": "cat", "concatenate": "cat", "type": "to",
    "__getitem__": "getitem",
}  # fmt: skip
_PLAIN = ("mul", "sub", "add", "truediv", "and_", "or_", "rshift", "lshift")  # keywords of these change the meaning


@dataclass(frozen=True)
class Expression:
    """``parts``: the stored inputs by name, the integers first (``w.scale``: what a subclass holds). ``text``: see
    ``evaluate``."""

    parts: tuple[str, ...]
    text: str


def expression_of(node: Any, view: View) -> Expression | Declined | None:
    """How ``node`` is computed from stored tensors; None where no stored integers are in it."""
    if (held := int8_weight(node, view)) is not None:
        return held if isinstance(held, Declined) else Expression(*held)
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    integers = _integers(node, view)
    if not integers:
        return None
    reader = _Reader(view, list(integers))
    try:
        body = reader.read(node)
    except _Unread as why:
        return Declined(f"the weight is computed from integers, but {why}; write (q.to(dtype) - zero) * scale")
    return Expression(tuple(part.name for part in reader.parts), json.dumps(body, separators=(",", ":")))


def part_of(name: str, nodes: Mapping[str, Node], view: View) -> torch.Tensor:
    """The real tensor behind the name of a part."""
    owner, _, field = name.partition(".")
    value: torch.Tensor = view.examples[nodes[owner]]
    return getattr(value, field) if field else value


def part_node(name: str, nodes: Mapping[str, Node], graph: Graph) -> Node:
    """The node of a part, made where it is held by a subclass."""
    owner, _, field = name.partition(".")
    return graph.call_function(getattr, (nodes[owner], field)) if field else nodes[owner]


def evaluate(text: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight, from an expression's text and tensors in the place of its parts. Bit for bit what the graph gives."""
    with torch.no_grad():
        found: torch.Tensor = _evaluated(_parsed(text), parts)
        return found


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return json.loads(text)


def _evaluated(body: Any, parts: Sequence[torch.Tensor]) -> Any:
    """Lists are calls [name, args, keywords]; objects with one key are the other things that arguments can be."""
    if isinstance(body, list):
        name, args, kwargs = body
        values = [_evaluated(a, parts) for a in args]
        return _OPS[name](*values, **{k: _evaluated(v, parts) for k, v in kwargs.items()})
    if not isinstance(body, dict):
        return body
    ((kind, value),) = body.items()
    if kind == "part":
        return parts[value].detach()
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "slice":
        return slice(*value)
    if kind == "tuple":
        return tuple(_evaluated(v, parts) for v in value)
    return ...


class _Unread(Exception):
    """What could not be read, in words."""


@dataclass
class _Reader:
    view: View
    parts: list[Node]
    _count: int = 0
    _seen: dict[Node, Any] = field(default_factory=dict)

    def read(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._part(node)
        self._count += 1
        if self._count > _LONGEST:
            raise _Unread("by too many operations")
        name, args, kwargs = _call(node)
        return [name, [self.value(a) for a in args], {k: self.value(v) for k, v in kwargs.items()}]

    def value(self, said: Any) -> Any:
        if isinstance(said, Node):
            return self.read(said)
        if isinstance(said, torch.dtype):
            return {"dtype": str(said).removeprefix("torch.")}
        if isinstance(said, slice):
            ends = [said.start, said.stop, said.step]
            if all(end is None or type(end) is int for end in ends):
                return {"slice": ends}
        if isinstance(said, (tuple, list)):
            return {"tuple": [self.value(v) for v in said]}
        if said is ...:
            return {"ellipsis": 1}
        if said is None or type(said) in (bool, int, float):
            return said
        raise _Unread(f"{said!r} is an argument there")

    def _part(self, node: Node) -> Any:
        found = self.view.weight(node)
        if isinstance(found, Declined):
            raise _Unread(found.reason.replace("the weight", f"{node.name} in it"))
        if node not in self.parts:
            self.parts.append(node)
        return {"part": self.parts.index(node)}


def _call(node: Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """A node as (name in ``_OPS``, arguments, keywords)."""
    args, kwargs = node.args, dict(node.kwargs)
    word = describe(node)
    if word == "getattr" and args[1] in ("T", "mT"):
        return "transpose", (args[0], -2, -1), {}
    if word in ("type_as", "to") and len(args) > 1 and isinstance(args[1], Node):
        dtype = value_of(node)
        if dtype is None:
            raise _Unread(f"{word} has no known dtype")
        return "to", (args[0], dtype.dtype), {}  # the type of something that is no part of it
    name = _SYNONYMS.get(word, word)
    if name not in _OPS or node.op not in ("call_function", "call_method"):
        raise _Unread(f"{word} is not read there")
    if kwargs and name in _PLAIN and set(kwargs) - {"other"}:
        raise _Unread(f"{word} has {', '.join(kwargs)}")
    if name in _PLAIN and "other" in kwargs:
        args, kwargs = (*args, kwargs.pop("other")), {}
    return name, args, kwargs


def _integers(node: Node, view: View) -> dict[Node, None]:
    """The stored integer matrices that a node is computed from, the largest first; {} where inputs of the call are in
    it too, for then it is an activation."""
    found: dict[Node, None] = {}
    todo, seen = [node], {node}
    while todo:
        here = todo.pop()
        if here.op == "placeholder":
            if not view.stored(here):
                return {}
            value = value_of(here)
            if value is not None and value.dtype in _INTEGERS and value.dim() > 1:
                found[here] = None
            continue
        only_dtype = describe(here) in ("type_as", "to")  # of what else they name, only the type is read
        for source in here.all_input_nodes[: 1 if only_dtype else None]:
            if source not in seen:
                seen.add(source)
                todo.append(source)
        if len(seen) > 4 * _LONGEST:
            return {}
    return dict.fromkeys(sorted(found, key=lambda n: -_numel(n)))


def _numel(node: Node) -> int:
    value = value_of(node)
    return 0 if value is None else value.numel()
