"""Zeros that move: views, permutes, slices, concatenation, and what a scatter puts in their place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from sparsec.facts import ActFact
from sparsec.passes.graph import value_of
from sparsec.passes.profile.call import (
    POSITIVE,
    TOP,
    Call,
    Transfer,
    moved,
    number,
    shape_of,
    unknown_share,
    unpatterned,
    word_of,
    words,
)
from sparsec.passes.profile.select import from_topk

Shape = tuple[int | str, ...]


def _reshaped(call: Call) -> ActFact:
    """All values in the same order: groups of the last dimension stay groups where sizes divide."""
    fact = call.of(call.input)
    if not fact.zeros:
        return fact
    old, new = shape_of(call.input), shape_of(call.node)
    if old is None or new is None or not old or not new:
        return moved(call, unpatterned(fact))
    return moved(call, _regrouped(fact, old[-1], new[-1]))


def _regrouped(fact: ActFact, old: int | str, new: int | str) -> ActFact:
    kind, _, rest = fact.pattern.partition(":")
    if old == new or not kind:
        return fact
    if not isinstance(old, int) or not isinstance(new, int) or kind == "channels":
        return unpatterned(fact)
    n, m = (int(rest), old) if kind == "topk" else map(int, rest.split(":"))
    if new == m:
        return replace(fact, pattern=f"topk:{n}", origin="top-k")
    if new % m:
        return unpatterned(fact)
    return replace(fact, pattern=f"nm:{n}:{m}", origin=f"{n}:{m} of activations")


def _permuted(call: Call) -> ActFact:
    """Patterns are of the last dimension and stay with it."""
    fact = call.of(call.input)
    if not fact.pattern:
        return moved(call, fact)
    value = value_of(call.input)
    dims = _order(call, value.dim()) if value is not None else ()
    return moved(call, fact if dims and dims[-1] == len(dims) - 1 else unpatterned(fact))


def _order(call: Call, rank: int) -> list[int]:
    """Where each dimension of the result comes from; [] where it is not known."""
    word, args = word_of(call.node), list(call.node.args[1:])
    order = list(range(rank))
    if word == "permute":
        dims: Any = call.node.kwargs.get("dims", args[0] if args and isinstance(args[0], (tuple, list)) else args)
        return [d % rank for d in dims] if all(isinstance(d, int) for d in dims) else []
    if word == "t":
        return order[::-1]
    a, b = call.arg(1, "dim0"), call.arg(2, "dim1")
    if not isinstance(a, int) or not isinstance(b, int):
        return []
    order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return order


def _rows(call: Call, keeps_last: bool = True) -> ActFact:
    """Some whole rows, some of them more than once: what holds of each row holds still, a share of all may not."""
    fact = call.of(call.input)
    old, new = shape_of(call.input), shape_of(call.node)
    whole = keeps_last and old and new and old[-1] == new[-1]
    return moved(call, fact if whole and fact.pattern else unknown_share(fact))


def _along(index: int, name: str = "dim", default: int = 0) -> Transfer:
    """Rows of one dimension, named by an argument."""

    def along(call: Call) -> ActFact:
        return _rows(call, not _is_last(call.input, call.arg(index, name, default)))

    return along


def _is_last(value: Any, dim: Any) -> bool:
    found = value_of(value)
    return found is None or not isinstance(dim, int) or not found.dim() or dim % found.dim() == found.dim() - 1


def _parts(index: int) -> Transfer:
    """``chunk``, ``split``: what is known of each of the results."""

    def parts(call: Call) -> ActFact:
        fact = call.of(call.input)
        last = _is_last(call.input, call.arg(index, "dim", 0))
        return unknown_share(fact) if last or not fact.pattern else fact

    return parts


def _getitem(call: Call) -> ActFact:
    source, index = call.node.args[0], call.node.args[1]
    value = value_of(source)
    if value is not None:
        return _rows(call, _rows_only(index, value.dim()))
    if isinstance(source, Node) and word_of(source) in _PARTS:
        return moved(call, call.of(source))
    if isinstance(source, Node) and word_of(source) in ("topk", "sort", "max", "kthvalue") and index == 0:
        return POSITIVE if call.of(source.args[0]).nonnegative else TOP
    return TOP


def _getattr(call: Call) -> ActFact:
    if call.node.args[1] in ("T", "mT"):
        return moved(call, unpatterned(call.of(call.node.args[0])))
    return TOP


def _rows_only(index: Any, rank: int) -> bool:
    """Whether an index leaves the last dimension whole and in its place."""
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    taken = 0
    for part in parts:
        found = value_of(part)
        if part is not None and part is not ...:
            taken += found.dim() if found is not None and str(found.dtype) == "torch.bool" else 1
    if ... in [p for p in parts if not isinstance(p, Node)] or taken >= rank:
        return parts[-1] is ... or (isinstance(parts[-1], slice) and parts[-1] == slice(None))
    return True


def _cat(call: Call) -> ActFact:
    """Zeros are known only where all parts have some."""
    parts = call.arg(0, "tensors")
    if not isinstance(parts, (tuple, list)) or not parts:
        return TOP
    together = functools.reduce(ActFact.join, map(call.of, parts))
    if _is_last(parts[0], call.arg(1, "dim", 0)) and not _same_groups(parts, together):
        together = unpatterned(together)
    return moved(call, together)


def _same_groups(parts: Sequence[Any], fact: ActFact) -> bool:
    """Whether a pattern within rows goes on over what stands beside it."""
    if fact.pattern == "channels":
        return True
    kind, _, rest = fact.pattern.partition(":")
    lasts = [shape[-1] for part in parts if (shape := shape_of(part))]
    return kind == "nm" and all(isinstance(k, int) and k % int(rest.split(":")[1]) == 0 for k in lasts)


def _stack(call: Call) -> ActFact:
    parts = call.arg(0, "tensors")
    if not isinstance(parts, (tuple, list)) or not parts:
        return TOP
    together = functools.reduce(ActFact.join, map(call.of, parts))
    return moved(call, unpatterned(together) if _is_last(call.node, call.arg(1, "dim", 0)) else together)


def _scattered(call: Call) -> ActFact:
    """Zeros with something at the places of an index: at most as many in each row as it has."""
    base, dim, index = call.of(call.input), call.arg(1, "dim"), call.arg(2, "index")
    source = call.arg(3, "src", call.node.kwargs.get("value"))
    shape, places = shape_of(call.node), shape_of(index)
    if base.rate != 1.0 or shape is None or not places or not _is_last(call.node, dim):
        return TOP
    value = number(source)
    positive = value >= 0 if value is not None else call.of(source).nonnegative
    origin = "top-k" if from_topk(index) else "scatter"
    kept, size = places[-1], shape[-1]
    if not isinstance(kept, int):
        return ActFact("likely", origin, call.name, nonnegative=positive)
    rate = max(1.0 - kept / size, 0.0) if isinstance(size, int) and size else None
    if rate == 0.0:
        return POSITIVE if positive else TOP
    return ActFact("exact", origin, call.name, f"topk:{kept}", rate, positive)


_PARTS = {"chunk": _parts(2), "split": _parts(2), "tensor_split": _parts(2), "unbind": _parts(1)}

SHAPES: dict[str, Transfer] = {
    **dict.fromkeys(words("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as"), _reshaped),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t"), _permuted),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _rows),
    **dict.fromkeys(("narrow", "select", "index_select"), _along(1)),
    "repeat_interleave": _along(2),
    "flip": lambda call: moved(call, unpatterned(call.of(call.input))),
    "roll": lambda call: moved(call, unpatterned(call.of(call.input))),
    **_PARTS,
    "getitem": _getitem,
    "getattr": _getattr,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    **dict.fromkeys(("scatter", "scatter_add"), _scattered),
}
