"""What each operation does to what is known of zeros: one table, name -> function. A new activation is one line.

Names are those of torch's functions, methods and Python's operators, without underscores; an operation without a line
gives ``top``. Every function states what holds for finite values (see ``activations``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sparsec.compat import is_fake
from sparsec.facts import ActFact
from sparsec.passes.graph import fqn
from sparsec.passes.profile.call import POSITIVE, TOP, Call, Transfer, is_bool, number, peeled, shape_of, word_of, words
from sparsec.passes.profile.select import SELECTIONS, positive_part
from sparsec.passes.profile.shapes import SHAPES

__all__ = ["TABLE", "TOP", "Call", "transferred"]


def transferred(call: Call) -> ActFact:
    """What is known of the result of an operation, or of an input of the graph."""
    if call.node.op == "placeholder":
        fact = _stored(call)
    else:
        function = TABLE.get(word_of(call.node))
        fact = function(call) if function else TOP
    if is_bool(call.node) and not fact.zeros:  # what selects something else; a predictor's answer
        return ActFact("likely", "mask", call.name, nonnegative=True)
    return fact.settled()


def _stored(call: Call) -> ActFact:
    """A stored vector with zeros in it is a mask of channels. Its values are those of the module at hand."""
    value: Any = call.view.examples.get(call.node)
    if not call.view.stored(call.node) or not _readable(value):
        return TOP
    zero = 1.0 - int(torch.count_nonzero(value)) / value.numel()
    return ActFact("exact", "stored mask", call.name, "channels", zero) if zero else TOP


def _readable(value: Any) -> bool:
    """Whether it is a vector, in its last dimension, of plain numbers that are at hand."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and not is_fake(value)
    if not plain or value.device.type == "meta" or value.layout != torch.strided or value.dtype not in _NUMBERS:
        return False
    return bool(value.dim() > 0 and value.numel() == value.shape[-1] > 0)


_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float32, torch.float64)  # fmt: skip


def _keeps(sign: bool = True, positive: bool = False) -> Transfer:
    """f(0) = 0. ``sign``: what is not negative stays so; ``positive``: nothing is negative afterwards."""
    return lambda call: replace(call.x, nonnegative=positive or (sign and call.x.nonnegative))


def _positive(call: Call) -> ActFact:
    """Not negative; zeros do not stay."""
    return POSITIVE


def _cuts(origin: str, positive: bool) -> Transfer:
    """Zero for what is negative enough: of values that are not negative it makes no zeros."""

    def cut(call: Call) -> ActFact:
        x = call.x
        return replace(x, nonnegative=True) if x.nonnegative else made(call, origin, positive)

    return cut


def made(call: Call, origin: str, nonnegative: bool) -> ActFact:
    """New zeros beside those of the first argument, which stay."""
    x = call.x
    if x.state == "exact":
        return replace(x, node=call.name, nonnegative=nonnegative)
    return ActFact("likely", origin, call.name, nonnegative=nonnegative)


def _hardsigmoid(call: Call) -> ActFact:
    return POSITIVE if call.x.nonnegative else ActFact("likely", "hardsigmoid", call.name, nonnegative=True)


def _shrink(origin: str) -> Transfer:
    return lambda call: made(call, origin, call.x.nonnegative)


def _clamp(low: tuple[int, str, Any] | None, high: tuple[int, str, Any] | None) -> Transfer:
    """``low``, ``high``: where the bounds are among the arguments, and what they are by default."""

    def clamp(call: Call) -> ActFact:
        bounds = [call.arg(*place) if place else None for place in (low, high)]
        known = [number(b) for b in bounds]
        if any(b is not None and k is None for b, k in zip(bounds, known, strict=True)):
            return TOP
        least = -math.inf if known[0] is None else known[0]
        most = math.inf if known[1] is None else known[1]
        if least == 0 <= most:
            return _cuts("relu" if most == math.inf else "clamp", True)(call)
        if least < 0 == most:
            return made(call, "clamp", False)
        if least <= 0 <= most:
            return call.x
        return POSITIVE if 0 < least <= most else TOP

    return clamp


def _threshold(call: Call) -> ActFact:
    """x where x > t, else a value (FATReLU, Kurtz et al., 2020, where that is 0)."""
    t, other = number(call.arg(1, "threshold")), number(call.arg(2, "value"))
    if t is None or other is None:
        return TOP
    if other:
        return POSITIVE if other > 0 and t >= 0 else TOP
    if call.x.nonnegative and t < 0:
        return call.x
    return made(call, "threshold" if t else "relu", t >= 0 or call.x.nonnegative)


