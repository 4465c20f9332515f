"""The GPU bench without a GPU: its rows and targets, statistics by a made-up clock, files, and runs that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import chosen, no_gpu
from benchmarks.gpu.results import Results, markdown, slug, tally
from benchmarks.gpu.rows import MS, REGIMES, SHAPES, TARGETS, Row, everything, pending, quick, verdict
from benchmarks.gpu.run import ATTEMPTS, ProcessWorker, WorkerGone, run
from sparsec.errors import BadOptionValue
from sparsec.formats import Format
from sparsec.timing import speedup
from sparsec.timing_gpu import CALLS, COPIES, alternate, calls_of, copies_of

ROOT = Path(__file__).resolve().parents[2]
L2 = 60 << 20
ENVIRONMENT = {
    "gpu": "Test 1", "sms": 132, "l2_bytes": L2, "isa": "sm_90", "copy_tb_s": 4.3, "sm_clock": "", "sparsec": "0",
    "torch": "2", "cuda": "13", "triton": "3.6", "cusparselt": None, "python": "3",
}  # fmt: skip


def found(row: Row, ratio: float = 2.0, **more: Any) -> dict[str, Any]:
    engine = {
        "us": 10.0, "tb_s": 3.0, "of_copy": 0.7, "bytes": 9e6, "pack_s": 0.1, "max_error": 0.01,
        "relative_error": 2e-3, "same_bits": True,
    }  # fmt: skip
    ratios = {"dense": [ratio, ratio - 0.1, ratio + 0.1], "cuSPARSELt": [1.6, 1.5, 1.7]}
    targets = [
        {"than": t.than, "must": t.must, "stretch": t.stretch, "ratio": ratio, "verdict": verdict(t, ratio)}
        for t in row.targets
    ]
    return {
        "name": row.name, "regime": row.regime, "best": "ours x", "dense": "cuBLAS", "ratios": ratios, "notes": [],
        "engines": {"ours x": engine, "cuBLAS": engine | {"us": 20.0}}, "targets": targets, **more,
    }  # fmt: skip


def test_row_names_are_unique_and_the_quick_rows_come_first() -> None:
    rows = everything()
    assert len({row.name for row in rows}) == len(rows)
    assert rows[: len(quick())] == quick()
    assert {row.shape for row in rows} == {*SHAPES, (8192, 8192)}
    assert {row.m for row in rows} == set(MS)
    assert {row.regime for row in rows} == set(REGIMES)


def test_the_first_rows_are_large_layers_at_one_row_of_every_kind() -> None:
    kinds = {name for name, regime in REGIMES.items() if not regime.least}  # others need more rows of x
    first = quick()[: len(kinds)]
    assert {row.regime for row in first} == kinds
    assert {(row.m, row.shape) for row in first} == {(1, (11008, 4096))}


def test_rows_with_a_target_come_before_those_without() -> None:
    rest = [bool(row.targets) for row in everything()[len(quick()) :]]
    assert rest == sorted(rest, reverse=True)


def test_every_target_has_a_row_among_the_quick_ones() -> None:
    assert {t for row in quick() for t in row.targets} == set(TARGETS)


def test_targets_hold_where_they_were_set() -> None:
    assert [t.than for t in Row("2:4", 4096, 4096, 1).targets] == ["dense"]
    assert [t.than for t in Row("2:4", 11008, 4096, 1).targets] == ["dense", "cuSPARSELt"]
    assert [t.must for t in Row("70 %", 11008, 4096, 1).targets] == [1.7]
    assert not Row("70 %", 11008, 4096, 64).targets
    (dense,) = (t for t in Row("block 64", 11008, 4096, 2048).targets if t.than == "dense")
    assert dense.must == pytest.approx(0.7 / 0.2)
    assert not Row("int4", 11008, 4096, 1).targets[0].fixed_us
    assert any(t.fixed_us for t in Row("int4", 8192, 8192, 1).targets)


def test_verdicts() -> None:
    target = TARGETS[0]
    said = {ratio: verdict(target, ratio) for ratio in (None, 1.39, 1.4, 1.6)}
    assert said == {None: "not measured", 1.39: "missed", 1.4: "reached", 1.6: "stretch"}
    (only,) = (t for t in TARGETS if t.regime == "int4 2:4" and t.rows == (1, 1) and not t.must)
    assert verdict(only, 1.0) == "below stretch"


def test_regimes_name_formats_that_exist() -> None:
    for regime in REGIMES.values():
        for name in (regime.weight, *regime.formats):
            assert str(Format.parse(name)) == name


@pytest.mark.parametrize("size", [1 << 20, 6 << 20, 33 << 20, 90 << 20, 470 << 20])
def test_copies_exceed_three_times_the_cache_and_every_copy_is_read_equally_often(size: int) -> None:
    copies = copies_of(size, L2)
    assert copies >= COPIES
    assert copies * size > 3 * L2
    assert calls_of(copies) >= CALLS
    assert calls_of(copies) % copies == 0


class Clock:
    """Seconds that go by as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def takes(self, seconds: float) -> Callable[[], float]:
        def once() -> float:
            self.now += seconds
            return seconds

        return once


