"""The bench: its grid and targets, engines that agree with torch, and a run of real workers on a small case."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases
from benchmarks.__main__ import choose, names_of
from benchmarks.cases import Case, cold_matrices
from benchmarks.coordinator import Result, measure, workers
from benchmarks.engines import ENGINES, Declines, build_csr, weights
from benchmarks.report import markdown, write_report
from sparsec.errors import BadOptionValue
from sparsec.timing import Samples

ROOT = Path(__file__).resolve().parents[2]
SMALL = Case("linear", 1, "fp32", 0.9, n=256, k=128, m=2, matrices=3)


def test_case_names_are_unique_in_every_grid() -> None:
    for grid in (cases.standard, cases.full, cases.quick):
        names = [case.name for case in grid(2)]
        assert len(names) == len(set(names))


def test_the_standard_grid_has_a_row_for_every_target_of_batch_one_and_eight() -> None:
    there = {(c.dtype, c.m, c.sparsity, c.n) for c in cases.standard(2) if c.kind == "linear" and c.cold}
    for dtype, m, sparsity in cases.TARGETS:
        if m < 64:
            assert {(dtype, m, sparsity, n) for n, _ in cases.SHAPES} <= there


def test_targets_hold_for_cold_weights_only() -> None:
    cold, hot = (cases.linear((4096, 4096), "bf16", 1, 0.8, c, 2) for c in (True, False))
    assert cold.target == 2.4
    assert hot.target is None


def test_cold_walks_through_more_than_the_last_level_cache() -> None:
    l3 = 32 << 20
    for shape in cases.SHAPES:
        for dtype, size in cases.BYTES.items():
            count = cold_matrices(*shape, dtype, l3)
            packed = shape[0] * shape[1] * (1 / 8 + 0.1 * size)
            assert count == cases.MOST_MATRICES or count * packed >= 4 * l3


def test_dense_engines_see_one_case_for_all_densities() -> None:
    keys = {case.dense_key for case in cases.standard(2) if case.name.startswith("4096x4096 bf16 M=1 cold")}
    assert len(keys) == 2  # two threads, one thread


def test_each_engine_walks_through_several_caches_of_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "l3_bytes", lambda: 32 << 20)
    case = cases.linear((4096, 4096), "bf16", 1, 0.9, True, 2)
    for size in (32 << 20, 10 << 20, 6 << 20):
        assert case.distinct(size) * size >= 4 * (32 << 20)
    assert cases.linear((4096, 4096), "bf16", 1, 0.9, False, 2).distinct(1 << 20) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_weights_have_the_zeros_of_their_case(sparsity: float) -> None:
    tensors = weights(Case("linear", 1, "bf16", sparsity, n=512, k=256, matrices=3), 1.0)
    assert len({t.data_ptr() for t in tensors}) == 3
    for tensor in tensors:
        assert 1 - tensor.count_nonzero().item() / tensor.numel() == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, e in ENGINES.items() if name != "freezing" and e.takes(SMALL)])
def test_engines_agree_with_torch_in_fp32(name: str, dtype: str) -> None:
    case = Case("linear", 1, dtype, 0.9, n=256, k=128, m=2, matrices=3)
    with torch.no_grad():
        try:
            built = ENGINES[name].build(case)
        except Declines as why:
            pytest.skip(f"{name}: {why}")
        built.call()
    assert built.error < (1e-5 if dtype == "fp32" else 2e-2)
    assert built.path


def test_csr_declines_what_mkl_does_not_have() -> None:
    with pytest.raises(Declines, match="bf16"):
        build_csr(Case("linear", 1, "bf16", 0.9, n=64, k=64))


def samples(value: float) -> Samples:
    return Samples((value,) * 9)


def result(**seconds: float) -> Result:
    case = Case("linear", 1, "bf16", 0.8, n=64, k=64, m=1, matrices=4)
    names = dict.fromkeys(seconds, "x")
    return Result(case, {n: samples(s) for n, s in seconds.items()}, names, {}, dict.fromkeys(seconds, 0.0))


def test_the_ratio_is_taken_against_the_fastest_dense_peer() -> None:
    found = result(eager=4.0, inductor=3.0, csr=0.5, sparsec=1.0)
    assert found.best_dense == "inductor"
    ratio = found.ratio_to(found.best_dense)
    assert ratio is not None
    assert ratio.value == 3.0


@pytest.mark.parametrize(("ours", "verdict"), [(1.0, "reached"), (2.0, "below")])
def test_the_verdict_compares_with_the_target(ours: float, verdict: str) -> None:
    assert result(inductor=3.0, sparsec=ours).verdict == verdict


def test_a_case_without_sparsec_has_no_verdict() -> None:
    assert result(inductor=3.0).verdict == ""


def test_workers_take_turns_and_the_report_names_what_did_not_run(tmp_path: Path) -> None:
    with workers(["eager", "csr", "openvino"], 1, tmp_path) as remotes:
        found = measure(SMALL, remotes, rounds=6, budget_s=20.0, step=lambda what: None)
        pids = [remote.process.pid for remote in remotes.values()]
        if sys.platform == "linux":  # between rounds nobody runs
            states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]
            assert set(states) <= {"T", "t"}
    assert {name: len(s.seconds) for name, s in found.samples.items()}["eager"] == 6
    assert set(found.samples) | set(found.declined) == {"eager", "csr", "openvino"}
    report = write_report([found], [SMALL, SMALL], ["eager", "csr", "openvino"], 1.0, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["engines"]["csr"]["path"] == "MKL CSR"
    assert SMALL.name in markdown(report)
    assert "Not reached in the time given: 1 cases" in markdown(report)


def test_workers_are_gone_at_the_end(tmp_path: Path) -> None:
    with workers(["eager"], 1, tmp_path) as remotes:
        process = remotes["eager"].process
    assert process.returncode == -signal.SIGKILL


def test_an_engine_that_breaks_costs_its_column_not_the_run(tmp_path: Path) -> None:
    broken = Case("linear", 1, "fp64", 0.9, n=64, k=64)
    with workers(["eager"], 1, tmp_path) as remotes:
        reply = remotes["eager"].ask(op="prepare", case=broken.to_dict())
        assert "KeyError" in reply["declined"]
        assert "path" in remotes["eager"].ask(op="prepare", case=SMALL.to_dict())


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--engines", "eager", "--threads", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_command_keeps_other_files_of_its_folder_and_stops_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    done = bench("--only", "4096x4096 bf16 M=1 cold", "--minutes", "0.01", "--budget", "0.1", "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.txt").read_text() == "kept"
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["rows"]) + len(report["missing"]) == len(cases.SPARSITIES)
    assert report["missing"]


def test_a_wrong_argument_ends_the_command_with_code_two(tmp_path: Path) -> None:
    done = bench("--only", "no such case", "-o", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(BadOptionValue, match="--list"):
        choose(False, False, "no such case", 2)
    with pytest.raises(BadOptionValue, match="did you mean 'inductor'"):
        names_of("eager,indctor")
