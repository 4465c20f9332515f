"""Activation sparsity through torch.compile: found in the graph, skipped in the kernels, and the answer is eager's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.meter import meters
from sparsec.options import Policy
from sparsec.plan import Plan
from sparsec.runtime.store import STORE, gates_of

FORCED = {"min_speedup": 0, "verify": True}


class MLP(nn.Module):
    """relu(gate) * up -> down, or relu(gate) -> down without ``up``; about one gate in six is open."""

    def __init__(self, width: int = 96, inner: int = 320, gated: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias) if gated else None
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.gate(x) - 0.6)
        return self.down(h if self.up is None else h * self.up(x))  # type: ignore[no-any-return]


pytestmark = pytest.mark.usefixtures("fresh_graphs")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparsec", options={**FORCED, **options})


def skipped(name: str) -> tuple[int, int]:
    found = [m for m in meters() if m.name == name]
    return sum(m.calls for m in found), sum(m.skipped for m in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_relu_mlp_gives_what_eager_gives_at_every_number_of_rows(dtype: torch.dtype, gated: bool, bias: bool) -> None:
    model = MLP(gated=gated, bias=bias).to(dtype).eval()
    run = compiled(model)
    for rows in (1, 1, 2, 5, 8, 9, 40):
        x = torch.randn(rows, 96).to(dtype)
        torch.testing.assert_close(run(x), model(x), rtol=2**-6, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    x = torch.randn(2, 3, 96).to(dtype)
    torch.testing.assert_close(run(x), model(x), rtol=2**-6, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_both_halves_of_a_gated_mlp_skip() -> None:
    model = MLP()
    run, x = compiled(model), torch.randn(1, 96)
    before = {name: skipped(name)[1] for name in ("up", "down")}
    for _ in range(3):
        run(x)
    for name in ("up", "down"):
        assert skipped(name)[1] == before[name] + 3


@pytest.mark.parametrize("kept", ["bitmap", "nm:2:4", "block:16x1"])
def test_zeros_of_the_weight_and_of_x_are_both_left_out(kept: str) -> None:
    model = MLP(gated=False)
    weight = model.down.weight
    if kept == "bitmap":
        weight *= torch.rand_like(weight) < 0.4
    elif kept == "nm:2:4":
        weight.view(-1, 4)[:, :2] = 0
    else:
        weight *= (torch.rand(6, 320) < 0.3).repeat_interleave(16, 0)
    run = compiled(model, formats=[kept])
    for rows in (1, 4):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    explained = sparsec.explain(model, torch.randn(1, 96), options={**FORCED, "formats": [kept]})
    down = next(layer for layer in explained.layers if layer.name == "down")
    assert "columns are skipped" in down.reason
    assert "its columns are held apart, in " in down.reason
    many = sparsec.explain(model, torch.randn(64, 96), options={**FORCED, "formats": [kept]})
    assert not [layer for layer in many.layers if "held apart" in layer.reason]  # nothing is packed for so many rows
    assert down.record.decision.gated[0].format.startswith(kept)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_an_up_projection_that_is_not_stored_row_after_row_is_read_right(layout: str) -> None:
    model, x = MLP(), torch.randn(1, 96)
    wide = torch.randn(96, 320).t() if layout == "transposed" else torch.randn(320, 192)[:, ::2]
    model.up.weight = nn.Parameter(0.1 * wide if layout == "transposed" else wide)
    assert not model.up.weight.is_contiguous()
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_rates_are_read_where_calibrate_was_told_to_keep_them(tmp_path: Path) -> None:
    model = MLP(gated=False)
    sparsec.calibrate(model, [torch.randn(320, 96)], cache_dir=str(tmp_path))
    nearly_none = {"min_speedup": 1000.0, "cache_dir": str(tmp_path)}
    layer = sparsec.explain(model, torch.randn(1, 96), options=nearly_none).layers[-1]
    assert layer.rates is not None
    plan = Plan("down", "linear", Policy(cache_dir=str(tmp_path)), m=1, gates="skip")
    assert gates_of(layer.record.fact, plan) == (("skip", 1.0 - layer.rates.zeros),)
    assert gates_of(layer.record.fact, replace(plan, policy=Policy(cache_dir=str(tmp_path / "other"))))[0][1] is None


def test_codes_are_packed_in_two_orders_for_calls_that_read_all_rows_and_for_those_that_read_some() -> None:
    """Rows lie four and four for the former; reading one of them there takes as long as reading all."""
    model = MLP(width=128)
    model.up.weight.copy_(torch.randint(-7, 8, model.up.weight.shape) / 8)
    model.up.weight[:, ::32] = 7 / 8
    explained = sparsec.explain(model, torch.randn(1, 128), options={**FORCED, "formats": ["panel+int4"]})
    up = next(layer for layer in explained.layers if layer.name == "up")
    assert {(r.format, r.kernel) for r in up.record.decision.gated} == {("panel+int4", "select")}
    run, before = compiled(model, formats=["panel+int4"]), STORE.packed_count
    x = torch.randn(1, 128)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert STORE.packed_count == before + 2


def test_a_weight_that_changes_is_looked_at_again() -> None:
    model = MLP()
    run, x = compiled(model), torch.randn(1, 96)
    run(x)
    model.up.weight.mul_(-2)
    model.down.weight.add_(0.1)
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_inputs_without_zeros_run_as_if_nothing_was_skipped() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(320, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(x))  # type: ignore[no-any-return]

    model = Plain()
    run = torch.compile(model, backend="sparsec", options={"min_speedup": 1.0})
    for x in (torch.rand(1, 320) + 1, torch.zeros(1, 320), torch.rand(1, 320) + 1):
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_threshold_top_k_and_a_mask_are_skipped_too() -> None:
    class Sparse(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.fc, self.form = nn.Linear(320, 96), form

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.form == "threshold":
                x = torch.where(x.abs() > 1.0, x, 0)
            elif self.form == "top-k":
                at = x.abs().topk(32, -1).indices
                x = torch.zeros_like(x).scatter(-1, at, x.gather(-1, at))
            else:
                x = x * (x > 0.5)
            return self.fc(x)  # type: ignore[no-any-return]

    for form in ("threshold", "top-k", "mask"):
        torch._dynamo.reset()
        model = Sparse(form)
        run, x = compiled(model), torch.randn(1, 320)
        before = skipped("fc")[1]
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        assert skipped("fc")[1] == before + 1, form


def test_several_layers_that_read_one_gated_input_look_at_it_once() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(320, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = torch.where(x.abs() > 1.0, x, 0)
            return self.q(x), self.k(x), self.v(x)

    model = Heads()
    run = compiled(model)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 320)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


def test_rates_are_printed_at_the_end_of_a_process_that_asks(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))\n"
        "run = torch.compile(model, backend='sparsec', options={'min_speedup': 0})\n"
        "with torch.no_grad():\n"
        "    for _ in range(3): run(torch.randn(1, 64))\n"
    )
    env = {**os.environ, "SPARSEC_LOG": "activation"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
    assert "zeros, 3 of 3 calls skipped (skip)" in done.stderr
