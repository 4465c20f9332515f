"""Gated layers beside what changes: writes in place, phases, infinities, and rates of zeros that another cause made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec.activation_rates import Rates, keep
from sparsec.facts import WeightFact
from sparsec.meter import meters
from sparsec.options import Policy
from sparsec.plan import Plan
from sparsec.runtime.store import gates_of

WRITES: dict[str, Callable[[Gated, torch.Tensor], object]] = {
    "x": lambda m, x: x.sub_(x.mean(-1, keepdim=True)).mul_(2),
    "a part of x": lambda m, x: x[..., :100].zero_(),
    "x by index": lambda m, x: x.__setitem__((..., slice(0, 100)), 0),
    "a view of x": lambda m, x: x.view(-1).mul_(3),
    "the weight": lambda m, x: m.up.weight.mul_(2),
    "the bias": lambda m, x: m.up.bias.add_(1),
    "the transposed weight": lambda m, x: m.up.weight.t().mul_(2),
    "nothing": lambda m, x: None,
    "something else": lambda m, x: m.other.mul_(0.5),
}


class Gated(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 512), nn.Linear(128, 512), nn.Linear(512, 128)
        self.register_buffer("other", torch.ones(4))
        self.write = WRITES[write]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        u = self.up(y)
        self.write(self, y)
        y: torch.Tensor = self.down(torch.relu(self.gate(y) - 0.6) * u)  # type: ignore[no-redef]
        return y


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_a_layer_and_its_gate_is_seen(write: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, again = Gated(write).eval(), Gated(write).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 128) + 0.3
    with torch.inference_mode():
        compiled = torch.compile(model, backend="sparsec", options={"min_speedup": 0})
        for _ in range(3):
            torch.testing.assert_close(compiled(x), again(x), rtol=1e-4, atol=1e-5)


def test_a_write_to_something_else_keeps_outputs_from_being_computed() -> None:
    torch.compiler.reset()
    model, before = Gated("something else").eval(), _chosen()
    with torch.inference_mode():
        torch.compile(model, backend="sparsec", options={"min_speedup": 0})(torch.randn(1, 128))
    assert _chosen() == before + 1


def _chosen() -> int:
    return sum(meter.skipped for meter in meters() if meter.name == "up" and "select" in meter.loops)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinity_behind_a_closed_gate_gives_nan(value: float, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Gated("nothing").eval().to(dtype)
    x = torch.randn(1, 128, dtype=dtype)
    x[0, 3] = value
    with torch.no_grad():
        model.gate.weight[:, 3] = -model.gate.weight[:, 3].abs()
        found = torch.compile(model, backend="sparsec", options={"min_speedup": 0})(x)
        assert torch.equal(found.isnan(), model(x).isnan())
        assert found.isnan().any() or value < 0


@pytest.mark.parametrize(
    "recipe", [{"method": "amber", "pattern": "2:4"}, {"method": "teal", "phase": "decode"}], ids=str
)
def test_gates_of_one_phase_take_any_number_of_tokens(recipe: dict[str, object]) -> None:
    from sparsec.models import load_model

    torch.compiler.reset()
    torch.manual_seed(0)
    model = load_model("tiny:llama", "fp32").model
    ids = torch.randint(0, 256, (2, 64))
    said = recipe if recipe["method"] == "amber" else {**recipe, "sparsity": 0.5}
    sparsec.sparsify(model, said, [ids] * 2, progress=False)
    compiled = torch.compile(model, backend="sparsec")
    with torch.no_grad():
        for shape in ((1, 1), (1, 5), (2, 4), (1, 1), (3, 9)):
            some = ids.flatten()[: shape[0] * shape[1]].view(shape)
            want = model(some, use_cache=False).logits
            torch.testing.assert_close(compiled(some, use_cache=False).logits, want, rtol=1e-3, atol=1e-4)


def test_a_rate_of_zeros_of_another_origin_decides_nothing(tmp_path: Path) -> None:
    keep(Rates("key", "relu", 100, 0.1, ((1, 0.1),), (0.1,) * 8, 0.0), str(tmp_path))
    fact = WeightFact("key", 8, 8, "fp32", 64, 0, 8, (0,) * 10, 0, 0, 0, 0)
    policy = Policy(cache_dir=str(tmp_path))
    for origin, left in (("relu", 0.9), ("threshold", None)):
        plan = Plan("fc", "linear", policy, gates="skip select", origin=origin, m=1)
        assert Plan.decode(plan.encode()) == plan
        assert gates_of(fact, plan) == (("skip", left), ("select", None))


def test_a_layer_with_zeros_on_both_sides_counts_each_call_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both_gate, self.both_up = nn.Linear(2048, 2048), nn.Linear(2048, 2048)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(x + 3)
            return torch.relu(self.both_gate(h) + 3) * self.both_up(h)

    torch.compiler.reset()
    torch.manual_seed(0)
    model = Both().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="sparsec", options={"min_speedup": 1.0})
        for _ in range(5):
            compiled(torch.randn(1, 2048))
    found = {meter.name: meter for meter in meters()}
    assert found["both_up"].loops == "skip and select"
    assert found["both_up"].calls == 5
    assert 0 <= found["both_up"].left <= 1
