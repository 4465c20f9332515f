"""The grid of activation sparsity: programs that hold what the case says, on all engines, and rows of the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import activation_cases as grid
from benchmarks.activation_engines import program
from benchmarks.cases import Case
from benchmarks.coordinator import measure, workers
from benchmarks.engines import ENGINES, byte_limit
from benchmarks.report import markdown, write_report

SMALL = (256, 688)  # hidden size, intermediate size
CASES = [
    grid.down(0.9, 1, size=SMALL),
    grid.up(0.8, 1, "int8", size=SMALL),
    grid.mlp(0.9, 1, size=SMALL),
    grid.stack(0.5, 1, "int8", 0.5, size=SMALL, blocks=2),
]


@pytest.mark.parametrize("name", ["standard", "full", "quick"])
def test_case_names_are_unique(name: str) -> None:
    names = [case.name for case in getattr(grid, name)(2)]
    assert len(names) == len(set(names))
    assert all(n.startswith("activation") for n in names)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
def test_activations_hold_as_many_zeros_as_the_case_says(zeros: float) -> None:
    _, xs = program(grid.down(zeros, 1, size=SMALL), seen=True)
    assert torch.stack(xs).relu().eq(0).float().mean().item() == pytest.approx(zeros, abs=0.02)


def test_thresholds_leave_the_share_that_the_case_says() -> None:
    model, (token,) = program(grid.stack(0.5, 1, size=SMALL, blocks=1), seen=True)
    found: dict[str, float] = {}
    block = model[0]  # type: ignore[index]
    product = type(block).product

    def noted(name: str, x: torch.Tensor) -> torch.Tensor:
        found[name] = float((x.abs() <= getattr(block, f"t_{name}")).float().mean())
        return product(block, name, x)

    object.__setattr__(block, "product", noted)
    block(token)
    assert set(found) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(0.3 < share < 0.7 for share in found.values())


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.kind)
def test_hidden_zeros_change_no_value(case: Case) -> None:
    (seen, xs), (unseen, _) = program(case, True), program(case, False)
    for a, b in zip(seen(*xs), unseen(*xs), strict=True):
        assert torch.equal(a, b)


def test_all_engines_run_and_the_report_shows_them(tmp_path: Path) -> None:
    names = [name for name, engine in ENGINES.items() if any(map(engine.takes, CASES))]
    assert names == ["inductor", "unseen", "sparsec"]
    with workers(names, 1, tmp_path) as remotes:
        results = [measure(case, remotes, 2, 0.1, lambda text: None) for case in CASES]
    for result in results:
        assert set(result.samples) == set(names), result.declined
    table = markdown(write_report(results, CASES, names, 1.0, tmp_path))
    assert all(case.name in table for case in CASES)


def test_byte_limits_count_what_zeros_leave_unread() -> None:
    whole, skipped = (SimpleNamespace(format=name) for name in ("panel", "bitmap+int8"))
    fact = SimpleNamespace(n=100, k=10)
    bytes_of = [SimpleNamespace(format="bitmap+int8", bytes=500)]
    layers = [
        (SimpleNamespace(gated=(), candidates=[]), fact),
        (SimpleNamespace(gated=(skipped,), candidates=bytes_of), fact),
    ]
    assert byte_limit(layers, [whole, skipped], 0.9, 2.0) == pytest.approx(4000 / (2000 + 50))
    assert byte_limit(layers, [whole, whole], 0.9, 2.0) == 1.0
    assert grid.stack(0.5, 1, "int8", 0.5).target == 1.0
