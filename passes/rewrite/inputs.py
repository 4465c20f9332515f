"""Rounding of x to int8 before a linear -> a word in the plan, and x as it was before.

Before: s = x.abs().amax(-1, keepdim=True) / 127; s = where(s == 0, 1, s)        or: s a stored number, or a literal
        y = linear((x / s).round().clamp(-127, 127) * s, w, b)
After:  y = sparsec.linear(x, w, b, plan)               plan says "int8", and the op or its kernel rounds x by itself

Taken in fp32 arithmetic only, and only where every value comes out the same: x * (1 / s) rounds some values to the
other neighbour, and a scale of zero divides by it; what is not taken stays as it is, with the reason recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined
from sparsec.passes.graph import View, argument, describe, erase_unused, short, value_of, writes

_CASTS = ("to", "float", "bfloat16", "half", "type", "type_as")
_EXACT = (torch.int8, torch.int16, torch.int32, torch.float32, torch.bfloat16, torch.float16)  # hold -127..127
_ROUNDING = ("round", "rint", "quantize", "fake_quantize")
_ELEMENTWISE = (*_CASTS, "mul", "sub", "add", "div", "truediv", "clamp", "clip", "view", "reshape", "multiply",
                "subtract", "divide")  # fmt: skip
_FAR = 10  # operations back in which a rounding is looked for


@dataclass(frozen=True)
class Inputs:
    """``raw``: x before it is rounded. ``x``: as ``Site.x``. ``scale``: the node of a given scale. ``view``: a change
    of shape between rounding and product, which keeps tokens whole. ``nodes``: the rounding, in graph order."""

    raw: Node
    x: str
    scale: Node | None
    view: Node | None
    nodes: tuple[Node, ...]


class _No(Exception):
    """Why a rounding is not taken, as a clause."""


def quantised_inputs(x: Any, reader: Node, view: View) -> Inputs | Declined | None:
    """What rounds ``x``, the first operand of the product ``reader``; None where nothing does."""
    if not isinstance(x, Node) or not _rounds(x):
        return None
    try:
        found = _matched(x, view)
        _unchanged(found.nodes[0], reader)
        return found
    except _No as why:
        return Declined(f"the rounding of its inputs stays in the graph: {why}", x.name, "", "activations")


def unrounded(graph: Graph, call: Node, view: View) -> None:
    """Make an op that ``quantised_inputs`` held for read x itself: args[0], and args[4] where its scale is given."""
    found = quantised_inputs(call.args[0], call, view)
    assert isinstance(found, Inputs)
    x = found.raw
    if found.view is not None:
        with graph.inserting_before(call):
            x = graph.node_copy(found.view, lambda n: found.raw if n is found.view.args[0] else n)  # type: ignore[union-attr]
    rounded = call.args[0]
    call.args = (x, *call.args[1:4], *([found.scale] if found.scale is not None else []))
    assert isinstance(rounded, Node)
    erase_unused(graph, rounded)


def _matched(x: Node, view: View) -> Inputs:
    used: list[Node] = []
    shape = _same_tokens(x)
    last = x if shape is None else shape.args[0]
    assert isinstance(last, Node)
    used += [x] if shape is not None else []
    casts: list[Node] = []
    product = _peeled(last, casts)
    if any(_dtype(cast) not in (torch.float32, _dtype(x)) for cast in casts):
        raise _No("its result goes through another type")
    used += casts
    factors = _operands(product, "mul", "multiply")
    if factors is None:
        raise _No(_why_no_product(product))
    used.append(product)
    q, scale = factors[::-1] if _is_rounded(factors[1]) else factors
    divided, low = _steps(q, used)
    if (parts := _operands(divided, "div", "truediv", "divide")) is None:
        raise _No("it multiplies by 1 / scale, which rounds some values to the other side; divide by the scale")
    used.append(divided)
    a, divisor = parts
    if divisor is not scale and not (_number(divisor) and divisor == scale):
        raise _No("it divides by one scale and multiplies by another")
    _in_fp32(divided)
    _in_fp32(product)
    raw = _raw(a, _dtype(x), used)
    word, given = _scale_word(scale, a, used, view)
    if low == -128 and (given is not None or (word != "int8" and "min" not in word)):
        raise _No("it clamps to -128..127; kernels round to -127..127")
    if isinstance(scale, Node):
        _in_fp32(scale)
    if value_of(divided).shape != value_of(a).shape:  # type: ignore[union-attr]
        raise _No("its scale has more dimensions than x")
    known = set(used)
    nodes = [n for n in x.graph.nodes if n in known]
    return Inputs(raw, word, given, shape, tuple(nodes))


def _dtype(node: Any) -> torch.dtype | None:
    value = value_of(node)
    return None if value is None else value.dtype


def _in_fp32(node: Node) -> None:
    if (dtype := _dtype(node)) != torch.float32:
        raise _No(f"it is computed in {short(dtype) if dtype else 'an unknown type'}; use float32")


def _rounds(x: Node) -> bool:
    """Whether something rounds on the way to x, within a few elementwise operations."""
    todo = [x]
    for _ in range(_FAR):
        found = []
        for node in todo:
            word = describe(node).partition(".")[0]
            if node.op in ("call_function", "call_method") and word.startswith(_ROUNDING):
                return True
            if word in _ELEMENTWISE:
                found += [n for n in node.all_input_nodes if n.op != "placeholder"]
        todo = list(dict.fromkeys(found))
    return False


def _same_tokens(x: Node) -> Node | None:
    """x itself, where it is only another view of the tokens: the last dimension is whole."""
    if describe(x) not in ("view", "reshape") or not isinstance(x.args[0], Node):
        return None
    old, new = value_of(x.args[0]), value_of(x)
    if old is None or new is None or not old.dim() or not new.dim() or old.shape[-1] != new.shape[-1]:
        raise _No("its shape is changed before the product")
    return x


def _peeled(node: Any, used: list[Node]) -> Any:
    """What is under casts."""
    while isinstance(node, Node) and describe(node) in _CASTS and node.args and isinstance(node.args[0], Node):
        used.append(node)
        node = node.args[0]
    return node


def _operands(node: Any, *words: str) -> tuple[Any, Any] | None:
    if not isinstance(node, Node) or describe(node) not in words:
        return None
    other = argument(node, 1, "other")
    plain = not set(node.kwargs) - {"other", "input"}
    return (argument(node, 0, "input"), other) if plain and other is not None else None


def _why_no_product(node: Any) -> str:
    word = describe(node) if isinstance(node, Node) else "a number"
    if "quantize" in word:
        return f"{word} multiplies by 1 / scale, which rounds some values to the other side; divide by the scale"
    return f"its last step is {word}, not a product with the scale"


def _is_rounded(node: Any) -> bool:
    """Whether it is round(...) or clamp(round(...)): a scale may be clamped as well."""
    found = _peeled(node, [])
    if isinstance(found, Node) and describe(found) in ("clamp", "clip"):
        found = argument(found, 0, "input")
    return isinstance(found, Node) and describe(found) == "round"


def _steps(q: Any, used: list[Node]) -> tuple[Any, float]:
    """What is rounded, and the least step, of clamp(round(x)) or round(clamp(x))."""
    casts: list[Node] = []
    node = _peeled(q, casts)
    if any(_dtype(cast) not in _EXACT for cast in casts):
        raise _No("its steps go through a type that does not hold them")
    used += casts
    words: list[str] = []
    bounds = None
    while isinstance(node, Node) and describe(node) in ("round", "clamp", "clip") and len(words) < 2:
        words.append("round" if describe(node) == "round" else "clamp")
        if words[-1] == "clamp":
            bounds = argument(node, 1, "min"), argument(node, 2, "max")
        elif argument(node, 1, "decimals", 0):
            raise _No("it rounds to decimals")
        used.append(node)
        node = argument(node, 0, "input")
    if sorted(words) != ["clamp", "round"]:
        if isinstance(node, Node) and describe(node) in ("sub", "add", "subtract"):
            raise _No("it has a zero point; only symmetric ones are taken")
        raise _No("it does not round and clamp one after the other")
    if bounds is None or bounds[1] != 127 or bounds[0] not in (-127, -128):
        raise _No(f"it clamps to {bounds[0]}..{bounds[1]}; kernels take -127..127" if bounds else "it has no bounds")
    return node, float(bounds[0])


def _widened(node: Any, used: list[Node]) -> Any:
    """What is under casts to fp32, which lose nothing."""
    while isinstance(node, Node) and describe(node) in _CASTS and _dtype(node) == torch.float32:
        used.append(node)
        node = node.args[0]
    return node


def _raw(a: Any, wanted: torch.dtype | None, used: list[Node]) -> Node:
    """The tensor, under casts to fp32, that has the type of the product's input."""
    casts: list[Node] = []
    base = _widened(a, casts)
    found = next((node for node in (base, a) if _dtype(node) == wanted), None)
    if not isinstance(found, Node):
        raise _No("it changes the type of x")
    used += casts if found is base else []
    return found


