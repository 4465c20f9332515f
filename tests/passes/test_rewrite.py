"""Each graph rule: what it takes, what it refuses and why, and that the rewritten graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from sparsec import pipeline
from sparsec.options import Options
from sparsec.pipeline import Compilation

K, N = 256, 192
FORCED: dict[str, Any] = {"min_speedup": 0, "formats": ["bitmap"]}


pytestmark = pytest.mark.usefixtures("fresh_graphs")


class Layer(nn.Module):
    """A module whose forward is the function under test; its matrices are pruned."""

    def __init__(self, function: Callable[..., Any], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor * (torch.rand_like(tensor) > 0.7) if tensor.dim() > 1 else tensor))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def captured(model: nn.Module, *args: Any, stage: str = "capture") -> Compilation:
    seen: list[Compilation] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        pipeline.prepare(Options.parse(FORCED))
        seen.append(pipeline.run(Compilation(gm, inputs, Options.parse(FORCED)), stop_after=stage))
        return gm.forward

    torch.compile(model, backend=look)(*args)
    return seen[0]


def ops(c: Compilation) -> list[str]:
    return [str(n.target) for n in c.gm.graph.nodes if n.op == "call_function" and "sparsec" in str(n.target)]


W, WT, B = torch.randn(N, K), torch.randn(K, N), torch.randn(N)
FORMS: dict[str, tuple[str, nn.Module]] = {
    "linear": ("linear", Layer(lambda s, x: F.linear(x, s.w, s.b), w=W, b=B)),
    "linear by keyword": ("linear", Layer(lambda s, x: F.linear(input=x, weight=s.w, bias=s.b), w=W, b=B)),
    "matmul operator": ("matmul", Layer(lambda s, x: x @ s.w, w=WT)),
    "torch.matmul": ("matmul", Layer(lambda s, x: torch.matmul(x, s.w), w=WT)),
    "tensor method": ("matmul", Layer(lambda s, x: x.matmul(s.w), w=WT)),
    "matmul with t()": ("matmul", Layer(lambda s, x: x @ s.w.t(), w=W)),
    "matmul with .T": ("matmul", Layer(lambda s, x: x @ s.w.T, w=W)),
    "matmul with transpose": ("matmul", Layer(lambda s, x: x @ s.w.transpose(0, 1), w=W)),
    "addmm": ("addmm", Layer(lambda s, x: torch.addmm(s.b, x, s.w), w=WT, b=B)),
    "addmm with t()": ("addmm", Layer(lambda s, x: torch.addmm(s.b, x, s.w.t()), w=W, b=B)),
    "buffer": ("linear", Layer(lambda s, x: F.linear(x, s.w), w=W)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_a_linear_is_a_site_and_computes_the_same(form: str) -> None:
    kind, model = FORMS[form]
    x = torch.randn(5, K)
    c = captured(model, x)
    assert [s.kind for s, _ in c.sites] == [kind]
    assert (c.sites[0][0].n, c.sites[0][0].k) == (N, K)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model, backend="sparsec", options=FORCED)(x), model(x), rtol=1e-4, atol=1e-4
    )


REFUSED: dict[str, tuple[str, Callable[..., Any]]] = {
    "computed weight": ("computed in the graph", lambda s, x: F.linear(x, s.w * 2)),
    "sliced weight": ("computed in the graph", lambda s, x: F.linear(x, s.w[: N // 2])),
    "activations": ("no stored weight", lambda s, x: x @ x.t()),
    "scaled addmm": ("alpha=1", lambda s, x: torch.addmm(s.b, x, s.w.t(), alpha=2.0)),
    "einsum": ("einsum is not taken", lambda s, x: torch.einsum("mk,nk->mn", x, s.w)),
    "weight on the left": ("not on the right", lambda s, x: torch.mm(s.w, x.t())),
    "float64": ("float64", lambda s, x: F.linear(x.double(), s.w64)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_taken_keeps_its_reason(case: str) -> None:
    reason, function = REFUSED[case]
    model = Layer(function, w=W, b=B, w64=W.double())
    c = captured(model, torch.randn(5, K))
    assert not c.sites
    assert any(reason in d.reason for d in c.record.declined), c.record.declined


def test_a_weight_that_is_an_argument_is_refused() -> None:
    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w)

    c = captured(Takes(), torch.randn(2, K), torch.randn(N, K))
    assert "argument" in c.record.declined[0].reason


def test_a_mask_that_is_not_permanent_is_named_with_the_remedy() -> None:
    layer = nn.Linear(K, N)
    prune.random_unstructured(layer, "weight", amount=0.7)
    model = nn.Sequential(layer)
    c = captured(model, torch.randn(2, K))
    assert "prune.remove" in c.record.declined[0].reason
    prune.remove(layer, "weight")
    torch._dynamo.reset()
    assert len(captured(model, torch.randn(2, K)).sites) == 1


def test_gradients_decline_every_site_with_the_remedy() -> None:
    model = Layer(lambda s, x: F.linear(x, s.w), w=W)
    with torch.enable_grad():
        c = captured(model, torch.randn(2, K))
    assert not c.sites
    assert "torch.no_grad()" in c.record.declined[0].reason


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        ("relu method", lambda x: x.relu()),
    ],
)
def test_one_activation_is_folded(name: str, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Layer(lambda s, x: act(F.linear(x, s.w, s.b)), w=W, b=B)
    x = torch.randn(3, K)
    c = captured(model, x, stage="rewrite")
    assert c.plans[0].act == name.split()[0]
    assert len([n for n in c.gm.graph.nodes if n.op in ("call_function", "call_method")]) == 1
    torch._dynamo.reset()
    got = torch.compile(model, backend="sparsec", options=FORCED)(x)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_an_activation_with_a_second_reader_is_not_folded() -> None:
    def both(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, s.w, s.b)
        return F.relu(y) + y

    c = captured(Layer(both, w=W, b=B), torch.randn(3, K), stage="rewrite")
    assert c.plans[0].act == ""


def test_qkv_on_one_input_are_one_call() -> None:
    model = Layer(
        lambda s, x: (F.linear(x, s.q, s.b), F.linear(x, s.k), F.silu(F.linear(x, s.v))), q=W, k=W + 1, v=W + 2, b=B
    )
    x = torch.randn(2, 3, K)
    c = captured(model, x, stage="rewrite")
    assert ops(c) == ["sparsec.linear_group.default"]
    assert len({s.group for s, _ in c.sites}) == 1
    assert c.sites[0][0].group
    torch._dynamo.reset()
    got = torch.compile(model, backend="sparsec", options=FORCED)(x)
    for a, b in zip(got, model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_gate_and_up_pair_of_a_gated_mlp_is_one_call() -> None:
    model = Layer(lambda s, x: F.linear(F.silu(F.linear(x, s.gate)) * F.linear(x, s.up), s.down), gate=W, up=W, down=WT)
    c = captured(model, torch.randn(1, K), stage="rewrite")
    assert ops(c) == ["sparsec.linear_group.default", "sparsec.linear.default"]


class Pointwise(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(K, N, 1, **settings)
        self.conv.weight.mul_(torch.rand_like(self.conv.weight) > 0.7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x))


@pytest.mark.parametrize("last", [False, True])
def test_a_1x1_convolution_is_a_site(last: bool) -> None:
    model = Pointwise()
    x = torch.randn(2, K, 5, 3)
    if last:
        x = x.to(memory_format=torch.channels_last)
    assert [s.kind for s, _ in captured(model, x).sites] == ["conv2d"]
    torch._dynamo.reset()
    got, want = torch.compile(model, backend="sparsec", options=FORCED)(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_embedding_is_named_with_what_can_be_done_for_it() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, K)
            self.register_buffer("ids", torch.arange(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(self.ids[:2]) + F.embedding(x, self.table.weight) + torch.embedding(self.table.weight, x)

    c = captured(Reader(), torch.zeros(2, dtype=torch.long))
    assert [d.fqn for d in c.record.declined] == ["table"] * 3
    assert all("reads only the rows" in d.reason and "pack_" in d.reason for d in c.record.declined)


def test_untouched_graphs_stay_untouched() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, -1).contiguous()

    c = captured(Plain(), torch.randn(4, K), stage="rewrite")
    assert not c.sites
    assert not c.record.declined
    assert not ops(c)
