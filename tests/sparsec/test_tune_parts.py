"""Kernels that read what the zeros of activations leave are tuned too, with the share that is expected."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec import targets
from sparsec.options import Policy
from sparsec.passes.decide.gates import UNKNOWN
from sparsec.passes.profile.weights import profile
from sparsec.tune import measured_for
from sparsec.tune_cpu import CpuPoint
from sparsec.tune_db import Database

CPU = targets.resolve("cpu:portable")


@pytest.fixture(autouse=True)
def own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("sparsec.tune"), "_process", {})


def policy(cache: Path) -> Policy:
    return Policy(tune="quick", cache_dir=str(cache), min_speedup=0.0, formats=("panel",))


def measured(weight: torch.Tensor, cache: Path, **gates: float | None) -> Any:
    known = weight, profile(weight), "fp32", CPU, policy(cache)
    return measured_for(*known, (1,), gates=tuple(gates.items()))


def test_real_kernels_are_measured_with_the_share_that_is_left(tmp_path: Path) -> None:
    weight = torch.randn(192, 256)
    found = measured(weight, tmp_path, skip=0.125, select=None)
    assert {(f, loop) for f, loop, _ in found} >= {("panel+fp32", "skip"), ("panel+fp32", "select")}
    loops = {r.key.loop for r in Database(tmp_path).all()}
    assert {"skip@left=0.12", f"select@left={UNKNOWN:.2f}"} <= loops
    again = measured(weight, tmp_path, skip=0.125, select=None)
    assert again == found
    measured(weight, tmp_path, skip=0.5)
    assert "skip@left=0.50" in {r.key.loop for r in Database(tmp_path).all()}


def test_without_gates_nothing_of_them_is_measured(tmp_path: Path) -> None:
    assert not {loop for _, loop, _ in measured(torch.randn(192, 256), tmp_path)} & {"skip", "select"}


@pytest.mark.parametrize("loop", ["skip", "select"])
def test_what_is_timed_reads_no_more_than_that_share(loop: str) -> None:
    weight = torch.randn(96, 128)
    point = CpuPoint(weight, profile(weight), "fp32", CPU, Policy(), 1, gates=((loop, 0.25),))
    active = point._active(loop, 0.25)
    size = 128 if loop == "skip" else 96
    assert len(active) == size // 4
    assert active.tolist() == sorted(set(active.tolist()))
    assert int(active[-1]) < size


def test_tuning_a_model_with_relu_measures_its_gates(tmp_path: Path) -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 192), torch.nn.Linear(192, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]

    model = Mlp().eval()
    said = {"cache_dir": str(tmp_path), "target": "cpu:portable", "formats": ["panel"], "min_speedup": 0}
    summary = sparsec.tune(model, torch.randn(1, 64), options=said)
    assert summary.measured
    assert any(r.key.loop.startswith("skip@left=") for r in Database(tmp_path).all())
    fast = torch.compile(model, backend="sparsec", options={**said, "tune": "quick"})
    x = torch.randn(1, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
