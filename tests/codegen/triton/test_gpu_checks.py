"""What ``make gpu-test`` and ``make gpu-bench`` run on a GPU, here on CPU tensors: the checks themselves are right."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import measure as measuring
from benchmarks.gpu.contenders import kinds_of
from benchmarks.gpu.measure import Session, measure
from benchmarks.gpu.results import HEADERS, cells
from benchmarks.gpu.rows import REGIMES, Row
from sparsec.formats import Format
from sparsec.timing_gpu import HostTimer
from tests.gpu import device_checks
from tests.gpu.device_checks import cases, check, registered
from tests.gpu.llama_checks import Size, generation_error, pruned_llama, said_for_lack_of_memory, sparse_uses

SMALL = ((67, 205),)


@pytest.mark.parametrize(("kind", "name"), registered())
def test_every_registered_format_passes_its_checks(kind: str, name: str) -> None:
    mine = [case for case in cases(kind, name, SMALL) if case.m <= 17][:2]
    found = [outcome for case in mine if (outcome := check(case, "cpu", 90, exact=False))]
    assert found
    assert not [outcome for outcome in found if outcome.failure or not outcome.same_bits]


def test_a_wrong_result_and_a_missing_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(cases("index", "index+bf16", SMALL))
    launch = device_checks.run

    def spoiled(launches: Any) -> None:
        launch(launches)
        launches[-1].args["OUT" if "OUT" in launches[-1].args else "Y"].view(-1)[5] += 9.0

    monkeypatch.setattr(device_checks, "run", spoiled)
    found = check(case, "cpu", 90, exact=False)
    assert found is not None
    assert "times what is allowed" in found.failure
    monkeypatch.setattr(device_checks, "run", lambda launches: None)  # y stays NaN
    found = check(case, "cpu", 90, exact=False)
    assert found is not None
    assert found.worst == float("inf")


def test_cases_try_every_loop_ragged_and_aligned() -> None:
    for kind, name in registered(on_device=True):
        found = list(cases(kind, name))
        assert {case.loop for case in found} == set(device_checks.way(kind).loops)
        assert {(case.n, case.k) for case in found} == {device_checks.RAGGED, device_checks.ALIGNED}
        assert {case.config for case in found} == {0, 1, 2}


def test_a_llama_generates_with_the_logits_of_eager() -> None:
    torch.compiler.reset()
    model = pruned_llama(torch.float32, "cpu", Size(hidden=32, layers=1, heads=2, vocabulary=50))
    options = {"target": "cuda:sm_90", "min_speedup": 0, "formats": ["index"]}
    assert generation_error(model, torch.randint(1, 50, (1, 3)), 3, options) < 1e-4
    assert sparse_uses(model) > 0


def test_a_model_without_memory_for_its_packs_runs_dense_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    options = {"target": "cuda:sm_90", "min_speedup": 0, "formats": ["index"]}
    assert any("out of memory" in text for text in said_for_lack_of_memory("cpu", options, monkeypatch))


@pytest.fixture
def session() -> Session:
    return Session(torch.device("cpu"), 1 << 12, 90, 1e12, HostTimer(), configs=2, inductor_s=0.0)


def test_a_row_is_measured_checked_and_compared(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    steps: list[str] = []
    session.step = steps.append
    found = measure(Row("90 %", 48, 256, 1), session)
    assert found["best"].startswith("index+bf16 index.gather")
    assert found["dense"] == "cuBLAS"
    value, low, high = found["ratios"]["dense"]
    assert low <= value <= high
    ours = found["engines"][found["best"]]
    assert ours["same_bits"]
    assert ours["relative_error"] < measuring.WRONG
    assert ours["copies"] * ours["bytes"] > 3 * session.l2
    assert any(note.startswith("Inductor: TimeoutError: its share of the time") for note in found["notes"])
    assert "cuBLAS" in steps


@pytest.mark.parametrize("regime", REGIMES)
def test_a_row_of_every_kind_is_measured_or_says_why_not(
    regime: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    monkeypatch.setattr(measuring, "SEARCH_ROUNDS", 5)
    session.configs = 1
    row = Row(regime, 128, 256, 1)
    found = measure(row, session)
    kinds = {name: kinds_of(Format.parse(name)) for name in REGIMES[regime].formats}
    assert bool(found["best"]) == any(kinds.values())
    silent = [name for name, packers in kinds.items() if not packers]
    assert all(any(note.startswith(f"{name}: ") for note in found["notes"]) for name in silent)
    assert json.loads(json.dumps(found))["engines"].keys() == found["engines"].keys()
    assert len(found["targets"]) == len(row.targets)
    assert len(cells(found)) == len(HEADERS)


def test_kernels_for_many_rows_are_tried_and_their_absence_is_a_sentence(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    found = measure(Row("2:4", 128, 256, 65), session)
    assert found["dense"] == "cuBLAS"
    assert any("prefill24.prefill shape=" in note for note in found["notes"])
    assert any(note.startswith("cuSPARSELt: LookupError: cuSPARSELt runs on NVIDIA GPUs") for note in found["notes"])


def test_a_kernel_that_raises_or_is_wrong_is_a_sentence(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    kernels = measuring.contenders.kernels

    def broken(*args: Any) -> Any:
        first, second = list(kernels(*args))[:2]

        def fails(i: int) -> torch.Tensor:
            raise RuntimeError("no such instruction\nsecond line")

        yield replace(first, call=fails)
        yield replace(second, call=lambda i: torch.zeros(1, 48, dtype=torch.bfloat16))

    monkeypatch.setattr(measuring.contenders, "kernels", broken)
    found = measure(Row("90 %", 48, 256, 1), session)
    assert found["best"] == ""
    assert any(note.endswith("RuntimeError: no such instruction") for note in found["notes"])
    assert any("its result is wrong: relative error 1" in note for note in found["notes"])


def test_a_skipped_kernel_is_not_tried(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    first = measure(Row("90 %", 48, 256, 1), session)
    again = measure(Row("90 %", 48, 256, 1), session, (first["best"], "bitmap+bf16"))
    assert again["best"] != first["best"]
    assert f"{first['best']}: not tried again" in again["notes"]


def test_a_regime_that_no_family_packs_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    monkeypatch.setattr(measuring.contenders.triton, "kinds_of", lambda format: ())
    found = measure(Row("8:16", 48, 256, 1), session)
    assert found["best"] == ""
    assert any("no family packs it" in note for note in found["notes"])
    assert [t["verdict"] for t in found["targets"]] == ["not measured"]