def test_a_drift_that_hits_all_alike_leaves_the_ratio() -> None:
    speed, clock = 1.0, Clock()

    def drifting(seconds: float) -> Callable[[], float]:
        def once() -> float:
            nonlocal speed
            speed *= 1.01
            return clock.takes(seconds * speed)()

        return once

    samples = alternate({"dense": drifting(2e-5), "ours": drifting(1e-5)}, 31, 60.0, lambda: clock.now)
    ratio = speedup(samples["dense"], samples["ours"])
    assert ratio.value == pytest.approx(2.0, rel=0.03)
    assert ratio.low <= ratio.value <= ratio.high
    assert samples["dense"].seconds[-1] > 1.5 * samples["dense"].seconds[0]


def test_rounds_stop_with_the_budget_but_never_before_five() -> None:
    clock = Clock()
    assert len(alternate({"a": clock.takes(1.0)}, 31, 0.5, lambda: clock.now)["a"].seconds) == 5
    assert len(alternate({"a": clock.takes(1.0)}, 31, 9.5, lambda: clock.now)["a"].seconds) == 10
    assert len(alternate({"a": clock.takes(1.0)}, 31, 99.0, lambda: clock.now)["a"].seconds) == 31


def test_each_goes_first_equally_often() -> None:
    order: list[str] = []

    def once(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    alternate({"a": once("a"), "b": once("b"), "c": once("c")}, 6, 9.0, lambda: 0.0)
    assert sorted(order[::3]) == ["a", "a", "b", "b", "c", "c"]


@dataclass
class Fake:
    """A worker that fails as told: contender name by row name."""

    breaks: dict[str, str]
    clock: Clock
    said: dict[str, Any] = field(default_factory=lambda: dict(ENVIRONMENT))
    last: str = ""
    ended: bool = False
    seconds: float = 2.0

    def measure(self, row: Row, skip: tuple[str, ...], inductor_s: float, until: float) -> dict[str, Any]:
        self.clock.now += self.seconds
        if self.clock.now > until:
            raise TimeoutError
        self.last = self.breaks.get(row.name, "")
        if self.last and (self.last not in skip or self.last == "timing"):
            raise WorkerGone("its process ended")
        return found(row, inductor_left=inductor_s - 1)

    def end(self) -> None:
        self.ended = True


def fake_run(
    breaks: dict[str, str], rows: list[Row], until: float = 1e9, seconds: float = 2.0
) -> tuple[list[dict[str, Any]], list[Fake]]:
    clock = Clock()
    made: list[Fake] = []

    def start() -> Fake:
        made.append(Fake(breaks, clock, seconds=seconds))
        return made[-1]

    return list(run(rows, start, until, 60.0, now=lambda: clock.now)), made


def test_a_kernel_that_takes_the_device_down_is_left_out_and_the_run_goes_on() -> None:
    rows = quick()[:3]
    measured, made = fake_run({rows[1].name: "nm.some wide=4"}, rows)
    assert [row["name"] for row in measured] == [row.name for row in rows]
    assert measured[1]["notes"] == ["nm.some wide=4: its process ended"]
    assert [worker.ended for worker in made] == [True, True]


def test_a_row_that_always_breaks_is_a_row_with_a_sentence() -> None:
    rows = quick()[:2]
    measured, made = fake_run({rows[0].name: "timing"}, rows)
    assert measured[0]["failed"].count("its process ended") == ATTEMPTS
    assert "failed" not in measured[1]
    assert len(made) == ATTEMPTS + 1


def test_no_row_is_started_after_the_time_is_up_and_a_slow_one_is_cut() -> None:
    assert len(fake_run({}, quick(), until=10.0)[0]) == 5
    assert len(fake_run({}, quick(), until=9.0)[0]) == 4


def test_a_gpu_on_which_nothing_starts_ends_the_run_with_a_sentence() -> None:
    def start() -> Fake:
        raise WorkerGone("RuntimeError: no device")

    with pytest.raises(WorkerGone, match="no device"):
        list(run(quick()[:1], start, 1e9, 0.0))


def test_the_file_is_valid_after_every_row_and_a_row_is_a_line(tmp_path: Path) -> None:
    results = Results(tmp_path, ENVIRONMENT)
    for number, row in enumerate(quick()[:3], 1):
        results.add(found(row))
        text = results.path.read_text(encoding="utf-8")
        assert len(json.loads(text)["rows"]) == number
        assert sum(line.startswith('{"name"') for line in text.splitlines()) == number
    assert results.path.name == "gpu-test-1.json"
    assert results.path.with_suffix(".md").exists()


def test_a_run_resumes_what_the_same_software_measured_on_the_same_gpu(tmp_path: Path) -> None:
    rows = quick()[:3]
    first = Results(tmp_path, ENVIRONMENT)
    first.add(found(rows[0]))
    first.add({"name": rows[1].name, "failed": "it hung", "notes": []})
    again = Results(tmp_path, ENVIRONMENT, resume=True)
    assert pending(rows, again.done) == rows[1:]
    assert not Results(tmp_path, ENVIRONMENT | {"torch": "3"}, resume=True).rows
    assert not Results(tmp_path, ENVIRONMENT).rows


def test_the_table_says_targets_rivals_and_what_failed() -> None:
    rows = [found(Row("2:4", 11008, 4096, 1), ratio=1.5), {"name": "broken", "failed": "it hung", "notes": ["a note"]}]
    text = markdown(ENVIRONMENT, rows)
    assert "1.50x (1.40-1.60)" in text
    assert "T 1.4 S 1.6: reached" in text
    assert "cuSPARSELt 1.60x" in text
    assert "failed: it hung" in text
    assert "- a note (broken)" in text
    assert "no cuSPARSELt" in text
    assert tally(rows)["reached"] == 2


def test_a_table_and_a_plot_can_be_made_of_any_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = Results(tmp_path, ENVIRONMENT)
    results.rows = [found(row) for row in quick()]
    results.rows.append(found(quick()[0]) | {"best": "", "ratios": {}, "dense": ""})
    results.write()
    assert results.draw()
    assert results.path.with_suffix(".png").stat().st_size > 1000


def test_files_are_named_after_the_gpu() -> None:
    assert [slug(n) for n in ("H200", "GeForce RTX 4090", "H100 80GB HBM3")] == [
        "h200",
        "geforce-rtx-4090",
        "h100-80gb-hbm3",
    ]


def test_rows_are_chosen_by_name() -> None:
    assert {row.regime for row in chosen(False, r"^2:4 ")} == {"2:4"}
    with pytest.raises(BadOptionValue, match="no regular expression"):
        chosen(True, "(")
    with pytest.raises(BadOptionValue, match="matches no row"):
        chosen(True, "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(WorkerGone, match="this machine has no NVIDIA GPU that torch can use"):
        ProcessWorker(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_both_commands_are_skipped_with_a_reason(tmp_path: Path) -> None:
    assert no_gpu()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    bench = [sys.executable, "-m", "benchmarks.gpu", "-o", str(tmp_path / "results")]
    done = subprocess.run(bench, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("gpu-bench: skipped, torch")
    assert not (tmp_path / "results").exists()
    tests = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "passed" not in done.stdout
    assert "torch was built without CUDA" in done.stdout or "no NVIDIA GPU" in done.stdout