def _dropout(call: Call) -> ActFact:
    if call.arg(2, "training", call.arg(2, "train", True)) is False or number(call.arg(1, "p", 0.5)) == 0:
        return call.x
    return made(call, "dropout", call.x.nonnegative)


def _alpha_dropout(call: Call) -> ActFact:
    return call.x if call.arg(2, "training", False) is False else TOP


def _product(call: Call) -> ActFact:
    """Zero where a factor is: a gated MLP, a mask."""
    a, b = call.input, call.arg(1, "other")
    if a is b:
        return _power_of(call.x, 2.0)
    for factor, c in ((a, number(b)), (b, number(a))):
        if c is not None:
            fact = call.spread(factor)
            return replace(fact, nonnegative=c > 0 and fact.nonnegative) if c and math.isfinite(c) else TOP
    fa, fb = call.spread(a), call.spread(b)
    positive = fa.nonnegative and fb.nonnegative
    for mask, other in ((a, b), (b, a)):
        if (found := positive_part(mask, other)) is not None:
            return replace(made(call, found[0], positive or found[1]), node=call.name)
    best = fa.meet(fb)
    factor, other = (a, b) if fa.zeros and best.node == fa.node else (b, a)
    scaled = (shape_of(other) or (1,))[-1] == 1  # one number for a whole row is no gated value
    return replace(best, origin=best.origin if scaled else _product_origin(best, factor), nonnegative=positive)


def _product_origin(fact: ActFact, factor: Any) -> str:
    if not fact.zeros or fact.origin.startswith("product with") or is_bool(peeled(factor)):
        return fact.origin
    if "mask" in fact.origin:
        return fact.origin
    return f"product with {fact.origin}{_layer_before(factor)}"


def _layer_before(factor: Any) -> str:
    """``(gate_proj)``: the linear whose result the zeros are made from, a few operations back."""
    node = factor
    for _ in range(8):
        if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
            return ""
        word = word_of(node)
        if word in ("linear", "matmul", "addmm", "conv2d", "conv1d"):
            weight = next((n for n in node.all_input_nodes[::-1] if n.op == "placeholder"), None)
            return f"({fqn(node).rpartition('.')[2]})" if weight is not None else ""
        inputs = node.all_input_nodes
        kept = node.args[1] if word == "where" and len(node.args) > 1 else None
        node = kept if isinstance(kept, Node) else next(iter(inputs), None)
    return ""


def _division(call: Call) -> ActFact:
    a, b = call.input, call.arg(1, "other")
    fact, divisor, c = call.spread(a), call.of(b), number(b)
    positive = c > 0 if c is not None else divisor.nonnegative
    if c is not None and (not c or math.isnan(c)):
        return TOP
    sign = fact.nonnegative if isinstance(a, Node) else (number(a) or -1.0) > 0
    return replace(fact, nonnegative=sign and positive)


def _power(call: Call) -> ActFact:
    exponent = number(call.arg(1, "exponent"))
    if isinstance(call.input, Node):
        return _power_of(call.x, exponent) if exponent is not None and exponent > 0 else TOP
    return POSITIVE if (number(call.input) or -1.0) > 0 else TOP


def _power_of(x: ActFact, exponent: float) -> ActFact:
    """Zero where x is. ReLU^2 (So et al., 2021) is named."""
    even_or_root = exponent % 2 == 0 or exponent != int(exponent)
    origin = f"relu^{exponent:g}" if x.origin == "relu" and exponent != 1 else x.origin
    return replace(x, nonnegative=x.nonnegative or even_or_root, origin=origin)


def _sum(negative: bool) -> Transfer:
    """Zero only where both are, which is known where both have the zeros of one node."""

    def add(call: Call) -> ActFact:
        a, b = call.input, call.arg(1, "other")
        if isinstance(a, Node) and all_zero(call.of(b)):
            return call.x
        if isinstance(b, Node) and all_zero(call.of(a)) and not negative:
            return call.spread(b)
        fa, fb = call.spread(a), call.spread(b)
        scaled = "alpha" in call.node.kwargs or negative
        low = [number(side) for side in (a, b)]
        positive = all(f.nonnegative or (c is not None and c >= 0) for f, c in zip((fa, fb), low, strict=True))
        nonnegative = positive and not scaled
        if fa.zeros and fb.zeros and fa.node == fb.node:
            return replace(fa, nonnegative=nonnegative)
        return POSITIVE if nonnegative else TOP

    return add


