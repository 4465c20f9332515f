"""Zeros of activations: every transfer function against values, whole graphs against eager, and real models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Interpreter, Node

from sparsec import compat, pipeline
from sparsec.facts import ACT_STATES, ActFact, Site
from sparsec.options import Options
from sparsec.passes.graph import View
from sparsec.passes.profile.activations import zeros
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
        self.known = known or {}
        self.fill = fill
        self.masks = {site.node: site.needed for site in of.sites if site.needed}
        self.named = {node.name: node for node in of.gm.graph.nodes}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.fill is not None and n.name in self.masks:
            mask = self.named[self.masks[n.name]]
            said = self.values[mask] if mask in self.values else self.known[mask]
            value = torch.where(said != 0, value, torch.full_like(value, self.fill))
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
