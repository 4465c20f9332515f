"""Zeros that a comparison puts there: ``where``, ``masked_fill``, masks, and what masks are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.fx import Node

from sparsec.facts import ActFact
from sparsec.passes.graph import argument
from sparsec.passes.profile.call import POSITIVE, TOP, Call, Transfer, number, peeled, word_of

_LARGER, _SMALLER = ("gt", "ge", "greater", "greater_equal"), ("lt", "le", "less", "less_equal")
_MEANS: dict[str, Callable[[float, float], bool]] = {
    "gt": operator.gt, "greater": operator.gt, "ge": operator.ge, "greater_equal": operator.ge, "lt": operator.lt,
    "less": operator.lt, "le": operator.le, "less_equal": operator.le, "ne": operator.ne, "not_equal": operator.ne,
    "eq": operator.eq,
}  # fmt: skip
_FAR = 6  # operations back in which a top-k is looked for


def positive_part(mask: Any, kept: Any) -> tuple[str, bool] | None:
    """Where ``mask`` is ``kept > t``: what to call the zeros of the rest, and whether nothing kept is negative."""
    return _side(mask, kept, _LARGER)


def _side(mask: Any, kept: Any, words: tuple[str, ...]) -> tuple[str, bool] | None:
    mask = peeled(mask)
    if not isinstance(mask, Node) or not isinstance(kept, Node) or word_of(mask) not in words:
        return None
    t = number(argument(mask, 1, "other"))
    if argument(mask, 0, "input") is not kept or t is None:
        return None
    return ("threshold" if t else "relu"), t >= 0


def _compared(call: Call) -> ActFact:
    """False where the condition does not hold; zeros stay False where zero does not meet it."""
    word, x = word_of(call.node), call.x
    t = number(call.arg(1, "other"))
    if t is not None and x.zeros and not _holds(word, t):
        return replace(x, nonnegative=True)
    return ActFact("likely", _word(call), call.name, nonnegative=True)


def _holds(word: str, t: float) -> bool:
    """Whether ``0 word t``."""
    return bool(_MEANS[word](0.0, t))


def _word(call: Call) -> str:
    left, right = peeled(call.input), call.arg(1, "other")
    if not isinstance(left, Node) or word_of(left) not in ("abs", "absolute"):
        return "mask"
    return "top-k" if from_topk(right) else "threshold"


def from_topk(value: Any) -> bool:
    """Whether a value is what ``topk`` or ``kthvalue`` gave, in another shape perhaps."""
    for _ in range(_FAR):
        if not isinstance(value, Node) or value.op not in ("call_function", "call_method"):
            return False
        if word_of(value) in ("topk", "kthvalue"):
            return True
        if word_of(value) not in ("getitem", "getattr", "unsqueeze", "view", "reshape", "to", "expand", "select"):
            return False
        value = value.args[0] if value.args else None
    return False


def _not(call: Call) -> ActFact:
    return ActFact("likely", call.x.origin or "mask", call.name, nonnegative=True)


def _and(call: Call) -> ActFact:
    return call.x.meet(call.spread(call.arg(1, "other")))


def _or(call: Call) -> ActFact:
    a, b = peeled(call.input), peeled(call.arg(1, "other"))
    fa, fb = call.spread(a), call.spread(b)
    if fa.zeros and fa.node == fb.node:
        return fa
    words = {word_of(side)[:1] for side in (a, b) if isinstance(side, Node)}
    if words == {"g", "l"} and a.args[:1] == b.args[:1]:  # x > t or x < -t
        return ActFact("likely", "threshold", call.name, nonnegative=True)
    return ActFact("likely", fa.origin if fa.origin == fb.origin else "mask", call.name, nonnegative=True)


def _where(call: Call) -> ActFact:
    args = list(call.node.args)
    if call.node.op == "call_method" and len(args) == 3:
        args = [args[1], args[0], args[2]]  # x.where(condition, other)
    if len(args) != 3:
        return TOP
    return selected(call, *args)


def _masked_fill(call: Call) -> ActFact:
    return selected(call, call.arg(1, "mask"), call.arg(2, "value"), call.input)


def selected(call: Call, condition: Any, yes: Any, no: Any) -> ActFact:
    """``yes`` where the condition holds, else ``no``."""
    mask = call.spread(condition)
    if _is_zero(call, no) and _is_zero(call, yes):
        return ActFact("exact", "zeros", call.name, "", 1.0, True)
    if _is_zero(call, no):
        part = _side(condition, yes, _LARGER)
        made = replace(mask, origin=part[0] if part else mask.origin or "mask")
        return _zeroed(call, made, yes, part)
    if _is_zero(call, yes):
        part = _side(condition, no, _SMALLER)
        made = ActFact("likely", part[0] if part else mask.origin or "mask")
        return _zeroed(call, made, no, part)
    sides = [(call.spread(side), number(side)) for side in (yes, no)]
    positive = all(fact.nonnegative or (c is not None and c >= 0) for fact, c in sides)
    (a, _), (b, _) = sides
    if a.zeros and b.zeros and a.node == b.node:
        return replace(a, nonnegative=positive)
    return POSITIVE if positive else TOP


def _zeroed(call: Call, made: ActFact, kept: Any, part: tuple[str, bool] | None) -> ActFact:
    x = call.spread(kept)
    value = number(kept)
    positive = x.nonnegative or (part is not None and part[1]) or (value is not None and value >= 0)
    made = made if made.zeros else ActFact("likely", made.origin)
    return replace(made.meet(x), node=call.name, nonnegative=positive)


def _is_zero(call: Call, value: Any) -> bool:
    return number(value) == 0 or call.of(value).rate == 1.0


SELECTIONS: dict[str, Transfer] = {
    **dict.fromkeys((*_LARGER, *_SMALLER, "eq", "ne", "not_equal"), _compared),
    **dict.fromkeys(("logical_not", "bitwise_not", "invert"), _not),
    **dict.fromkeys(("logical_and", "bitwise_and", "and"), _and),
    **dict.fromkeys(("logical_or", "bitwise_or", "or"), _or),
    "where": _where,
    "masked_fill": _masked_fill,
}