def _largest(call: Call) -> ActFact:
    """The larger of two tensors."""
    a, b = call.input, call.arg(1, "other")
    for x, other in ((a, b), (b, a)):
        if isinstance(x, Node) and all_zero(call.of(other)):
            fact = call.spread(x)
            if fact.nonnegative:
                return fact
            return ActFact("likely", "relu", call.name, nonnegative=True)
    fa, fb = call.spread(a), call.spread(b)
    positive = fa.nonnegative or fb.nonnegative
    if fa.zeros and fb.zeros and fa.node == fb.node:
        return replace(fa, nonnegative=positive)
    return POSITIVE if positive else TOP


def all_zero(fact: ActFact) -> bool:
    return fact.rate == 1.0


def _zeros(call: Call) -> ActFact:
    return ActFact("exact", "zeros", call.name, "", 1.0, True)


def _full(index: int) -> Transfer:
    def full(call: Call) -> ActFact:
        value = number(call.arg(index, "fill_value"))
        if value is None or not value:
            return _zeros(call) if value == 0 else TOP
        return POSITIVE if value > 0 else TOP

    return full


def _softmax(call: Call) -> ActFact:
    """Zero where the input is -inf."""
    source = peeled(call.input)
    if isinstance(source, Node) and word_of(source) == "masked_fill":
        filled = source.args[2] if len(source.args) > 2 else source.kwargs.get("value")
        if number(filled) == -math.inf:
            return ActFact("likely", "masked softmax", call.name, nonnegative=True)
    return POSITIVE


def _reduced(call: Call) -> ActFact:
    return POSITIVE if call.of(call.input).nonnegative else TOP


def _nan_to_num(call: Call) -> ActFact:
    return call.x if len(call.node.args) == 1 and not call.node.kwargs else TOP


def _named(names: str, function: Transfer) -> dict[str, Transfer]:
    return dict.fromkeys(words(names), function)


TABLE: dict[str, Transfer] = {
    # activations that make zeros
    "relu": _cuts("relu", True),
    "relu6": _cuts("relu6", True),
    "hardtanh": _clamp((1, "min_val", -1.0), (2, "max_val", 1.0)),
    "threshold": _threshold,
    "hardswish": _cuts("hardswish", False),
    "hardsigmoid": _hardsigmoid,
    "hardshrink": _shrink("hardshrink"),
    "softshrink": _shrink("softshrink"),
    # bounds
    **_named("clamp clip", _clamp((1, "min", None), (2, "max", None))),
    "clamp_min": _clamp((1, "min", None), None),
    "clamp_max": _clamp(None, (1, "max", None)),
    "maximum": _largest,
    # f(0) = 0
    **_named(
        "tanh sinh asinh atan arctan erf expm1 log1p sign sgn trunc fix round floor ceil softsign leaky_relu prelu elu "
        "celu selu silu gelu mish to float double half bfloat16 type type_as int long contiguous clone detach "
        "positive bool",
        _keeps(),
    ),
    **_named("neg negative sin tan frac tanhshrink", _keeps(sign=False)),
    **_named("abs absolute sqrt", _keeps(positive=True)),
    "square": lambda call: _power_of(call.x, 2.0),
    "nan_to_num": _nan_to_num,
    # not negative
    **_named("sigmoid exp exp2 softplus rsqrt norm", _positive),
    "softmax": _softmax,
    **_named("sum mean amax amin prod adaptive_avg_pool2d avg_pool2d adaptive_avg_pool1d avg_pool1d", _reduced),
    # arithmetic
    **_named("mul multiply", _product),
    **_named("div truediv divide", _division),
    "pow": _power,
    "add": _sum(negative=False),
    **_named("sub subtract", _sum(negative=True)),
    # constants, chance
    **_named("zeros zeros_like new_zeros", _zeros),
    **_named("full full_like", _full(1)),
    "new_full": _full(2),
    **_named("dropout dropout1d dropout2d dropout3d", _dropout),
    "alpha_dropout": _alpha_dropout,
    **SELECTIONS,
    **SHAPES,
}
