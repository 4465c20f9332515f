"""Zeros of activations: every transfer function against values, whole graphs against eager, and real models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Interpreter, Node

from sparsec import compat, pipeline
from sparsec.facts import ACT_STATES, ActFact, Site
from sparsec.options import Options
from sparsec.passes.graph import View
from sparsec.passes.profile.activations import zeros
from sparsec.passes.profile.call import word_of, words
from sparsec.passes.profile.transfer import TABLE
from sparsec.pipeline import Compilation

K = 16


@dataclass
class Seen:
    """A captured graph with its facts and sites, and the inputs it was captured with."""

    gm: torch.fx.GraphModule
    inputs: list[Any]
    facts: dict[Node, ActFact]
    sites: list[Site]

    @property
    def out(self) -> ActFact:
        """The fact of the first result."""
        (result,) = next(n for n in self.gm.graph.nodes if n.op == "output").args
        return self.facts[result[0]]


def seen(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Seen:
    found: list[Seen] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        c = pipeline.run(Compilation(gm, inputs, Options()), stop_after="capture")
        with compat.real_tensors():
            facts = dict(zeros(gm.graph, View.of(gm, inputs)))
        found.append(Seen(gm, inputs, facts, [site for site, _ in c.sites]))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), compat.looking_only():
        torch.compile(compat.own_frame(model), backend=look)(*args, **kwargs)
    assert len(found) == 1, f"{len(found)} graphs"
    return found[0]


class Watched(Interpreter):
    """Runs a graph and keeps a copy of every value as it was made. ``fill``: what stands where nobody reads."""

    def __init__(self, of: Seen, fill: float | None = None, known: dict[Node, Any] | None = None) -> None:
        super().__init__(of.gm)
        self.values: dict[Node, Any] = {}
        self.live: dict[Node, Any] = {}  # the same tensors as the graph's, so what writes in place is seen
        self.known = known or {}
        self.fill = fill
        self.masks = {site.node: site.needed for site in of.sites if site.needed}
        self.named = {node.name: node for node in of.gm.graph.nodes}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.fill is not None and n.name in self.masks:
            mask = self.named[self.masks[n.name]]
            said = self.live[mask] if mask in self.live else self.known[mask]
            value = torch.where(said != 0, value, torch.full_like(value, self.fill))
        self.live[n] = value
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def watched(of: Seen, fill: float | None = None, known: dict[Node, Any] | None = None) -> tuple[Any, dict[Node, Any]]:
    run = Watched(of, fill, known)
    with torch.no_grad():
        copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in of.inputs]
        return run.run(*copies), run.values


def check_fact(fact: ActFact, value: torch.Tensor, values: dict[str, Any], what: str) -> None:
    """Everything that a fact claims, against the value."""
    zero = value == 0
    if fact.nonnegative:
        assert not bool((value < 0).any()), what
    assert (fact.state == "nonnegative") <= fact.nonnegative, what
    if not fact.zeros:
        assert (fact.node, fact.pattern, fact.rate) == ("", "", None), what
        return
    assert fact.origin, what
    maker = values[fact.node]
    assert maker.shape == value.shape, what
    assert bool(zero[maker == 0].all()), what
    assert (fact.state == "exact") == bool(fact.pattern or fact.rate is not None), what
    if fact.rate is not None and value.numel():
        assert float(zero.double().mean()) >= fact.rate - 1e-9, what
    kind, _, rest = fact.pattern.partition(":")
    if kind == "topk":
        assert int((~zero).sum(-1).max()) <= int(rest), what
    if kind == "nm":
        n, m = map(int, rest.split(":"))
        assert int((~zero).reshape(-1, m).sum(-1).max()) <= n, what
    if kind == "channels":
        rows = zero.reshape(-1, zero.shape[-1])
        assert float(rows.all(0).double().mean()) >= (fact.rate or 0) - 1e-9, what


def check(of: Seen) -> dict[Node, Any]:
    """Every fact of every node against its value, and every result with and without what nobody reads."""
    expected, values = watched(of)
    named = {node.name: value for node, value in values.items()}
    for node, fact in of.facts.items():
        if isinstance(values.get(node), torch.Tensor):
            check_fact(fact, values[node], named, f"{node.format_node()}: {fact}")
    if any(site.needed for site in of.sites):
        for fill in (0.0, 7.0):
            found, _ = watched(of, fill, values)
            for a, b in zip(expected, found, strict=True):
                assert torch.equal(a, b), [(s.node, s.needed) for s in of.sites]
    return values


# ------------------------------------------------------------------------------------------------ the order of facts

FACTS = st.builds(
    ActFact,
    state=st.sampled_from(["likely", "exact"]),
    origin=st.sampled_from(["relu", "top-k"]),
    node=st.sampled_from(["a", "b"]),
    pattern=st.sampled_from(["topk:4", "nm:2:4"]),
    rate=st.sampled_from([0.25, 0.5]),
    nonnegative=st.booleans(),
) | st.builds(lambda positive: ActFact(nonnegative=positive).settled(), st.booleans())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a=FACTS, b=FACTS)
def test_meet_knows_as_much_as_either_and_join_no_more_than_both(a: ActFact, b: ActFact) -> None:
    both, either = a.meet(b), a.join(b)
    assert both.depth >= max(a.depth, b.depth)
    assert either.depth <= min(a.depth, b.depth) or a.zeros == b.zeros
    assert either.zeros == (a.zeros and b.zeros)
    assert both.nonnegative == (a.nonnegative or b.nonnegative)
    assert either.nonnegative == (a.nonnegative and b.nonnegative)
    assert a.meet(a) == a
    assert (b.join(a).state, b.join(a).rate) == (either.state, either.rate)


def test_the_states_are_in_the_order_top_nonnegative_likely_exact() -> None:
    assert [ActFact(state).depth for state in ACT_STATES] == [0, 1, 2, 3]
    assert [ActFact(state).zeros for state in ACT_STATES] == [False, False, True, True]
    assert ActFact("likely", "relu").meet(ActFact("exact", "top-k", pattern="topk:4")).origin == "top-k"


# --------------------------------------------------------------------------------------------- one case an operation

MASK = torch.tensor([1.0, 0, 1, 1] * (K // 4))


def topk(x: torch.Tensor, k: int = 4) -> torch.Tensor:
    _, places = x.abs().topk(k, -1)
    return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))


def nm(x: torch.Tensor, n: int = 2, m: int = 4) -> torch.Tensor:
    return topk(x.view(*x.shape[:-1], K // m, m), n).reshape(x.shape)


def int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1, scale)
    return (x / scale).round().clamp(-127, 127) * scale


Case = tuple[Callable[..., torch.Tensor], str, str, str]  # function of x and y, state, origin, pattern
R = F.relu
CASES: dict[str, Case] = {
    "relu": (lambda x, y: R(x), "likely", "relu", ""),
    "relu method": (lambda x, y: x.relu(), "likely", "relu", ""),
    "torch.relu": (lambda x, y: torch.relu(x), "likely", "relu", ""),
    "relu in place": (lambda x, y: F.relu(x + y, inplace=True), "likely", "relu", ""),
    "relu_ in place": (lambda x, y: (x + y).relu_(), "likely", "relu", ""),
    "relu of what is not negative": (lambda x, y: R(x.sigmoid()), "nonnegative", "", ""),
    "relu6": (lambda x, y: F.relu6(x), "likely", "relu6", ""),
    "hardtanh from 0": (lambda x, y: F.hardtanh(x, 0.0, 1.0), "likely", "clamp", ""),
    "hardtanh": (lambda x, y: F.hardtanh(x), "top", "", ""),
    "hardtanh of relu": (lambda x, y: F.hardtanh(R(x)), "likely", "relu", ""),
    "threshold": (lambda x, y: F.threshold(x, 0.5, 0.0), "likely", "threshold", ""),
    "threshold below zero": (lambda x, y: F.threshold(x, -0.5, 0.0), "likely", "threshold", ""),
    "threshold of relu below zero": (lambda x, y: F.threshold(R(x), -0.5, 0.0), "likely", "relu", ""),
    "threshold with a value": (lambda x, y: F.threshold(x, 0.5, 0.1), "nonnegative", "", ""),
    "hardswish": (lambda x, y: F.hardswish(4 * x), "likely", "hardswish", ""),
    "hardswish of relu": (lambda x, y: F.hardswish(R(x)), "likely", "relu", ""),
    "hardsigmoid": (lambda x, y: F.hardsigmoid(4 * x), "likely", "hardsigmoid", ""),
    "hardsigmoid of relu": (lambda x, y: F.hardsigmoid(R(x)), "nonnegative", "", ""),
    "hardshrink": (lambda x, y: F.hardshrink(x, 0.5), "likely", "hardshrink", ""),
    "softshrink": (lambda x, y: F.softshrink(x, 0.5), "likely", "softshrink", ""),
    "clamp from 0": (lambda x, y: x.clamp(min=0), "likely", "relu", ""),
    "clamp 0 to 1": (lambda x, y: torch.clip(x, 0, 1), "likely", "clamp", ""),
    "clamp to 0": (lambda x, y: x.clamp(max=0), "likely", "clamp", ""),
    "clamp across 0": (lambda x, y: R(x).clamp(-1, 1), "likely", "relu", ""),
    "clamp above 0": (lambda x, y: R(x).clamp(0.1, 1), "nonnegative", "", ""),
    "clamp with the least above the largest": (lambda x, y: R(x).clamp(1, -1), "top", "", ""),
    "clamp by a tensor": (lambda x, y: torch.clamp(R(x), min=y), "top", "", ""),
    "clamp_min": (lambda x, y: x.clamp_min(0), "likely", "relu", ""),
    "clamp_max": (lambda x, y: R(x).clamp_max(1.0), "likely", "relu", ""),
    "clamp_max below 0": (lambda x, y: R(x).clamp_max(-1.0), "top", "", ""),
    "maximum with zeros": (lambda x, y: torch.maximum(torch.zeros_like(x), x), "likely", "relu", ""),
    "maximum": (lambda x, y: torch.maximum(R(x), y), "nonnegative", "", ""),
    "maximum of the same zeros": (lambda x, y: torch.maximum(h := R(x), h * y), "likely", "relu", ""),
    "silu": (lambda x, y: F.silu(x), "top", "", ""),
    "gelu": (lambda x, y: F.gelu(x, approximate="tanh"), "top", "", ""),
    "silu of top-k": (lambda x, y: F.silu(topk(x)), "exact", "top-k", "topk:4"),
    "softmax": (lambda x, y: x.softmax(-1), "nonnegative", "", ""),
    "masked softmax": (lambda x, y: x.masked_fill(y > 0, -math.inf).softmax(-1), "likely", "masked softmax", ""),
    "exp": (lambda x, y: torch.exp(R(x)), "nonnegative", "", ""),
    "relu^2 by a product": (lambda x, y: (h := R(x)) * h, "likely", "relu^2", ""),
    "relu^2 by pow": (lambda x, y: torch.pow(R(x), 2), "likely", "relu^2", ""),
    "relu^2 by **": (lambda x, y: R(x) ** 2, "likely", "relu^2", ""),
    "relu^2 by square": (lambda x, y: R(x).square(), "likely", "relu^2", ""),
    "pow below 0": (lambda x, y: (R(x) + 1) ** -1, "top", "", ""),
    "pow of a number": (lambda x, y: 2 ** R(x), "nonnegative", "", ""),
    "abs": (lambda x, y: x.abs(), "nonnegative", "", ""),
    "abs of top-k": (lambda x, y: topk(x).abs(), "exact", "top-k", "topk:4"),
    "neg": (lambda x, y: -R(x), "likely", "relu", ""),
    "sqrt of relu": (lambda x, y: R(x).sqrt(), "likely", "relu", ""),
    "relu of minus relu": (lambda x, y: R(-R(x)), "likely", "relu", ""),
    "product with relu": (lambda x, y: R(x) * y, "likely", "product with relu", ""),
    "product on the other side": (lambda x, y: torch.mul(y, R(x)), "likely", "product with relu", ""),
    "product of products": (lambda x, y: R(x) * y * x, "likely", "product with relu", ""),
    "product with a mask": (lambda x, y: x * (y > 0), "likely", "mask", ""),
    "product with a mask as floats": (lambda x, y: x * (y > 0).float(), "likely", "mask", ""),
    "product with a threshold": (lambda x, y: x * (x.abs() > 0.5), "likely", "threshold", ""),
    "product with its own sign": (lambda x, y: x * (x > 0), "likely", "relu", ""),
    "product with a number": (lambda x, y: 3 * R(x), "likely", "relu", ""),
    "product with 0": (lambda x, y: 0 * R(x), "top", "", ""),
    "product with a negative number": (lambda x, y: R(x) * -3, "likely", "relu", ""),
    "product with a column": (lambda x, y: R(x[..., :1]) * y, "likely", "product with relu", ""),
    "product with top-k": (lambda x, y: topk(x) * y, "exact", "product with top-k", "topk:4"),
    "relu of top-k": (lambda x, y: R(topk(x)), "exact", "top-k", "topk:4"),
    "division": (lambda x, y: R(x) / (y.abs() + 1), "likely", "relu", ""),
    "division by a negative number": (lambda x, y: torch.div(R(x), -2.0), "likely", "relu", ""),
    "division of a number": (lambda x, y: 1 / (R(x) + 1), "nonnegative", "", ""),
    "sum of the same zeros": (lambda x, y: (h := R(x)) + h * y, "likely", "relu", ""),
    "sum of other zeros": (lambda x, y: R(x) + R(y), "nonnegative", "", ""),
    "sum with alpha": (lambda x, y: torch.add(R(x), R(y), alpha=-1), "top", "", ""),
    "sum with a number": (lambda x, y: R(x) + 1, "nonnegative", "", ""),
    "sum with zeros": (lambda x, y: torch.zeros_like(x) + R(x), "likely", "relu", ""),
    "difference of the same zeros": (lambda x, y: (h := R(x)) * y - h, "likely", "product with relu", ""),
    "difference": (lambda x, y: R(x) - R(y), "top", "", ""),
    "where threshold": (lambda x, y: torch.where(x.abs() > 0.5, x, 0), "likely", "threshold", ""),
    "where threshold by channel": (lambda x, y: torch.where(x.abs() > MASK, x, 0.0), "likely", "threshold", ""),
    "where below threshold": (lambda x, y: torch.where(x.abs() <= 0.5, 0, x), "likely", "threshold", ""),
    "where around a mode": (lambda x, y: torch.where((x - 0.1).abs() > 0.5, x - 0.1, 0), "likely", "threshold", ""),
    "where positive": (lambda x, y: torch.where(x > 0, x, 0), "likely", "relu", ""),
    "where above (FATReLU)": (lambda x, y: torch.where(x > 0.3, x, torch.zeros_like(x)), "likely", "threshold", ""),
    "where negative": (lambda x, y: torch.where(x < 0, torch.tensor(0.0), x), "likely", "relu", ""),
    "where method": (lambda x, y: x.where(y > 0, 0), "likely", "mask", ""),
    "where on both sides": (lambda x, y: torch.where((x > 0.5) | (x < -0.5), x, 0), "likely", "threshold", ""),
    "where not": (lambda x, y: torch.where(~(x.abs() > 0.5), 0, x), "likely", "threshold", ""),
    "where top-k value": (
        lambda x, y: torch.where(x.abs() >= x.abs().topk(4, -1).values[..., -1:], x, 0), "likely", "top-k", ""
    ),
    "where of two": (lambda x, y: torch.where(x > 0, R(x), y), "top", "", ""),
    "where of the same zeros": (lambda x, y: torch.where(x > 0, (h := R(x)), h * y), "likely", "relu", ""),
    "where of positive ones": (lambda x, y: torch.where(x > 0, R(x), 1.0), "nonnegative", "", ""),
    "where of zeros": (lambda x, y: torch.where(x > 0, torch.zeros_like(x), 0.0), "exact", "zeros", ""),
    "masked_fill": (lambda x, y: x.masked_fill(y > 0, 0), "likely", "mask", ""),
    "masked_fill with 1": (lambda x, y: R(x).masked_fill(y > 0, 1.0), "nonnegative", "", ""),
    "mask of a mask": (lambda x, y: x * ((x > 0) & (y > 0)), "likely", "mask", ""),
    "mask of zeros": (lambda x, y: y * (topk(x) != 0), "exact", "top-k", "topk:4"),
    "mask of scattered places": (
        lambda x, y: y * torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(4, -1).indices, True),
        "exact", "top-k", "topk:4",
    ),
    "mask by logical_and": (lambda x, y: x * torch.logical_and(R(x) > 0, y > 0), "likely", "relu", ""),
    "mask by logical_or": (lambda x, y: x * torch.logical_or(x > 0.5, y > 0), "likely", "mask", ""),
    "dropout in eval": (lambda x, y: F.dropout(R(x), 0.5, False), "likely", "relu", ""),
    "dropout in training": (lambda x, y: F.dropout(x, 0.5, True), "likely", "dropout", ""),
    "dropout of nothing": (lambda x, y: F.dropout(x, 0.0, True), "top", "", ""),
    "alpha dropout in eval": (lambda x, y: F.alpha_dropout(R(x), 0.5, False), "likely", "relu", ""),
    "alpha dropout in training": (lambda x, y: F.alpha_dropout(R(x), 0.5, True), "top", "", ""),
    "cast": (lambda x, y: R(x).to(torch.bfloat16).float(), "likely", "relu", ""),
    "to bool": (lambda x, y: y * topk(x).bool(), "exact", "top-k", "topk:4"),
    "contiguous": (lambda x, y: R(x).contiguous().clone(), "likely", "relu", ""),
    "nan_to_num": (lambda x, y: R(x).nan_to_num(), "likely", "relu", ""),
    "nan_to_num to 1": (lambda x, y: R(x).nan_to_num(1.0), "top", "", ""),
    "sum of all": (lambda x, y: R(x).sum(-1), "nonnegative", "", ""),
    "top-k": (lambda x, y: topk(x), "exact", "top-k", "topk:4"),
    "top-k in place": (
        lambda x, y: torch.zeros_like(x).scatter_(-1, (i := x.topk(4, -1).indices), x.gather(-1, i)),
        "exact", "top-k", "topk:4",
    ),
    "scatter along tokens": (
        lambda x, y: torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, 1.0), "top", "", ""
    ),
    "scatter into values": (lambda x, y: y.scatter(-1, x.topk(2, -1).indices, 1.0), "top", "", ""),
    "scatter everywhere": (lambda x, y: torch.zeros_like(x).scatter(-1, x.argsort(-1), x), "top", "", ""),
    "largest values": (lambda x, y: R(x).topk(4, -1).values, "nonnegative", "", ""),
    "N:M": (lambda x, y: nm(x), "exact", "2:4 of activations", "nm:2:4"),
    "N:M in groups": (lambda x, y: nm(x).view(*x.shape[:-1], K // 4, 4), "exact", "top-k", "topk:2"),
    "N:M in other groups": (lambda x, y: nm(x).view(-1, 2), "exact", "2:4 of activations", ""),
    "N:M in larger groups": (lambda x, y: nm(x).view(-1, 8), "exact", "2:4 of activations", "nm:2:4"),
    "N:M through int8": (lambda x, y: int8(nm(x)), "exact", "2:4 of activations", "nm:2:4"),
    "int8 of relu": (lambda x, y: int8(R(x)), "likely", "relu", ""),
    "flattened": (lambda x, y: topk(x).flatten(0, 1), "exact", "top-k", "topk:4"),
    "unsqueezed": (lambda x, y: topk(x).unsqueeze(1), "exact", "top-k", "topk:4"),
    "transposed": (lambda x, y: topk(x).transpose(1, 2), "exact", "top-k", ""),
    "transposed twice": (lambda x, y: topk(x).transpose(0, 1), "exact", "top-k", "topk:4"),
    "permuted": (lambda x, y: topk(x).permute(1, 0, 2), "exact", "top-k", "topk:4"),
    "permuted by a list": (lambda x, y: topk(x).permute([2, 0, 1]), "exact", "top-k", ""),
    "t": (lambda x, y: topk(x)[0].t(), "exact", "top-k", ""),
    "mT": (lambda x, y: topk(x).mT, "exact", "top-k", ""),
    "some rows": (lambda x, y: topk(x)[:, 1:3], "exact", "top-k", "topk:4"),
    "the last token": (lambda x, y: topk(x)[:, -1, :], "exact", "top-k", "topk:4"),
    "rows by number": (lambda x, y: topk(x)[:, torch.tensor([0, 2])], "exact", "top-k", "topk:4"),
    "half of the channels": (lambda x, y: topk(x)[..., : K // 2], "likely", "top-k", ""),
    "channels by number": (lambda x, y: nm(x)[..., torch.arange(K - 1, -1, -1)], "likely", "2:4 of activations", ""),
    "chunks of tokens": (lambda x, y: topk(x).chunk(2, 1)[0], "exact", "top-k", "topk:4"),
    "chunks of channels": (lambda x, y: topk(x).chunk(2, -1)[1], "likely", "top-k", ""),
    "split": (lambda x, y: R(x).split(2, 1)[0], "likely", "relu", ""),
    "unbound": (lambda x, y: topk(x).unbind(1)[0], "exact", "top-k", "topk:4"),
    "narrow": (lambda x, y: topk(x).narrow(1, 0, 2), "exact", "top-k", "topk:4"),
    "select": (lambda x, y: topk(x).select(1, 0), "exact", "top-k", "topk:4"),
    "repeated": (lambda x, y: topk(x).repeat(1, 2, 1), "exact", "top-k", "topk:4"),
    "repeated tokens": (lambda x, y: topk(x).repeat_interleave(2, dim=1), "exact", "top-k", "topk:4"),
    "repeated channels": (lambda x, y: nm(x).repeat_interleave(2, dim=-1), "likely", "2:4 of activations", ""),
    "expanded": (lambda x, y: topk(x).unsqueeze(0).expand(2, -1, -1, -1), "exact", "top-k", "topk:4"),
    "flipped": (lambda x, y: nm(x).flip(-1), "exact", "2:4 of activations", ""),
    "rolled": (lambda x, y: nm(x).roll(1, -1), "exact", "2:4 of activations", ""),
    "tokens joined": (lambda x, y: torch.cat([topk(x), topk(y)], 1), "exact", "top-k", "topk:4"),
    "channels joined": (lambda x, y: torch.cat([topk(x), topk(y)], -1), "exact", "top-k", ""),
    "groups joined": (lambda x, y: torch.cat([nm(x), nm(y)], -1), "exact", "2:4 of activations", "nm:2:4"),
    "joined with others": (lambda x, y: torch.cat([topk(x), y], 1), "top", "", ""),
    "relu and top-k joined": (lambda x, y: torch.cat([R(x), topk(y)], 1), "likely", "relu or top-k", ""),
    "stacked": (lambda x, y: torch.stack([topk(x), topk(y)]), "exact", "top-k", "topk:4"),
    "stacked last": (lambda x, y: torch.stack([topk(x), topk(y)], -1), "exact", "top-k", ""),
    "full of 0": (lambda x, y: torch.full_like(x, 0.0), "exact", "zeros", ""),
    "full of 1": (lambda x, y: x.new_full((2, K), 1.0), "nonnegative", "", ""),
    "new zeros": (lambda x, y: x.new_zeros(2, K), "exact", "zeros", ""),
    "aten": (lambda x, y: torch.ops.aten.relu.default(x), "likely", "relu", ""),
}  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, K, generator=g), torch.randn(2, 5, K, generator=g)


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_zeros_holds_for_the_values(name: str) -> None:
    function, state, origin, pattern = CASES[name]
    of = seen(function, *inputs())
    assert (of.out.state, of.out.origin, of.out.pattern) == (state, origin, pattern)
    check(of)


# Functions of one number that keep zero (True), or whose results are not negative (False).
PLAIN: dict[str, bool] = {
    **dict.fromkeys(
        words(
            "tanh sinh asinh atan arctan erf expm1 log1p sign sgn trunc fix round floor ceil frac sin tan neg negative "
            "abs absolute sqrt square positive double half long int bfloat16 float detach type"
        ),
        True,
    ),
    **dict.fromkeys(words("sigmoid exp exp2 rsqrt"), False),
}
FUNCTIONS = words("softsign leaky_relu elu celu selu silu gelu mish tanhshrink softplus")


@pytest.mark.parametrize("name", [*PLAIN, *FUNCTIONS])
def test_functions_of_one_number_do_what_the_table_says(name: str) -> None:
    if name in FUNCTIONS:
        function, keeps = getattr(F, name), name != "softplus"
    else:
        arguments = {"type": (torch.float64,)}.get(name, ())
        function, keeps = (lambda x: getattr(x, name)(*arguments)), PLAIN[name]
    for before in (torch.relu, topk):
        of = seen(lambda x, y, before=before: function(before(x)), *inputs())
        assert of.out.zeros == keeps
        check(of)
    assert (float(function(torch.zeros(1))) == 0) == keeps


def test_every_operation_of_the_table_has_a_case() -> None:
    cases = [function for function, *_ in CASES.values()]
    used = {word_of(n) for function in cases for n in seen(function, *inputs()).gm.graph.nodes}
    assert set(TABLE) - used - {*SYNONYMS, *PLAIN, *FUNCTIONS} == set()


SYNONYMS: dict[str, tuple[Callable[..., torch.Tensor], str, str]] = {
    "subtract": (lambda x, y: torch.subtract(R(x), R(y)), "top", ""),
    "multiply": (lambda x, y: torch.multiply(R(x), y), "likely", ""),
    "divide": (lambda x, y: torch.divide(R(x), 2.0), "likely", ""),
    "greater": (lambda x, y: y * torch.greater(topk(x).abs(), 0.0), "exact", "topk:4"),
    "greater_equal": (lambda x, y: y * torch.greater_equal(topk(x), 0.1), "exact", "topk:4"),
    "less": (lambda x, y: y * torch.less(topk(x), -0.1), "exact", "topk:4"),
    "less_equal": (lambda x, y: y * torch.less_equal(topk(x), 0.1), "likely", ""),
    "lt": (lambda x, y: y * (topk(x) < 0), "exact", "topk:4"),
    "not_equal": (lambda x, y: y * torch.not_equal(topk(x), 0), "exact", "topk:4"),
    "eq": (lambda x, y: y * (topk(x) == 0), "likely", ""),
    "bitwise_and": (lambda x, y: y * torch.bitwise_and(topk(x) != 0, x > 0), "exact", "topk:4"),
    "bitwise_or": (lambda x, y: y * torch.bitwise_or(topk(x) != 0, x > 0), "likely", ""),
    "logical_not": (lambda x, y: y * torch.logical_not(x > 0), "likely", ""),
    "bitwise_not": (lambda x, y: y * torch.bitwise_not(x > 0), "likely", ""),
    "concat": (lambda x, y: torch.concat([topk(x), topk(y)], 0), "exact", "topk:4"),
    "concatenate": (lambda x, y: torch.concatenate([topk(x), topk(y)], 0), "exact", "topk:4"),
    "ravel": (lambda x, y: topk(x).ravel(), "exact", "nm:4:16"),
    "swapaxes": (lambda x, y: topk(x).swapaxes(0, 1), "exact", "topk:4"),
    "broadcast_to": (lambda x, y: topk(x).broadcast_to(3, 2, 5, K), "exact", "topk:4"),
    "tile": (lambda x, y: topk(x).tile(1, 2, 1), "exact", "topk:4"),
    "view_as": (lambda x, y: topk(x).view_as(y), "exact", "topk:4"),
    "reshape_as": (lambda x, y: topk(x).reshape_as(y), "exact", "topk:4"),
    "expand_as": (lambda x, y: topk(x[:1]).expand_as(y), "exact", "topk:4"),
    "type_as": (lambda x, y: topk(x).type_as(y.double()), "exact", "topk:4"),
    "zeros": (lambda x, y: x + torch.zeros(2, 5, K), "top", ""),
    "squeeze": (lambda x, y: topk(x)[:1].squeeze(0), "exact", "topk:4"),
    "unflatten": (lambda x, y: nm(x).unflatten(-1, (4, 4)), "exact", "topk:2"),
    "tensor_split": (lambda x, y: topk(x).tensor_split(2, 1)[0], "exact", "topk:4"),
    "dropout1d": (lambda x, y: F.dropout1d(R(x), 0.5, False), "likely", ""),
    "dropout2d": (lambda x, y: F.dropout2d(R(x)[None], 0.5, False), "likely", ""),
    "dropout3d": (lambda x, y: F.dropout3d(R(x)[None, None], 0.5, False), "likely", ""),
    "scatter_add": (
        lambda x, y: torch.zeros_like(x).scatter_add(-1, x.topk(4, -1).indices, y[..., :4]), "exact", "topk:4"
    ),
    "full": (lambda x, y: torch.full((2, 3), 0.0), "exact", ""),
    "select": (lambda x, y: topk(x).select(2, 3), "likely", ""),
    "index_select": (lambda x, y: topk(x).index_select(1, torch.tensor([0, 0])), "exact", "topk:4"),
    "mean": (lambda x, y: R(x).mean(-1), "nonnegative", ""),
    "amin": (lambda x, y: R(x).amin(-1), "nonnegative", ""),
    "prod": (lambda x, y: R(x).prod(-1), "nonnegative", ""),
    "norm": (lambda x, y: torch.norm(x, dim=-1), "nonnegative", ""),
    "adaptive_avg_pool2d": (lambda x, y: F.adaptive_avg_pool2d(R(x), 1), "nonnegative", ""),
    "avg_pool2d": (lambda x, y: F.avg_pool2d(R(x), 2), "nonnegative", ""),
    "adaptive_avg_pool1d": (lambda x, y: F.adaptive_avg_pool1d(R(x), 1), "nonnegative", ""),
    "avg_pool1d": (lambda x, y: F.avg_pool1d(R(x), 2), "nonnegative", ""),
    "prelu": (lambda x, y: F.prelu(topk(x), torch.tensor([0.1] * 5)), "exact", "topk:4"),
}  # fmt: skip


@pytest.mark.parametrize("name", SYNONYMS)
def test_other_spellings_say_the_same(name: str) -> None:
    function, state, pattern = SYNONYMS[name]
    of = seen(function, *inputs())
    assert name in {word_of(n) for n in of.gm.graph.nodes}
    assert (of.out.state, of.out.pattern) == (state, pattern)
    check(of)


# --------------------------------------------------------------------------------------------------- sites of models


class Mlp(nn.Module):
    """gate, up and down of a gated MLP; ``join`` makes what down reads from x."""

    def __init__(self, join: Callable[[Mlp, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.ask = (nn.Linear(K, 2 * K, bias=False) for _ in range(3))
        self.down = nn.Linear(2 * K, K)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1] * (K // 2)))
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.join(self, x))
        return y


def cats(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    gate = F.silu(m.gate(x))
    return torch.where(gate.abs() > 0.2, gate, 0) * m.up(x)


def predicted(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    return torch.where(m.ask(x) > 0, F.silu(m.gate(x)), 0) * m.up(x)


def up_first(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    up = m.up(x)
    return up * F.relu(m.gate(x))


def read_twice(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    up = m.up(x)
    return F.relu(m.gate(x)) * up + up


def overwritten(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.gate(x))
    h.add_(1.0)
    return h * m.up(x)


def overwritten_between(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(m.gate(x))
    first, second = h * 2, h * 3  # zero where h was
    h.add_(1.0)
    up = m.up(x)
    return first * up + second * up


# what joins the branches -> origin of the zeros of down's x, {layer: origin of what says where its result is read}
JOINS: dict[str, tuple[Callable[[Mlp, torch.Tensor], torch.Tensor], str, dict[str, str]]] = {
    "relu": (lambda m, x: F.relu(m.gate(x)) * m.up(x), "product with relu(gate)", {"up": "relu"}),
    "relu^2": (lambda m, x: F.relu(m.gate(x)).square() * m.up(x), "product with relu^2(gate)", {"up": "relu^2"}),
    "relu in place": (lambda m, x: m.up(x) * m.gate(x).relu_(), "product with relu(gate)", {"up": "relu"}),
    "silu": (lambda m, x: F.silu(m.gate(x)) * m.up(x), "", {}),
    "CATS": (cats, "product with threshold(gate)", {"up": "threshold"}),
    "top-k": (lambda m, x: topk(m.gate(x)) * m.up(x), "product with top-k(gate)", {"up": "top-k"}),
    "predictor": (predicted, "mask", {"up": "mask", "gate": "mask"}),
    "up before gate": (up_first, "product with relu(gate)", {"up": "relu"}),
    "both relu": (lambda m, x: F.relu(m.gate(x)) * F.relu(m.up(x)), "product with relu(gate)", {"up": "relu"}),
    "up through functions": (
        lambda m, x: F.relu(m.gate(x)) * (F.gelu(m.up(x)) + 1).clamp(max=2), "product with relu(gate)", {"up": "relu"}
    ),
    "up through log": (lambda m, x: F.relu(m.gate(x)) * m.up(x).abs().log(), "product with relu(gate)", {}),
    "up through log and a selection": (
        lambda m, x: torch.where(m.ask(x) > 0, m.up(x).abs().log(), 0), "mask", {"up": "mask"}
    ),
    "a selection of another value": (
        lambda m, x: torch.where(m.ask(x) > 0, m.up(x), m.gate(x)), "", {"up": "mask"}
    ),
    "read twice": (read_twice, "", {}),
    "overwritten": (overwritten, "", {}),
    "overwritten between": (overwritten_between, "product with relu(gate)", {}),
    "a stored mask": (lambda m, x: m.up(x) * m.mask, "stored mask", {"up": "stored mask"}),
    "a mask of tokens": (lambda m, x: m.up(x) * (x[..., :1] > 0), "mask", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_sites_know_of_zeros_in_x_and_of_results_that_nobody_reads(name: str) -> None:
    join, origin, needed = JOINS[name]
    of = seen(Mlp(join), torch.randn(2, 3, K))
    sites = {site.fqn: site for site in of.sites}
    gate = sites["down"].gate
    assert (gate.origin if gate else "") == origin
    said = {name: site.needed_fact.origin for name, site in sites.items() if site.needed_fact}
    assert said == needed
    assert all(hash(site) and isinstance(json.dumps(asdict(site)), str) for site in of.sites)
    check(of)


def test_a_predictor_spares_gate_by_its_mask_and_up_by_what_it_selects() -> None:
    of = seen(Mlp(predicted), torch.randn(2, 3, K))
    named = {node.name: node for node in of.gm.graph.nodes}
    by = {site.fqn: word_of(named[site.needed]) for site in of.sites if site.needed}
    assert by == {"gate": "gt", "up": "where"}


def test_a_convolution_of_one_pixel_keeps_the_zeros_but_no_pattern_of_rows() -> None:
    of = seen(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(1, 4, 8, 8))
    assert [site.gate.origin for site in of.sites if site.gate] == ["relu"]
    model = nn.Conv2d(K, 4, 1)
    of = seen(lambda x: model(topk(x)), torch.randn(1, K, 8, K))
    assert [(s.gate.state, s.gate.pattern, s.gate.rate) for s in of.sites if s.gate] == [("exact", "", 0.75)]


def test_a_function_that_only_has_the_name_of_an_activation_is_not_taken_for_it() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(relu, (x,)))
    facts = zeros(graph, View(graph, {x: torch.randn(2)}))
    assert [fact.state for fact in facts.values()] == ["top"] * 3


@pytest.mark.parametrize("kind", ["float8", "meta", "scalar", "matrix", "empty", "no zeros"])
def test_stored_values_that_are_no_mask_of_channels_say_nothing(kind: str) -> None:
    tensor = {
        "float8": torch.zeros(K).to(torch.float8_e4m3fn), "meta": torch.zeros(K, device="meta"),
        "scalar": torch.tensor(0.0), "matrix": torch.zeros(2, K), "empty": torch.zeros(0), "no zeros": torch.ones(K),
    }[kind]  # fmt: skip
    graph = torch.fx.Graph()
    node = graph.placeholder("mask")
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    graph.output(node)
    view = View(graph, {node: tensor})
    assert view.stored(node)
    assert zeros(graph, view)[node] == ActFact()


def relu(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_symbolic_sizes_are_no_obstacle() -> None:
    found: list[list[Site]] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        c = pipeline.run(Compilation(gm, inputs, Options()), stop_after="capture")
        found.append([site for site, _ in c.sites])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        model = torch.compile(Mlp(lambda m, x: topk(m.gate(x)) * m.up(x)), backend=look, dynamic=True)
        model(torch.randn(2, 5, K))
        model(torch.randn(3, 7, K))
    assert len(found) == 1
    down = next(site for site in found[0] if site.fqn == "down")
    assert down.gate == ActFact("exact", "product with top-k(gate)", down.gate.node, "topk:4", 1 - 4 / (2 * K))


# -------------------------------------------------------------------------------------------------- graphs at random


def set_zero(m: Random, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = a.clone()
    c[b > 0] = 0
    return c


def halve(m: Random, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a.view(-1).mul_(0.5).add_(0.125)  # another view of what others read
    return a + b


ALPHABET: dict[str, Callable[[Random, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda m, a, b: m.first(a),
    "other linear": lambda m, a, b: m.second(a),
    "relu": lambda m, a, b: F.relu(a),
    "relu in place": lambda m, a, b: F.relu(a, inplace=True),
    "silu": lambda m, a, b: F.silu(a),
    "sigmoid": lambda m, a, b: a.sigmoid(),
    "neg": lambda m, a, b: -a,
    "abs": lambda m, a, b: a.abs(),
    "square": lambda m, a, b: a.square() * 0.1,
    "add": lambda m, a, b: a + b,
    "add in place": lambda m, a, b: a.add_(b),
    "sub": lambda m, a, b: a - b,
    "mul": lambda m, a, b: a * b,
    "mul in place": lambda m, a, b: a.mul_(b),
    "where": lambda m, a, b: torch.where(b > 0, a, 0),
    "where of two": lambda m, a, b: torch.where(m.mask > 0, a, b),
    "maximum": lambda m, a, b: torch.maximum(a, b),
    "threshold": lambda m, a, b: torch.where(a.abs() > 0.3, a, 0),
    "positive": lambda m, a, b: a * (a > 0),
    "clamp": lambda m, a, b: a.clamp(0, 1),
    "masked_fill": lambda m, a, b: a.masked_fill(b > 0.5, 0),
    "top-k": lambda m, a, b: topk(a),
    "N:M": lambda m, a, b: nm(a),
    "int8": lambda m, a, b: int8(a),
    "cast": lambda m, a, b: a.bfloat16().float(),
    "stored mask": lambda m, a, b: a * m.mask,
    "transposed": lambda m, a, b: a.transpose(1, 2).contiguous().transpose(1, 2),
    "other tokens": lambda m, a, b: a.transpose(0, 1).reshape(a.shape),
    "halves of channels": lambda m, a, b: torch.cat([a[..., : K // 2], b[..., K // 2 :]], -1),
    "parts of tokens": lambda m, a, b: torch.cat([a[:, :1], b[:, 1:]], 1),
    "flipped": lambda m, a, b: a.flip(-1),
    "dropout": lambda m, a, b: F.dropout(a, 0.5, m.training),
    "set": set_zero,
    "halved": halve,
}


class Random(nn.Module):
    """Any operations on any values before: (name, first, second) by their numbers from the end."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1] * (K // 4)))
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.first(x), self.second(x)]
        for name, i, j in self.steps:
            values.append(ALPHABET[name](self, values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return values[-1]


MAKERS = ("relu", "relu in place", "threshold", "top-k", "N:M", "clamp", "positive", "stored mask", "where")
NEAR = st.sampled_from([0, 0, 0, 1, 1, 2, 3])  # mostly what was made last
STEPS = st.builds(
    lambda maker, rest: [maker, *rest],
    st.tuples(st.sampled_from(MAKERS), NEAR, NEAR),
    st.lists(st.tuples(st.sampled_from(list(ALPHABET)), NEAR, NEAR), min_size=1, max_size=6),
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
@example(steps=[("relu", 0, 0), ("halved", 0, 0), ("neg", 1, 0)])
@example(steps=[("relu", 0, 0), ("add in place", 0, 1), ("other linear", 0, 0), ("mul", 0, 2)])
@example(steps=[("top-k", 0, 0), ("other tokens", 0, 0), ("transposed", 0, 0), ("N:M", 0, 0), ("flipped", 0, 0)])
def test_facts_and_needs_hold_in_graphs_made_at_random(steps: list[tuple[str, int, int]]) -> None:
    of = seen(Random(steps).eval(), torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)))
    check(of)


GATED = st.tuples(
    st.sampled_from(["relu", "silu", "threshold", "top-k", "N:M", "where", "clamp", "stored mask", "relu in place"]),
    st.lists(st.sampled_from(["cast", "neg", "square", "dropout", "silu", "abs", "int8"]), max_size=2),
    st.lists(st.sampled_from(["cast", "silu", "sigmoid", "square", "relu", "add in place", "set"]), max_size=2),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(gated=GATED)
def test_gated_products_say_what_is_not_read_whatever_is_between(gated: tuple[str, list[str], list[str]]) -> None:
    kind, after, on_up = gated

    def join(m: Mlp, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.gate(x), m.up(x)
        for name in (kind, *after):
            gate = WIDE.get(name, ALPHABET[name])(m, gate, gate)
        for name in on_up:
            up = ALPHABET[name](m, up, up)  # type: ignore[arg-type]
        return gate * up

    of = seen(Mlp(join).eval(), torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)))
    check(of)
    sparse = kind != "silu"
    assert bool(next(site for site in of.sites if site.fqn == "down").gate) == (sparse or "relu" in on_up)
    if sparse and not {"set"} & set(on_up):
        assert {site.fqn for site in of.sites if site.needed} >= {"up"}


WIDE: dict[str, Any] = {"N:M": lambda m, a, b: topk(a.view(2, 3, K // 2, 4), 2).reshape(a.shape)}
