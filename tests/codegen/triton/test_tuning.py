"""Tuning with a GPU target, in the interpreter: records, configurations and failures; times here mean nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsec
from sparsec import tune_gpu
from sparsec.runtime import gpu
from sparsec.tune_db import Database


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    made = nn.Sequential(nn.Linear(96, 64)).eval()
    sparsec.sparsify(made, {"method": "magnitude", "sparsity": 0.9}, progress=False)
    return made


def options(folder: Path) -> dict[str, object]:
    return {"target": "cuda:sm_90", "min_speedup": 0, "formats": ["index"], "cache_dir": str(folder), "tune": "quick"}


def test_each_configuration_is_a_record_and_the_surest_is_run(model: nn.Module, tmp_path: Path) -> None:
    fast = torch.compile(model, backend="sparsec", options=options(tmp_path))
    x = torch.randn(1, 96)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
    records = [r for r in Database(tmp_path).all() if r.key.m == 1]
    assert len(records) >= 2
    assert all(r.key.loop.startswith("gather@") for r in records)
    best = max(records, key=lambda r: r.ratio.low)
    (entry,) = [e for (impl, _), e in gpu.TABLE.entries.items() if impl == model[0].weight._cdata]
    said = ",".join(f"{name}={value}" for name, value in entry.routes[0].config_at(1) or ())
    assert best.key.loop == f"gather@{said}"


def test_a_second_compilation_measures_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 96)
    with torch.inference_mode():
        torch.compile(model, backend="sparsec", options=options(tmp_path))(x)
        torch._dynamo.reset()
        sparsec.invalidate(model)
        monkeypatch.setattr(tune_gpu, "timed", lambda *_: pytest.fail("measured again"))
        torch.compile(model, backend="sparsec", options=options(tmp_path))(x)


def test_a_kernel_that_fails_is_left_out_and_the_others_are_measured() -> None:
    def broken(i: int) -> object:
        raise RuntimeError("no")

    calls = {"dense": lambda i: None, "broken": broken, "good": lambda i: None}
    found, late = tune_gpu.timed(calls, copies=1, rounds=6, point_s=9.0, budget_s=9.0, device=torch.device("cpu"))
    assert (set(found), late) == ({"dense", "good"}, set())
    assert {len(samples.seconds) for samples in found.values()} == {6}


def test_without_dense_nothing_is_claimed() -> None:
    def broken(i: int) -> object:
        raise RuntimeError("no")

    assert tune_gpu.timed({"dense": broken, "good": lambda i: None}, 1, 5, 1.0, 1.0, torch.device("cpu")) == ({}, set())


def test_what_the_budget_leaves_no_time_to_compile_is_late() -> None:
    calls = {name: lambda i: time.sleep(0.02) for name in ("dense", "first", "second", "third")}
    found, late = tune_gpu.timed(calls, copies=1, rounds=5, point_s=1.0, budget_s=0.0, device=torch.device("cpu"))
    assert (set(found), late) == ({"dense", "first"}, {"second", "third"})


def test_a_configuration_serves_the_rows_up_to_its_own() -> None:
    small, large = (("lanes", 8),), (("lanes", 16),)
    route = gpu.Route(1, 64, packed=None, loop="gather", tuned=((1, small), (8, large)))  # type: ignore[arg-type]
    assert [route.config_at(m) for m in (1, 2, 8, 9)] == [small, large, large, None]


def test_a_guess_is_made_once_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen.triton import family, pack_verified
    from sparsec.formats import Format

    weight = torch.zeros(16, 64)
    weight[3, 5] = 2.0
    route = gpu.Route(1, 8, pack_verified(weight, Format.parse("index+fp32"), "test"), "gather")
    kind, asked = type(family("index")), []
    real = kind.configs

    def counted(self: object, packed: object, loop: str, m: int, capability: int) -> object:
        asked.append(m)
        return real(self, packed, loop, m, capability)

    monkeypatch.setattr(kind, "configs", counted)
    for m in (1, 4, 1, 4):
        x = torch.randn(m, 64)
        torch.testing.assert_close(gpu.product(route, x), x @ weight.T)
    assert asked == [1, 4]


def test_kernels_that_read_a_part_are_records_with_the_share_that_is_left(tmp_path: Path) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(96, 64), nn.Linear(96, 64), nn.Linear(64, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    torch._dynamo.reset()
    model, x = Mlp().eval(), torch.randn(1, 96)
    said = {**options(tmp_path), "formats": ["panel"]}
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, backend="sparsec", options=said)(x), model(x))
    loops = {r.key.loop.partition(",")[0] for r in Database(tmp_path).all()}
    assert loops == {"skip@left=0.30", "select@left=0.30"}
    routes = {r.loop: r for e in gpu.TABLE.entries.values() for r in e.routes if r.watch and r.watch.calls}
    assert set(routes) == {"skip", "select"}
    assert all(route.config_at(1) for route in routes.values())
