"""Quantised inputs and weights as graphs hold them: what is taken, what stays and why, and that nothing changes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsec
from sparsec import pipeline
from sparsec.codegen import reference
from sparsec.options import Options
from sparsec.passes.quantize.inputs import quantize_inputs, quantized
from sparsec.passes.rewrite.expression import evaluate
from sparsec.passes.rewrite.group import group_calls
from sparsec.pipeline import Compilation
from sparsec.plan import FIXED, GIVEN, PER_TOKEN, RAW, Plan
from sparsec.runtime.store import STORE

K, N = 64, 48
LEAST = float(torch.tensor(1e-5) / 127)
DENSE: dict[str, Any] = {"min_speedup": 1e9}
FORCED: dict[str, Any] = {"min_speedup": 0, "formats": ["bitmap"]}


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def compiled(model: nn.Module, options: dict[str, Any]) -> tuple[Callable[..., Any], list[Compilation]]:
    """The model through every stage but Inductor: the rewritten graph runs as it is."""
    seen: list[Compilation] = []
    parsed = Options.parse(options)

    def build(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        pipeline.prepare(parsed)
        seen.append(pipeline.run(Compilation(gm, inputs, parsed), stop_after="pack"))
        return seen[-1].gm.forward

    return torch.compile(model, backend=build), seen


def ops(c: Compilation) -> list[str]:
    return [str(n.target) for n in c.gm.graph.nodes if n.op == "call_function" and "sparsec" in str(n.target)]


def arithmetic(c: Compilation) -> set[str]:
    names = {getattr(n.target, "__name__", str(n.target)) for n in c.gm.graph.nodes if n.op.startswith("call")}
    return names & {"round", "truediv", "div", "clamp", "clip", "mul", "sub", "amax", "abs", "where", "to", "float"}


class Layer(nn.Module):
    """A module whose forward is the function under test."""

    def __init__(self, function: Callable[..., Any], **buffers: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(N, K) * (torch.rand(N, K) > 0.7))
        self.b = nn.Parameter(torch.randn(N))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def top(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


def by_max(s: Layer, x: torch.Tensor) -> torch.Tensor:
    m = torch.max(torch.abs(x), dim=-1, keepdim=True).values
    scale = m.clamp(min=1e-5) / 127
    return F.linear((x / scale).round().clip(-128, 127).to(torch.int8).to(x.dtype) * scale, s.w, s.b)


def masked_fill(s: Layer, x: torch.Tensor) -> torch.Tensor:
    scale = top(x).div(127)
    scale = scale.masked_fill(scale == 0, 1.0)
    return torch.matmul(scale * torch.clamp(torch.round(torch.div(x, scale)), min=-127, max=127), s.w.t())


def clamp_first(s: Layer, x: torch.Tensor) -> torch.Tensor:
    scale = (top(x) / 127.0).clamp(min=1e-7)
    return F.linear(torch.round(torch.clamp(x / scale, -127, 127)).mul(scale), s.w, s.b)


def literal(s: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear((x / 0.03).round().clamp(-127, 127) * 0.03, s.w, s.b)


def reshaped(s: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(s.b, quantized(x).view(-1, K), s.w.t())


TAKEN: dict[str, tuple[str, Layer]] = {
    "per token": ("int8", Layer(lambda s, x: F.linear(quantized(x), s.w, s.b))),
    "stored scale": ("int8:given", Layer(lambda s, x: F.linear(quantized(x, s.s), s.w, s.b), s=torch.tensor(0.02))),
    "max of a dimension, int8 between": (f"int8:min={LEAST!r}", Layer(by_max)),
    "masked_fill and methods": ("int8", Layer(masked_fill)),
    "clamped before it is rounded": ("int8:min=1.0000000116860974e-07", Layer(clamp_first)),
    "a literal": ("int8:0.029999999329447746", Layer(literal)),
    "a view between": ("int8", Layer(reshaped)),
}


@pytest.mark.parametrize("options", [DENSE, FORCED], ids=["dense", "bitmap"])
@pytest.mark.parametrize("form", TAKEN)
def test_every_spelling_of_rounded_inputs_is_taken_and_gives_the_same(form: str, options: dict[str, Any]) -> None:
    word, model = TAKEN[form]
    x = 2 * torch.randn(3, 5, K)
    x[1, 2] = 0.0
    expected = model(x)
    run, seen = compiled(model, options)
    found = run(x)
    assert [s.x for s, _ in seen[0].sites] == [word]
    assert not arithmetic(seen[0])  # the rounding has left the graph
    assert not seen[0].record.declined
    if options is DENSE:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.03])
def test_bf16_layers_round_in_fp32_and_dense_is_bit_equal(scale: float | None) -> None:
    model = nn.Sequential(nn.Linear(K, N)).to(torch.bfloat16)
    quantize_inputs(model[0], scale)
    x = torch.randn(7, K, dtype=torch.bfloat16)
    run, seen = compiled(model, DENSE)
    assert torch.equal(run(x), model(x))
    assert seen[0].sites[0][0].x.startswith("int8")
    assert seen[0].sites[0][0].dtype == "bf16"


def test_not_a_number_and_infinity_come_out_where_they_did() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    quantize_inputs(model[0])
    x = torch.randn(4, K)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    run, _ = compiled(model, DENSE)
    assert torch.equal(run(x).isnan(), model(x).isnan())
    assert torch.equal(run(x)[[0, 3]], model(x)[[0, 3]])


STAYS: dict[str, tuple[str, Callable[..., Any]]] = {
    "seven bits": ("clamps to -63..63", lambda s, x: (x / s.s).round().clamp(-63, 63) * s.s),
    "a zero point": ("zero point", lambda s, x: ((x / s.s).round().clamp(-127, 127) - 3) * s.s),
    "the reciprocal": ("1 / scale", lambda s, x: (x * (1 / s.s)).round().clamp(-127, 127) * s.s),
    "-128 of a static scale": ("-128..127", lambda s, x: (x / s.s).round().clamp(-128, 127) * s.s),
    "zeros divided by zero": ("scale of zero", lambda s, x: by(x, top(x) / 127)),
    "one scale, another": ("by another", lambda s, x: (x / s.s).round().clamp(-127, 127) * s.t),
    "all tokens together": ("more than one token", lambda s, x: dynamic(x, x.abs().amax((0, 1), keepdim=True))),
    "no bounds": ("round and clamp", lambda s, x: (x / s.s).round() * s.s),
    "bf16": ("computed in bfloat16", lambda s, x: dynamic(x.bfloat16(), top(x.bfloat16())).float()),
    "fake_quantize": ("1 / scale", lambda s, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -127, 127)),
    "written in place": ("writes in place", lambda s, x: written(x, quantized(x))),
}  # fmt: skip


def dynamic(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return by(x, (m / 127).clamp(min=1e-6))


def by(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


def written(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return rounded


@pytest.mark.parametrize("case", STAYS)
def test_what_no_kernel_computes_exactly_stays_in_the_graph_with_its_reason(case: str) -> None:
    reason, rounding = STAYS[case]
    model = Layer(lambda s, x: F.linear(rounding(s, x), s.w, s.b), s=torch.tensor(0.1), t=torch.tensor(0.2))
    x = torch.randn(2, 3, K)
    expected = model(x.clone())
    run, seen = compiled(model, DENSE)
    assert torch.equal(run(x.clone()), expected)
    assert [s.x for s, _ in seen[0].sites] == [""]  # the product itself is taken
    assert [d.op for d in seen[0].record.declined] == ["activations"]
    assert reason in seen[0].record.declined[0].reason


def test_a_rounding_that_others_read_too_stays_for_them() -> None:
    def both(s: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = quantized(x)
        return F.linear(rounded, s.w, s.b), rounded

    model, x = Layer(both), torch.randn(4, K)
    run, seen = compiled(model, DENSE)
    for ours, theirs in zip(run(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
    assert seen[0].sites[0][0].x == "int8"
    assert "round" in arithmetic(seen[0])


def test_layers_that_round_the_same_input_are_called_together() -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(K, N), nn.Linear(K, N, bias=False), nn.Linear(K, N)
            quantize_inputs(self.q)
            quantize_inputs(self.k)
            quantize_inputs(self.v, 0.05)

        def forward(self, x: torch.Tensor) -> Any:
            return self.q(x), self.k(x), self.v(x)

    model, x = Group(), torch.randn(2, 3, K)
    sparsec.sparsify(model, {"method": "magnitude", "sparsity": 0.8, "ignore": ["v"]}, progress=False)
    run, seen = compiled(model, {**FORCED, "verify": True})
    before = STORE.verified
    for ours, theirs in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert STORE.verified == before + 3
    assert ops(seen[0]) == ["sparsec.linear_group.default"]
    assert len({s.group for s, _ in seen[0].sites}) == 1


def test_a_new_static_scale_is_read_at_the_next_call_without_compiling_again() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    quantize_inputs(model[0], 0.05)
    x = torch.randn(3, K)
    run, seen = compiled(model, FORCED)
    for scale in (0.05, 0.5, 0.0, -1.0, float("nan")):  # nonsense gives what plain PyTorch gives
        model[0].x_scale.fill_(scale)
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert len(seen) == 1


# ----------------------------------------------------------------------------------------------- computed weights


def codes(bits: int = 8) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (N, K), dtype=torch.int8) * (torch.rand(N, K) > 0.6)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "q": codes().to(torch.int8),
        "u": torch.randint(0, 16, (N, K), dtype=torch.uint8),
        "packed": torch.randint(0, 256, (N, K // 2), dtype=torch.uint8),
        "scale": torch.rand(N, 1) + 0.1,
        "flat": torch.rand(N) + 0.1,
        "gs": torch.rand(N, 4) + 0.1,
        "zero": torch.randint(0, 16, (N, 1)).float(),
        "gz": torch.randint(0, 16, (N, 4), dtype=torch.uint8),
    }


def nibbles(s: Layer) -> torch.Tensor:
    both = torch.stack([s.packed & 0xF, s.packed >> 4], dim=-1).view(N, K)
    return ((both.to(torch.int8) - 8).float().view(N, 4, -1) * s.gs[:, :, None]).flatten(1)


WEIGHTS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "per row": lambda s, x: s.q.to(x.dtype) * s.scale,
    "promoted": lambda s, x: s.q * s.flat.unsqueeze(1),
    "type_as": lambda s, x: s.scale * s.q.type_as(x),
    "zero point": lambda s, x: (s.u.float() - s.zero) * s.scale,
    "groups": lambda s, x: (s.q.float().view(N, 4, K // 4) * s.gs.unsqueeze(-1)).reshape(N, K),
    "groups repeated": lambda s, x: (
        (s.u.float() - s.gz.float().repeat_interleave(K // 4, 1)) * s.gs.repeat_interleave(K // 4, dim=1)
    ),
    "two to a byte": lambda s, x: nibbles(s),
    "a literal scale": lambda s, x: (s.q.float() - 1) * 0.01,
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_every_spelling_of_a_dequantised_weight_is_taken_and_gives_the_same(form: str) -> None:
    made = WEIGHTS[form]
    model = Layer(lambda s, x: F.linear(x, made(s, x), s.b), **tensors())
    x = torch.randn(2, 3, K)
    run, seen = compiled(model, {**FORCED, "verify": True})
    before = STORE.verified
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4 * float(model(x).abs().max()))
    site = seen[0].sites[0][0]
    if seen[0].decisions[0].ours:  # a weight with hardly a zero has no bitmap
        assert STORE.verified == before + 1
        assert ops(seen[0]) == ["sparsec.linear_codes.default"]
    assert torch.equal(evaluate(site.w, [getattr(model, _attribute(p)) for p in site.parts]), made(model, x))


def _attribute(placeholder: str) -> str:
    return placeholder.removeprefix("l_self_buffers_").removesuffix("_")


@pytest.mark.parametrize("spelling", ["x @ w.t()", "x @ w", "addmm"])
def test_products_with_a_dequantised_matrix_are_taken(spelling: str) -> None:
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "x @ w.t()": lambda s, x: x @ (s.q.float() * s.scale).t(),
        "x @ w": lambda s, x: operator.matmul(x, s.t.float() * s.row),
        "addmm": lambda s, x: torch.addmm(s.b, x, (s.q.float() * s.scale).T),
    }
    extra = {"t": codes().to(torch.int8).t().contiguous(), "row": torch.rand(N) + 0.1}
    model, x = Layer(forms[spelling], **tensors(), **extra), torch.randn(5, K)
    run, seen = compiled(model, FORCED)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-2)
    assert (seen[0].sites[0][0].n, seen[0].sites[0][0].k) == (N, K)
    assert ops(seen[0]) == ["sparsec.linear_codes.default"]


@pytest.mark.parametrize("changed", ["q", "scale"])
@pytest.mark.parametrize("how", ["in place", "loaded", "replaced", "invalidated"])
def test_a_change_of_codes_or_scale_is_noticed(changed: str, how: str) -> None:
    model = Layer(lambda s, x: F.linear(x, s.q.float() * s.scale), **{k: tensors()[k] for k in ("q", "scale")})
    x = torch.randn(4, K)
    run, _ = compiled(model, FORCED)
    old = run(x)
    now = getattr(model, changed)
    new = codes().to(torch.int8) if changed == "q" else torch.rand(N, 1) + 3.0
    if how == "in place":
        now.copy_(new)
    elif how == "loaded":
        model.load_state_dict({**model.state_dict(), changed: new})
    elif how == "replaced":
        setattr(model, changed, new)
    else:
        now.data.copy_(new)
        sparsec.invalidate(now)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-2)
    assert not torch.allclose(run(x), old, rtol=1e-3, atol=1e-1)


def test_codes_that_change_faster_than_packing_pays_are_served_dense_and_right() -> None:
    model = Layer(lambda s, x: F.linear(x, s.q.float() * s.scale), **{k: tensors()[k] for k in ("q", "scale")})
    x = torch.randn(4, K)
    run, _ = compiled(model, FORCED)
    for _ in range(6):
        model.scale.mul_(1.5)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-2)


def test_a_dequantised_weight_that_runs_dense_stays_in_the_graph() -> None:
    model = Layer(lambda s, x: F.linear(x, s.q.float() * s.scale), **tensors())
    x = torch.randn(4, K)
    run, seen = compiled(model, DENSE)
    assert torch.equal(run(x), model(x))
    assert not ops(seen[0])
    assert seen[0].record.layers[0].site.w


def test_one_graph_serves_modules_whose_codes_differ() -> None:
    blocks = [Layer(lambda s, x: F.linear(x, s.q.float() * s.scale), **tensors()) for _ in range(3)]
    for block in blocks[1:]:
        block.function = blocks[0].function
        block.q.copy_(codes().to(torch.int8))
    run, seen = compiled(nn.Sequential(blocks[0]), FORCED)
    x = torch.randn(4, K)
    step = seen or run(x)
    assert step is not None
    graph = seen[0].gm
    order = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    for block in blocks:
        given = [x if "q" not in name and "scale" not in name else None for name in order]
        named = [getattr(block, _leaf(name)) if g is None else g for name, g in zip(order, given, strict=True)]
        torch.testing.assert_close(graph(*named)[0], block(x), rtol=1e-4, atol=1e-2)


def _leaf(name: str) -> str:
    return "scale" if "scale" in name else "q"


def test_rounded_inputs_and_dequantised_weights_go_together() -> None:
    model = Layer(lambda s, x: F.linear(quantized(x), s.q.float() * s.scale, s.b), **tensors())
    x = torch.randn(4, K)
    run, seen = compiled(model, {**FORCED, "verify": True})
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-2)
    site = seen[0].sites[0][0]
    assert site.x == "int8"
    assert site.w
    assert not arithmetic(seen[0])


class Attention(nn.Module):
    """Three weights on one x: stored, from codes by row, and from codes of 4 bits, two to a byte."""

    def __init__(self, rounds: bool = False, bias: str = "stored") -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(N, K) * (torch.rand(N, K) > 0.7))
        self.b = nn.Parameter(torch.randn(N))
        self.rounds, self.bias = rounds, bias
        few = torch.randint(7, 10, (N, K // 2), dtype=torch.uint8)  # 8 is zero
        for name, tensor in {**tensors(), "packed": few | few.flip(0) << 4}.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> Any:
        x = quantized(x) if self.rounds else x
        b = self.b if self.bias == "stored" else self.b * 2
        k = F.linear(x, self.q.float() * self.scale, b)
        return k, F.linear(x, self.w, self.b), F.linear(x, nibbles(self))


@pytest.mark.parametrize("rounds", [False, True])
def test_weights_from_codes_are_called_together_with_stored_ones(rounds: bool) -> None:
    model, x = Attention(rounds), torch.randn(2, 3, K)
    run, seen = compiled(model, {**FORCED, "verify": True})
    before = STORE.verified
    for ours, theirs in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert STORE.verified == before + 3
    assert ops(seen[0]) == ["sparsec.linear_group.default"]
    assert len({s.group for s, _ in seen[0].sites}) == 1
    model.scale.mul_(1.5)
    model.q.copy_(codes().to(torch.int8))
    for ours, theirs in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert len(seen) == 1


def test_a_group_of_codes_compiles_and_changing_batches_share_its_graph() -> None:
    model = Attention()
    fast = torch.compile(model, backend="sparsec", options=FORCED)
    for rows in (1, 5, 6):
        x = torch.randn(rows, K)
        for ours, theirs in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_call_whose_bias_is_computed_waits_for_it_and_stays_by_itself() -> None:
    model, x = Attention(bias="computed"), torch.randn(4, K)
    run, seen = compiled(model, FORCED)
    for ours, theirs in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert sorted(ops(seen[0])) == ["sparsec.linear_codes.default", "sparsec.linear_group.default"]


def test_calls_do_not_move_over_a_write_in_place() -> None:
    def changing(s: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x + 0
        before = F.linear(x, s.w, s.b), F.linear(x, s.w)
        x.mul_(2)
        return *before, F.linear(x, s.w, s.b)

    model, x = Layer(changing), torch.randn(4, K)
    run, seen = compiled(model, FORCED)
    for ours, theirs in zip(run(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert ops(seen[0]) == ["sparsec.linear_group.default", "sparsec.linear.default"]


def test_fields_of_graph_inputs_are_read_before_the_group() -> None:
    """Weights of tensor subclasses are given by their fields, which the graph reads where each call stood."""
    pipeline.prepare(Options.parse(FORCED))
    graph = torch.fx.Graph()
    x, held = graph.placeholder("x"), graph.placeholder("held")
    plans = [Plan("layer", "linear", Options.parse(FORCED).policy, w=w).encode() for w in ("", "[1]")]
    first = graph.call_function(torch.ops.sparsec.linear.default, (x, held, None, plans[0]))
    field = graph.call_function(getattr, (held, "qdata"))
    last = graph.call_function(torch.ops.sparsec.linear_codes.default, (x, [field, held], None, plans[1]))
    graph.output((first, last))
    assert group_calls(graph) == 1
    graph.lint()  # raises where something is read before it is made
    group = next(n for n in graph.nodes if "linear_group" in str(n.target))
    assert group.args == (x, [held, field, held], [1, 2], [None, None], plans, [None, None])


def test_lists_of_a_group_that_do_not_fit_together_are_refused() -> None:
    pipeline.prepare(Options.parse(FORCED))
    x, w = torch.randn(2, K), torch.randn(N, K)
    plan = Plan("layer", "linear", Options.parse(FORCED).policy).encode()
    for counts in ([2], [1, 1], []):
        with pytest.raises(RuntimeError, match="its lists do not fit together"):
            torch.ops.sparsec.linear_group(x, [w], counts, [None], [plan], [None])


REFUSED: dict[str, tuple[str, Callable[[Layer, torch.Tensor], torch.Tensor]]] = {
    "floor": ("floor is not read there", lambda s, x: (s.q.float() / 3).floor() * s.scale),
    "rounding mode": ("div has rounding_mode", lambda s, x: torch.div(s.q.float(), s.scale, rounding_mode="floor")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arithmetic_on_codes_that_is_not_read_is_named(case: str) -> None:
    reason, made = REFUSED[case]
    model = Layer(lambda s, x: F.linear(x, made(s, x)), **tensors())
    run, seen = compiled(model, DENSE)
    x = torch.randn(2, K)
    assert torch.equal(run(x), model(x))
    assert reason in seen[0].record.declined[0].reason


@pytest.mark.parametrize(
    ("x", "rule"),
    [("", (RAW, 0.0)), ("int8", (PER_TOKEN, 0.0)), ("int8:min=1e-07", (PER_TOKEN, 1e-7)),
     ("int8:0.25", (FIXED, 0.25)), ("int8:given", (GIVEN, 0.0))],
)  # fmt: skip
def test_a_plan_says_how_x_is_rounded_in_any_process(x: str, rule: tuple[int, float]) -> None:
    plan = Plan("layer", "linear", Options.parse(DENSE).policy, x=x, w="[1]" if x else "")
    assert Plan.decode(plan.encode()) == plan
    assert plan.x_rule == rule


@pytest.mark.parametrize(("x_scale", "least"), [(0.0, None), (-0.5, 0.5)])
def test_the_reference_rounds_as_the_layer_does(x_scale: float, least: float | None) -> None:
    x = torch.randn(5, K)
    x[1] = 0.0
    scale = (top(x) / 127).clamp(min=least) if least else None
    expected = quantized(x) if scale is None else (x / scale).round().clamp(-127, 127) * scale
    assert torch.equal(reference.quantised(x, x_scale), expected)
    assert torch.equal(reference.quantised(x, 0.1), quantized(x, torch.tensor(0.1)))
    weight = torch.randn(N, K)
    assert torch.equal(reference.linear(x, weight, x_scale=x_scale), expected @ weight.T)