def _scale_word(scale: Any, a: Any, used: list[Node], view: View) -> tuple[str, Node | None]:
    """The word for a scale, and its node where it is a graph input."""
    if _number(scale):
        single = float(torch.tensor(float(scale), dtype=torch.float32))
        if not 0 < single < math.inf:
            raise _No(f"its scale is {scale}")
        return f"int8:{single!r}", None
    if not isinstance(scale, Node):
        raise _No("its scale is not known")
    if scale.op == "placeholder":
        value = view.weight(scale)
        if isinstance(value, Declined) or value.numel() != 1:
            raise _No("its scale is neither one stored number nor computed from x")
        return "int8:given", scale
    return _dynamic(scale, a, used), None


def _dynamic(scale: Node, a: Any, used: list[Node]) -> str:
    """``int8`` of max|x| / 127 that is 1 where it is 0, or ``int8:min=`` of one that is clamped from below."""
    guarded = _guarded(scale, used)
    least = 0.0
    node: Any = guarded if guarded is not None else scale
    if guarded is None and (found := _floor(node, used)) is not None:
        node, least = found
    halves = _operands(node, "div", "truediv", "divide")
    if halves is None or not _number(halves[1]) or halves[1] != 127:
        raise _No("its scale is not max|x| / 127")
    used.append(node)
    _in_fp32(node)
    top = _widened(halves[0], used)
    if guarded is None and not least and (found := _floor(top, used)) is not None:
        top, least = found
        least = float(torch.tensor(least, dtype=torch.float32) / 127)
        top = _widened(top, used)
    _largest_of(top, a, used)
    if guarded is None and not least > 0:
        raise _No("a token of zeros is divided by a scale of zero; use where(scale == 0, 1, scale)")
    return f"int8:min={least!r}" if least else "int8"


def _guarded(node: Node, used: list[Node]) -> Node | None:
    """s of where(s == 0, 1, s) and s.masked_fill(s == 0, 1)."""
    word = describe(node)
    if word == "where" and len(node.args) == 3:
        condition, one, inner = node.args
    elif word == "masked_fill" and len(node.args) == 3:
        inner, condition, one = node.args
    else:
        return None
    sides = _operands(condition, "eq")
    if sides is None or sides[0] is not inner or sides[1] != 0 or one != 1 or not isinstance(inner, Node):
        raise _No("its scale is replaced by another rule than 1 where it is 0")
    used += [node, condition]  # type: ignore[list-item]
    return inner


def _floor(node: Any, used: list[Node]) -> tuple[Any, float] | None:
    """x and f of x.clamp(min=f)."""
    if not isinstance(node, Node) or describe(node) not in ("clamp", "clip", "clamp_min"):
        return None
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if high is not None or not _number(low):
        raise _No("its scale is clamped from above")
    used.append(node)
    return argument(node, 0, "input"), float(torch.tensor(float(low), dtype=_dtype(node)))


def _largest_of(node: Any, a: Any, used: list[Node]) -> None:
    """Check that ``node`` is the largest |x| over the last dimension, kept, of the x that is divided."""
    if isinstance(node, Node) and describe(node) in ("getitem", "getattr") and node.args[1] in (0, "values"):
        used.append(node)
        node = node.args[0]
        if not isinstance(node, Node) or describe(node) != "max":
            raise _No("its scale is not max|x| / 127")
    elif not isinstance(node, Node) or describe(node) != "amax":
        raise _No("its scale is not max|x| / 127")
    magnitude, value = argument(node, 0, "input"), value_of(a)
    dims = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if value is None or dims not in ([-1], [value.dim() - 1]) or not argument(node, 2, "keepdim", False):
        raise _No("its scale is shared by more than one token")
    if not isinstance(magnitude, Node) or describe(magnitude) not in ("abs", "absolute"):
        raise _No("its scale is not max|x| / 127")
    used += [node, magnitude]
    if _widened(argument(magnitude, 0, "input"), []) is not _widened(a, []):
        raise _No("its scale is that of another tensor")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unchanged(first: Node, last: Node) -> None:
    """Refuse where anything is written in place between: x would be read after it."""
    for node in _between(first, last):
        if writes(node):
            raise _No(f"{describe(node)} writes in place between it and the product")


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first
    while node is not last and node.op != "output":
        if node.op in ("call_function", "call_method"):
            yield node
        node = node.next
